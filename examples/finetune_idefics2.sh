#!/bin/sh
# Full fine-tuning of Idefics2 (Mistral text model) on instructions, the loss on the answers alone.
#   MODEL=HuggingFaceM4/idefics2-8b DATA=DIR OUTPUT=DIR sh examples/finetune_idefics2.sh [section.key=value ...]
# examples/common.sh lists all variables.
set -eu
. "$(dirname "$0")/common.sh"

require MODEL "HF directory or hub id of an Idefics2" \
    DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
settings finetune_idefics2.yaml
train finetune_idefics2.yaml "$@"
