#!/bin/sh
# Stage 1 of an InternVL of parts: a fresh connector between a frozen language model and a frozen InternViT learns from captions.
#   LLM=Qwen/Qwen3-1.7B VISION=OpenGVLab/InternViT-300M-448px-V2_5 DATA=DIR OUTPUT=DIR \
#       sh examples/internvl3/pretrain_internvl3.sh [section.key=value ...]
# MODEL=DIR in place of LLM and VISION starts from a model that is already assembled. As published: 512 packed rows of
# data.seq_length tokens a step. examples/common.sh lists all variables.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/examples/common.sh"

[ -n "${MODEL:-}" ] || require LLM "directory or hub id of the language model (or set MODEL)" \
    VISION "directory or hub id of the InternViT tower (or set MODEL)"
require DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
settings internvl3/pretrain_internvl3.yaml
[ -n "${MODEL:-}" ] || assemble internvl3
train internvl3/pretrain_internvl3.yaml "$@"
