#!/bin/sh
# Stage 2 of LLaVA-InternLM2 with adapters: the language model in 4 bits, the projector in full, the loss on the answers.
#   MODEL=OUTPUT_OF_STAGE_1 DATA=DIR OUTPUT=DIR sh examples/llava_internlm2/qlora_llava_internlm2.sh [section.key=value ...]
# As published: 128 samples a step, 16 at a time on a device, samples of like length and kind together. PER_DEVICE_BATCH_SIZE=1 packs
# rows of data.seq_length tokens instead; BATCH_SIZE then counts rows. examples/common.sh lists all variables.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/examples/common.sh"

require MODEL "HF directory or hub id of a LLaVA-InternLM2" \
    DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
TP=${TP:-1} # a base that takes no gradients fits one GPU
settings llava_internlm2/qlora_llava_internlm2.yaml
train llava_internlm2/qlora_llava_internlm2.yaml "$@"
