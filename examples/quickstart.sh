#!/bin/sh
# The whole way on real images and two CPU cores, in a few minutes: handwritten digits -> tar shards; a tiny untrained
# Idefics2 -> Megatron weights for two tensor parallel ranks -> training under torchrun -> back to an HF checkpoint ->
# answers from plain transformers on scans that nothing before has read.
#   sh examples/quickstart.sh [section.key=value ...]      further settings go to the training
#   SEED=1 OUTPUT=runs/mine sh examples/quickstart.sh      other weights and data order, another folder
#   BLIND=1 sh examples/quickstart.sh                      also trains a control on one grey picture: twice the time
#   LORA=1 sh examples/quickstart.sh                       adapters on the language model, the connector in full; answers by PEFT too
set -eu
cd "$(dirname "$0")/.."
. toolkits/setup_env.sh
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore

SEED=${SEED:-0}
OUTPUT=${OUTPUT:-runs/quickstart}
TP=2 # tensor parallel ranks, one a core
RECIPE=train
WEIGHTS=$OUTPUT/megatron
EXPORT=
if [ "${LORA:-0}" != 0 ]; then # from the HF checkpoint as it is: PEFT's adapter_config.json will name it
    RECIPE=lora WEIGHTS=$OUTPUT/hf EXPORT=--merge
fi
mkdir -p "$OUTPUT"
for made in digits grey hf megatron sighted blind; do rm -rf "${OUTPUT:?}/$made"; done

started=$(date +%s)
step() { echo "== $(($(date +%s) - started)) s: $*"; }

# learn DIGITS NAME ARGS...: data build, training and export of one set of pictures.
learn() {
    digits=$1 name=$2
    shift 2
    step "data build: tar shards and an index"
    megatron-vlm data build --format llava --input "$digits/train.json" --image-root "$digits" --out "$OUTPUT/$name/data"
    step "training on $TP ranks"
    torchrun --nproc-per-node $TP --master-port "${MASTER_PORT:-29511}" -m megatron_vlm train \
        --config examples/quickstart/$RECIPE.yaml --tensor-model-parallel-size $TP --seed "$SEED" \
        --load "$WEIGHTS" --data-path "$OUTPUT/$name/data" --save "$OUTPUT/$name/run" "$@"
    step "Megatron -> HF"
    # shellcheck disable=SC2086 # none or one word
    toolkits/convert mg2hf $EXPORT --load "$OUTPUT/$name/run" --out "$OUTPUT/$name/export"
}

step "digits as PNG files and LLaVA json"
python examples/quickstart/make_digits.py --out "$OUTPUT/digits"

step "a tiny untrained Idefics2 in HF's format"
python examples/quickstart/make_model.py --out "$OUTPUT/hf" --seed "$SEED"

if [ "$RECIPE" = train ]; then
    step "HF -> Megatron, $TP tensor parallel ranks"
    toolkits/convert hf2mg --family idefics2 --hf "$OUTPUT/hf" --out "$OUTPUT/megatron" --tp $TP --pp 1
fi

learn "$OUTPUT/digits" sighted "$@"
if [ "${BLIND:-0}" != 0 ]; then
    step "the control: the same with one grey picture"
    python examples/quickstart/make_digits.py --blind --out "$OUTPUT/grey"
    learn "$OUTPUT/grey" blind "$@"
    set -- --blind-model "$OUTPUT/blind/export"
else
    set --
fi
if [ "$RECIPE" = lora ]; then
    step "the adapter in PEFT's format"
    toolkits/convert mg2hf --adapter-only --load "$OUTPUT/sighted/run" --out "$OUTPUT/sighted/adapter"
    set -- "$@" --adapter "$OUTPUT/sighted/adapter"
fi

step "answers on held-out scans, by transformers"
python examples/quickstart/evaluate.py --model "$OUTPUT/sighted/export" --digits "$OUTPUT/digits" \
    --metrics "$OUTPUT/sighted/run/metrics.jsonl" --out "$OUTPUT" "$@"
step "done"
