#!/bin/sh
# Stage 1 of Idefics2-Llama3: a fresh connector between a frozen Llama 3 and a frozen SigLIP learns from captions.
#   LLM=DIR VISION=DIR DATA=DIR OUTPUT=DIR sh examples/pretrain_idefics2_llama3.sh [section.key=value ...]
# MODEL=DIR in place of LLM and VISION starts from a model that is already assembled. examples/common.sh lists all variables.
set -eu
. "$(dirname "$0")/common.sh"

[ -n "${MODEL:-}" ] || require LLM "directory or hub id of the language model (or set MODEL)" \
    VISION "directory or hub id of the SigLIP tower (or set MODEL)"
require DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
settings pretrain_idefics2_llama3.yaml
[ -n "${MODEL:-}" ] || assemble idefics2_llama3
train pretrain_idefics2_llama3.yaml "$@"
