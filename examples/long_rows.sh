#!/bin/sh
# Long rows on two CPU cores, in a few minutes: documents and videos (examples/long_rows/make_data.py), the recipes of
# examples/long_rows at a small size, each row over two context parallel ranks, positions stretched from 1,024 to 4,096; then
# one rank answers from the checkpoint of two.
#   sh examples/long_rows.sh [section.key=value ...]      further settings go to both trainings
#   OUTPUT=runs/mine STEPS=4 sh examples/long_rows.sh
set -eu
cd "$(dirname "$0")/.."
[ ! -x .venv/bin/python ] || PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore

OUTPUT=${OUTPUT:-runs/long_rows} STEPS=${STEPS:-20}
mkdir -p "$OUTPUT"
for made in data hf documents video; do rm -rf "${OUTPUT:?}/$made"; done

# learn NAME RECIPE INPUT: data build, training on two ranks and an answer of one.
learn() {
    name=$1 recipe=$2 input=$3
    shift 3
    megatron-vlm data build --format llava --input "$OUTPUT/data/$input" --image-root "$OUTPUT/data" --video-frames 8 48 \
        --out "$OUTPUT/$name/data"
    MODEL=$OUTPUT/hf DATA=$OUTPUT/$name/data OUTPUT=$OUTPUT/$name/run DEVICE=cpu GPUS=2 TP=1 CP=2 BATCH_SIZE=1 \
        sh "examples/long_rows/$recipe.sh" data.seq_length=4096 data.image_size=32 training.precision=fp32 training.train_epochs=null \
        training.train_iters="$STEPS" optimizer.lr=1e-3 checkpoint.save_interval="$STEPS" logging.log_interval=1 "$@"
    megatron-vlm generate --load "$OUTPUT/$name/run" --input "$OUTPUT/data/$input" --image-root "$OUTPUT/data" --limit 1 \
        --max-new-tokens 24 --device cpu
}

python examples/long_rows/make_data.py --out "$OUTPUT/data"
python examples/quickstart/make_model.py --out "$OUTPUT/hf"
learn documents documents_idefics2 documents.json "$@"
learn video video_idefics2 videos.json "$@"
