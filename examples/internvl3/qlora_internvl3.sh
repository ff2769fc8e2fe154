#!/bin/sh
# QLoRA on InternVL3: adapters on a language model in 4 bits; tower and connector are frozen, the loss is on the answers.
#   MODEL=OpenGVLab/InternVL3-8B DATA=DIR OUTPUT=DIR sh examples/internvl3/qlora_internvl3.sh [section.key=value ...]
# 32 samples a step, 4 at a time on a device, samples of like length together. PER_DEVICE_BATCH_SIZE=1 packs rows of data.seq_length
# tokens instead; BATCH_SIZE then counts rows. examples/common.sh lists all variables.
export RECIPE=internvl3/qlora_internvl3.yaml
exec sh "$(dirname "$0")/lora_internvl3.sh" "$@"
