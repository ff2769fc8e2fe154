#!/bin/sh
# Supervised fine-tuning of InternVL3.5 on packed rows: decoder, connector and tower train, the loss is on the answers.
#   MODEL=OpenGVLab/InternVL3_5-8B-Pretrained DATA=DIR OUTPUT=DIR sh examples/internvl3/finetune_internvl3_5.sh [section.key=value ...]
# As published: 8,000 updates of 512 rows of 32,768 tokens. examples/common.sh lists all variables.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/examples/common.sh"

require MODEL "HF directory or hub id of an InternVL3.5, of either layout" \
    DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
settings internvl3/finetune_internvl3_5.yaml
train internvl3/finetune_internvl3_5.yaml "$@"
