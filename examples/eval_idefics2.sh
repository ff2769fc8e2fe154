#!/bin/sh
# Loss on held-out data, without training: of an HF directory, Megatron weights or a training checkpoint.
#   MODEL=DIR VAL_DATA=DIR OUTPUT=DIR sh examples/eval_idefics2.sh [section.key=value ...]
# examples/common.sh lists all variables.
set -eu
. "$(dirname "$0")/common.sh"

require MODEL "what to evaluate" VAL_DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for the logs"
DATA= RESUME=0
settings
train finetune_idefics2.yaml --skip-train "$@"
