#!/bin/sh
# One command on a bare machine with one GPU: makes the environment with a CUDA build of torch, then prints the table.
#   sh benchmarks/vlm_table.sh [arguments of vlm_table.py]      what is measured already is kept: run it again to go on
set -eu
cd "$(dirname "$0")/.."
export MEGATRON_VLM_TORCH="${MEGATRON_VLM_TORCH:-cuda}" MEGATRON_VLM_VENV="${MEGATRON_VLM_VENV:-.venv-gpu}"
. toolkits/setup_env.sh
python -c "import accelerate, bitsandbytes" 2>/dev/null || pip install --quiet accelerate bitsandbytes
exec python benchmarks/vlm_table.py "$@"
