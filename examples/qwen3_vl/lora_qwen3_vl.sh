#!/bin/sh
# LoRA on Qwen3-VL: adapters on the language model; tower and mergers are frozen, the loss is on the answers.
#   MODEL=Qwen/Qwen3-VL-8B-Instruct DATA=DIR OUTPUT=DIR sh examples/qwen3_vl/lora_qwen3_vl.sh [section.key=value ...]
# Rows of data.seq_length tokens, 16 a step. examples/common.sh lists all variables.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/examples/common.sh"

require MODEL "HF directory or hub id of a Qwen3-VL" \
    DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
TP=${TP:-1} # a base that takes no gradients fits one GPU
settings "${RECIPE:-qwen3_vl/lora_qwen3_vl.yaml}"
train "${RECIPE:-qwen3_vl/lora_qwen3_vl.yaml}" "$@"
