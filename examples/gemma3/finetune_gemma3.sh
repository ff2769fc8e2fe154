#!/bin/sh
# Full fine-tuning of Gemma 3 on instructions: decoder and connector train, the tower is frozen, the loss is on the answers.
#   MODEL=google/gemma-3-4b-it DATA=DIR OUTPUT=DIR sh examples/gemma3/finetune_gemma3.sh [section.key=value ...]
# Rows of data.seq_length tokens, 32 a step. examples/common.sh lists all variables.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/examples/common.sh"

require MODEL "HF directory or hub id of a Gemma 3" \
    DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
settings gemma3/finetune_gemma3.yaml
train gemma3/finetune_gemma3.yaml "$@"
