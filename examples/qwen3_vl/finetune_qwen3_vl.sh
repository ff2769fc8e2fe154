#!/bin/sh
# Full fine-tuning of Qwen3-VL on instructions: decoder and mergers train, the tower is frozen, the loss is on the answers.
#   MODEL=Qwen/Qwen3-VL-8B-Instruct DATA=DIR OUTPUT=DIR sh examples/qwen3_vl/finetune_qwen3_vl.sh [section.key=value ...]
# Rows of data.seq_length tokens, 32 a step. examples/common.sh lists all variables.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/examples/common.sh"

require MODEL "HF directory or hub id of a Qwen3-VL" \
    DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
settings qwen3_vl/finetune_qwen3_vl.yaml
train qwen3_vl/finetune_qwen3_vl.yaml "$@"
