#!/bin/sh
# LoRA on SmolVLM: adapters on the language model; tower and connector are frozen, the loss is on the answers.
#   MODEL=HuggingFaceTB/SmolVLM-256M-Instruct DATA=DIR OUTPUT=DIR sh examples/smolvlm/lora_smolvlm.sh [section.key=value ...]
# As published: 16 samples a step, 4 at a time on a device. PER_DEVICE_BATCH_SIZE=1 packs rows of data.seq_length tokens instead;
# BATCH_SIZE then counts rows. examples/common.sh lists all variables.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/examples/common.sh"

require MODEL "HF directory or hub id of a SmolVLM, SmolVLM2 or Idefics3" \
    DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
TP=${TP:-1} # a base that takes no gradients fits one GPU
settings "${RECIPE:-smolvlm/lora_smolvlm.yaml}"
train "${RECIPE:-smolvlm/lora_smolvlm.yaml}" "$@"
