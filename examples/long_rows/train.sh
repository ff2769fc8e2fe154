#!/bin/sh
# Rows of 64k and 128k tokens over context parallel ranks: the recipe documents_idefics2 or video_idefics2 of this folder.
#   RECIPE=video_idefics2 MODEL=HuggingFaceM4/idefics2-8b DATA=DIR OUTPUT=DIR sh examples/long_rows/train.sh [section.key=value ...]
# CP is the number of ranks that a row lies over (default: the recipe's); examples/common.sh lists all other variables.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/examples/common.sh"

require RECIPE "documents_idefics2 or video_idefics2" MODEL "HF directory or hub id of an Idefics2" \
    DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
settings "long_rows/$RECIPE.yaml"
train "long_rows/$RECIPE.yaml" "$@"
