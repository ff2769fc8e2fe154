#!/bin/sh
# QLoRA on Idefics2: adapters on a language model in 4 bits and on the connector, the loss on the answers.
#   MODEL=HuggingFaceM4/idefics2-8b DATA=DIR OUTPUT=DIR sh examples/qlora_idefics2.sh [section.key=value ...]
# examples/common.sh lists all variables.
export RECIPE=qlora_idefics2.yaml
exec sh "$(dirname "$0")/lora_idefics2.sh" "$@"
