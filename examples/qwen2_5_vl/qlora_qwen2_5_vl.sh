#!/bin/sh
# QLoRA on Qwen2.5-VL: adapters on a language model in 4 bits; tower and merger are frozen, the loss is on the answers.
#   MODEL=Qwen/Qwen2.5-VL-7B-Instruct DATA=DIR OUTPUT=DIR sh examples/qwen2_5_vl/qlora_qwen2_5_vl.sh [section.key=value ...]
# Rows of data.seq_length tokens, 16 a step. examples/common.sh lists all variables.
export RECIPE=qwen2_5_vl/qlora_qwen2_5_vl.yaml
exec sh "$(dirname "$0")/lora_qwen2_5_vl.sh" "$@"
