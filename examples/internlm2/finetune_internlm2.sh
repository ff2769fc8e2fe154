#!/bin/sh
# Full fine-tuning of InternLM2 on conversations of text, the loss on the answers.
#   MODEL=internlm/internlm2-chat-1_8b DATA=DIR OUTPUT=DIR sh examples/internlm2/finetune_internlm2.sh [section.key=value ...]
# examples/common.sh lists all variables.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/examples/common.sh"

require MODEL "HF directory or hub id of an InternLM2" \
    DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
settings internlm2/finetune_internlm2.yaml
train internlm2/finetune_internlm2.yaml "$@"
