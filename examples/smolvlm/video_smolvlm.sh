#!/bin/sh
# Full fine-tuning of SmolVLM2 on videos: decoder and connector train, the tower is frozen.
#   megatron-vlm data build --format llava --input videos.json --image-root . --video-sampling ends --out DIR
#   MODEL=HuggingFaceTB/SmolVLM2-500M-Video-Instruct DATA=DIR OUTPUT=DIR sh examples/smolvlm/video_smolvlm.sh [section.key=value ...]
# BATCH_SIZE counts packed rows. examples/common.sh lists all variables.
set -eu
ROOT=$(cd "$(dirname "$0")/../.." && pwd)
. "$ROOT/examples/common.sh"

require MODEL "HF directory or hub id of a SmolVLM2" \
    DATA "folder that megatron-vlm data build wrote" OUTPUT "folder for checkpoints and logs"
TP=${TP:-1} # a model of this size fits one GPU
settings "smolvlm/video_smolvlm.yaml"
train "smolvlm/video_smolvlm.yaml" "$@"
