#!/bin/sh
# QLoRA on Qwen3-VL: adapters on a language model in 4 bits; tower and mergers are frozen, the loss is on the answers.
#   MODEL=Qwen/Qwen3-VL-8B-Instruct DATA=DIR OUTPUT=DIR sh examples/qwen3_vl/qlora_qwen3_vl.sh [section.key=value ...]
# Rows of data.seq_length tokens, 16 a step. examples/common.sh lists all variables.
export RECIPE=qwen3_vl/qlora_qwen3_vl.yaml
exec sh "$(dirname "$0")/lora_qwen3_vl.sh" "$@"
