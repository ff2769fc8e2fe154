#!/bin/sh
# Full fine-tuning of SmolVLM on instructions: decoder and connector train, the tower is frozen.
#   MODEL=HuggingFaceTB/SmolVLM-256M-Instruct DATA=DIR OUTPUT=DIR sh examples/smolvlm/finetune_smolvlm.sh [section.key=value ...]
# As published: 16 samples a step, 4 at a time on a device. PER_DEVICE_BATCH_SIZE=1 packs rows of data.seq_length tokens instead;
# BATCH_SIZE then counts rows. examples/common.sh lists all variables.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/examples/common.sh"

require MODEL "HF directory or hub id of a SmolVLM, SmolVLM2 or Idefics3" \
    DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
TP=${TP:-1} # a model of this size fits one GPU
settings "smolvlm/finetune_smolvlm.yaml"
train "smolvlm/finetune_smolvlm.yaml" "$@"
