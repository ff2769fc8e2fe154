#!/bin/sh
# Stage 1 of LLaVA-InternLM2: a fresh projector between a frozen InternLM2 (or Vicuna) and a frozen CLIP learns from captions.
#   LLM=internlm/internlm2-chat-1_8b VISION=openai/clip-vit-large-patch14-336 DATA=DIR OUTPUT=DIR \
#       sh examples/llava_internlm2/pretrain_llava_internlm2.sh [section.key=value ...]
# MODEL=DIR in place of LLM and VISION starts from a model that is already assembled. As published: 256 samples a step, 32 at a
# time on a device. PER_DEVICE_BATCH_SIZE=1 packs rows of data.seq_length tokens instead; BATCH_SIZE then counts rows.
# examples/common.sh lists all variables.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/examples/common.sh"

[ -n "${MODEL:-}" ] || require LLM "directory or hub id of the language model (or set MODEL)" \
    VISION "directory or hub id of the CLIP tower (or set MODEL)"
require DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
settings llava_internlm2/pretrain_llava_internlm2.yaml
[ -n "${MODEL:-}" ] || assemble llava_internlm2
train llava_internlm2/pretrain_llava_internlm2.yaml "$@"
