#!/bin/sh
# Stage 2 of LLaVA-InternLM2: language model and projector train on instructions, the loss on the answers.
#   MODEL=OUTPUT_OF_STAGE_1 DATA=DIR OUTPUT=DIR sh examples/llava_internlm2/finetune_llava_internlm2.sh [section.key=value ...]
# MODEL may also be a native LLaVA such as llava-hf/llava-1.5-7b-hf. As published: 128 samples a step, 16 at a time on a device,
# samples of like length and kind together. PER_DEVICE_BATCH_SIZE=1 packs rows of data.seq_length tokens instead; BATCH_SIZE then
# counts rows. examples/common.sh lists all variables.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/examples/common.sh"

require MODEL "output of pretrain_llava_internlm2.sh, or an HF directory" \
    DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
settings llava_internlm2/finetune_llava_internlm2.yaml
train llava_internlm2/finetune_llava_internlm2.yaml "$@"
