#!/bin/sh
# LoRA on InternLM-XComposer2-4KHD: adapters on the decoder, the loss on the answers.
#   MODEL=internlm/internlm-xcomposer2-4khd-7b DATA=DIR OUTPUT=DIR sh examples/xcomposer2/lora_xcomposer2_4khd.sh [section.key=value ...]
# As published: 64 samples a step, one at a time. PACKING=1 packs rows of data.seq_length tokens, BATCH_SIZE then counts rows.
# examples/common.sh lists all variables.
export RECIPE=xcomposer2/lora_xcomposer2_4khd.yaml
exec sh "$(dirname "$0")/lora_xcomposer2.sh" "$@"
