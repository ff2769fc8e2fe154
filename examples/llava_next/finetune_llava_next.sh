#!/bin/sh
# Full fine-tuning of LLaVA-NeXT or LLaVA-OneVision on instructions: everything trains, the loss is on the answers.
#   MODEL=llava-hf/llava-v1.6-mistral-7b-hf DATA=DIR OUTPUT=DIR sh examples/llava_next/finetune_llava_next.sh [section.key=value ...]
# As published: 128 samples a step. PER_DEVICE_BATCH_SIZE=1 packs rows of data.seq_length tokens instead; BATCH_SIZE then counts rows.
# examples/common.sh lists all variables.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/examples/common.sh"

require MODEL "HF directory or hub id of a LLaVA-NeXT or LLaVA-OneVision" \
    DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
settings llava_next/finetune_llava_next.yaml
train llava_next/finetune_llava_next.yaml "$@"
