#!/bin/sh
# Stage 2 of Idefics2-Llama3: everything trains on instructions, the loss on the answers alone.
#   MODEL=OUTPUT_OF_STAGE_1 DATA=DIR OUTPUT=DIR sh examples/finetune_idefics2_llama3.sh [section.key=value ...]
# examples/common.sh lists all variables.
set -eu
. "$(dirname "$0")/common.sh"

require MODEL "output of examples/pretrain_idefics2_llama3.sh, or an HF directory" \
    DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
settings finetune_idefics2_llama3.yaml
train finetune_idefics2_llama3.yaml "$@"
