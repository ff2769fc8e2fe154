#!/bin/sh
# Full fine-tuning of Qwen2.5-VL on instructions: decoder and merger train, the tower is frozen, the loss is on the answers.
#   MODEL=Qwen/Qwen2.5-VL-7B-Instruct DATA=DIR OUTPUT=DIR sh examples/qwen2_5_vl/finetune_qwen2_5_vl.sh [section.key=value ...]
# Rows of data.seq_length tokens, 32 a step. examples/common.sh lists all variables.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/examples/common.sh"

require MODEL "HF directory or hub id of a Qwen2.5-VL" \
    DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
settings qwen2_5_vl/finetune_qwen2_5_vl.yaml
train qwen2_5_vl/finetune_qwen2_5_vl.yaml "$@"
