#!/bin/sh
# LoRA on InternVL3: adapters on the language model; tower and connector are frozen, the loss is on the answers.
#   MODEL=OpenGVLab/InternVL3-8B DATA=DIR OUTPUT=DIR sh examples/internvl3/lora_internvl3.sh [section.key=value ...]
# 32 samples a step, 4 at a time on a device, samples of like length together. PER_DEVICE_BATCH_SIZE=1 packs rows of data.seq_length
# tokens instead; BATCH_SIZE then counts rows. examples/common.sh lists all variables.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/examples/common.sh"

require MODEL "HF directory or hub id of an InternVL3, of either layout" \
    DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
TP=${TP:-1} # a base that takes no gradients fits one GPU
settings "${RECIPE:-internvl3/lora_internvl3.yaml}"
train "${RECIPE:-internvl3/lora_internvl3.yaml}" "$@"
