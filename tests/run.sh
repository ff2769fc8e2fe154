#!/bin/sh
# Checks everything that can be checked on this machine:  sh tests/run.sh [--fast | --full] [pytest arguments]
#   default   lint, format, types, and all tests but the whole matrices
#   --fast    the same without the tests marked slow (about 3 minutes)
#   --full    the whole matrix, before a capability is called done
# Tests that need a GPU run where there is one; elsewhere they are counted, not hidden.
# --shuffle SEED (a pytest argument, given last): files and the tests of each in a random order. No order, no processor
# (ATEN_CPU_CAPABILITY=default, avx2) and no number of threads (OMP_NUM_THREADS) changes what passes: docs/numerics.md.
# MEGATRON_VLM_TEST_PROCESSES (default 3) test files run at a time; 0: one after the other, in one process.
set -eu
cd "$(dirname "$0")/.."
. toolkits/setup_env.sh

case ${1-} in
--fast) marks="not slow and not full" && shift ;;
--full) marks="" && shift ;;
*) marks="not full" ;;
esac

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# A failed check does not hide the ones after it.
status=0
ruff check . || status=1
ruff format --check . || status=1
mypy || status=1
# A test file in one of three processes: ranks and child processes leave half of two cores idle. In the order of tests/conftest.py:
# xdist would put the files with the fewest tests last, which take the longest.
if ! python -m pytest -n "${MEGATRON_VLM_TEST_PROCESSES:-3}" --dist loadfile --no-loadscope-reorder -m "$marks" --durations=15 "$@"; then status=1; fi
exit $status
