#!/bin/sh
# QLoRA on LLaVA-NeXT or LLaVA-OneVision: adapters on a language model in 4 bits; tower and projector are frozen.
#   MODEL=llava-hf/llava-v1.6-mistral-7b-hf DATA=DIR OUTPUT=DIR sh examples/llava_next/qlora_llava_next.sh [section.key=value ...]
# Variables as of examples/llava_next/lora_llava_next.sh.
export RECIPE=llava_next/qlora_llava_next.yaml
exec sh "$(dirname "$0")/lora_llava_next.sh" "$@"
