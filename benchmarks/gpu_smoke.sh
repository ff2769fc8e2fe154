#!/bin/sh
# One command on a bare GPU machine: makes the environment with a CUDA build of torch, then checks and measures one GPU.
#   sh benchmarks/gpu_smoke.sh [arguments of gpu_smoke.py]
#   MEGATRON_VLM_PIP_ARGS="--index-url ..." sh benchmarks/gpu_smoke.sh     where pip's default gives no CUDA build
set -eu
cd "$(dirname "$0")/.."
export MEGATRON_VLM_TORCH="${MEGATRON_VLM_TORCH:-cuda}" MEGATRON_VLM_VENV="${MEGATRON_VLM_VENV:-.venv-gpu}"
. toolkits/setup_env.sh
exec python benchmarks/gpu_smoke.py "$@"
