#!/bin/sh
# QLoRA on SmolVLM: adapters on a language model in 4 bits; tower and connector are frozen, the loss is on the answers.
#   MODEL=HuggingFaceTB/SmolVLM-256M-Instruct DATA=DIR OUTPUT=DIR sh examples/smolvlm/qlora_smolvlm.sh [section.key=value ...]
# Variables as of examples/smolvlm/lora_smolvlm.sh.
export RECIPE=smolvlm/qlora_smolvlm.yaml
exec sh "$(dirname "$0")/lora_smolvlm.sh" "$@"
