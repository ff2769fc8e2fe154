#!/bin/sh
# LoRA on Gemma 3: adapters on the language model; tower and connector are frozen, the loss is on the answers.
#   MODEL=google/gemma-3-4b-it DATA=DIR OUTPUT=DIR sh examples/gemma3/lora_gemma3.sh [section.key=value ...]
# Rows of data.seq_length tokens, 16 a step. examples/common.sh lists all variables.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/examples/common.sh"

require MODEL "HF directory or hub id of a Gemma 3" \
    DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
TP=${TP:-1} # a base that takes no gradients fits one GPU
settings "${RECIPE:-gemma3/lora_gemma3.yaml}"
train "${RECIPE:-gemma3/lora_gemma3.yaml}" "$@"
