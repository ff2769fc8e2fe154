#!/bin/sh
# Full fine-tuning of InternLM-XComposer2 7b or vl-7b, the loss on the answers.
#   MODEL=internlm/internlm-xcomposer2-vl-7b DATA=DIR OUTPUT=DIR sh examples/xcomposer2/finetune_xcomposer2.sh [section.key=value ...]
# As published: 64 samples a step, one at a time. PACKING=1 packs rows of data.seq_length tokens, BATCH_SIZE then counts rows.
# examples/common.sh lists all variables.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/examples/common.sh"

require MODEL "HF directory or hub id of an InternLM-XComposer2" \
    DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
settings xcomposer2/finetune_xcomposer2.yaml
train xcomposer2/finetune_xcomposer2.yaml "$@"
