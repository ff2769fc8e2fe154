#!/bin/sh
# QLoRA on InternLM2: adapters on every linear of a base in 4 bits, the loss on the answers.
#   MODEL=internlm/internlm2-chat-1_8b DATA=DIR OUTPUT=DIR sh examples/internlm2/qlora_internlm2.sh [section.key=value ...]
# 16 packed rows a step. examples/common.sh lists all variables.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/examples/common.sh"

require MODEL "HF directory or hub id of an InternLM2" \
    DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
TP=${TP:-1} # a base that takes no gradients fits one GPU
settings internlm2/qlora_internlm2.yaml
train internlm2/qlora_internlm2.yaml "$@"
