#!/bin/sh
# QLoRA on Gemma 3: adapters on a language model in 4 bits; tower and connector are frozen, the loss is on the answers.
#   MODEL=google/gemma-3-4b-it DATA=DIR OUTPUT=DIR sh examples/gemma3/qlora_gemma3.sh [section.key=value ...]
# Rows of data.seq_length tokens, 16 a step. examples/common.sh lists all variables.
export RECIPE=gemma3/qlora_gemma3.yaml
exec sh "$(dirname "$0")/lora_gemma3.sh" "$@"
