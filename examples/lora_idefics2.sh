#!/bin/sh
# LoRA on Idefics2: adapters on the language model and the connector, the loss on the answers.
#   MODEL=HuggingFaceM4/idefics2-8b DATA=DIR OUTPUT=DIR sh examples/lora_idefics2.sh [section.key=value ...]
# examples/common.sh lists all variables.
set -eu
ROOT=$(cd "$(dirname "$0")/.." && pwd)
. "$ROOT/examples/common.sh"

require MODEL "HF directory or hub id of an Idefics2, or its Megatron weights" \
    DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
TP=${TP:-1} # a base that takes no gradients fits one GPU
settings "${RECIPE:-lora_idefics2.yaml}"
train "${RECIPE:-lora_idefics2.yaml}" "$@"
