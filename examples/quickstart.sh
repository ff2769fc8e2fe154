#!/bin/sh
# The whole way on real images and two CPU cores, in a few minutes: handwritten digits -> tar shards; a tiny untrained
# Idefics2 -> Megatron weights for two tensor parallel ranks -> training under torchrun -> back to an HF checkpoint ->
# answers from plain transformers on scans that nothing before has read.
#   sh examples/quickstart.sh [section.key=value ...]      further settings go to the training
#   SEED=1 OUTPUT=runs/mine sh examples/quickstart.sh      other weights and data order, another folder
set -eu
cd "$(dirname "$0")/.."
. toolkits/setup_env.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore

SEED=${SEED:-0}
OUTPUT=${OUTPUT:-runs/quickstart}
TP=2
mkdir -p "$OUTPUT"
for made in digits data hf megatron run export; do rm -rf "${OUTPUT:?}/$made"; done

started=$(date +%s)
step() { echo "== $(($(date +%s) - started)) s: $*"; }

step "digits as PNG files and LLaVA json"
python examples/quickstart/make_digits.py --out "$OUTPUT/digits"

step "data build: tar shards and an index"
megatron-vlm data build --format llava --input "$OUTPUT/digits/train.json" --image-root "$OUTPUT/digits" --out "$OUTPUT/data"

step "a tiny untrained Idefics2 in HF's format"
python examples/quickstart/make_model.py --out "$OUTPUT/hf" --seed "$SEED"

step "HF -> Megatron, $TP tensor parallel ranks"
toolkits/convert hf2mg --family idefics2 --hf "$OUTPUT/hf" --out "$OUTPUT/megatron" --tp $TP --pp 1

step "training on $TP ranks"
torchrun --nproc-per-node $TP --master-port "${MASTER_PORT:-29511}" -m megatron_vlm train \
    --config examples/quickstart/train.yaml --tensor-model-parallel-size $TP --seed "$SEED" \
    --load "$OUTPUT/megatron" --data-path "$OUTPUT/data" --save "$OUTPUT/run" "$@"

step "Megatron -> HF"
toolkits/convert mg2hf --load "$OUTPUT/run" --out "$OUTPUT/export"

step "answers on held-out scans, by transformers"
python examples/quickstart/evaluate.py --model "$OUTPUT/export" --digits "$OUTPUT/digits" \
    --metrics "$OUTPUT/run/metrics.jsonl" --out "$OUTPUT"
step "done"
