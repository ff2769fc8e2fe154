#!/bin/sh
# Full fine-tuning of Idefics2 on long documents: rows of 128k tokens over 8 context parallel ranks.
#   MODEL=HuggingFaceM4/idefics2-8b DATA=DIR OUTPUT=DIR sh examples/long_rows/documents_idefics2.sh [section.key=value ...]
# CP is the number of ranks that a row lies over (default: the recipe's); examples/common.sh lists all other variables.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/examples/common.sh"

require MODEL "HF directory or hub id of an Idefics2" \
    DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
settings long_rows/documents_idefics2.yaml
train long_rows/documents_idefics2.yaml "$@"
