# Makes the Python environment of this checkout in .venv, or reuses it, and puts it first in PATH.
# Source it with the checkout as working directory:  . toolkits/setup_env.sh
# or run it from anywhere, and activate what it made:  sh toolkits/setup_env.sh [--prefix DIR] [--cache DIR] [--cuda]
#
#   --prefix DIR   where the environment lives (default: .venv of the checkout)
#   --cache DIR    downloads: pip's in DIR/pip, models in DIR/huggingface, which the environment's activate script sets
#   --cuda         torch for GPUs
#
#   MEGATRON_VLM_TORCH      cpu (default) or cuda: which build of torch; or any pip requirement, such as torch==2.13.0+cu130
#   MEGATRON_VLM_PIP_ARGS   more arguments for pip, such as the index that serves your CUDA build
#   MEGATRON_VLM_EXTRAS     extras of setup.py to install (default: dev)
#   MEGATRON_VLM_VENV       where the environment lives (default: .venv)
#
# The environment is made once for a given setup.py, toolkits/constraints.txt and the variables above.

# Sourced, "$@" is the caller's, so options are read only where this file is run itself.
_run=
case ${0##*/} in setup_env.sh) _run=1 ;; esac
_cache=
if [ -n "$_run" ]; then
    _usage() { sed -n '2,/^# The environment is made/s/^# \{0,1\}//p' "$0"; }
    _absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
    while [ $# -gt 0 ]; do
        case $1 in
        --prefix | --cache)
            [ $# -ge 2 ] || { echo "setup_env: $1 needs a folder" >&2; exit 1; }
            [ "$1" = --cache ] && _cache=$(_absolute "$2") || MEGATRON_VLM_VENV=$(_absolute "$2")
            shift
            ;;
        --prefix=*) MEGATRON_VLM_VENV=$(_absolute "${1#*=}") ;;
        --cache=*) _cache=$(_absolute "${1#*=}") ;;
        --cuda) MEGATRON_VLM_TORCH=cuda ;;
        -h | --help) _usage; exit 0 ;;
        *) echo "setup_env: unknown option $1; known: --prefix DIR, --cache DIR, --cuda, --help" >&2; exit 1 ;;
        esac
        shift
    done
    cd "$(dirname "$0")/.." || exit 1
fi

_venv=${MEGATRON_VLM_VENV:-.venv}
_build=${MEGATRON_VLM_TORCH:-cpu}
_key=$({ cat setup.py toolkits/constraints.txt; echo "$_build|${MEGATRON_VLM_PIP_ARGS:-}|${MEGATRON_VLM_EXTRAS:-dev}"; } | cksum)

if [ -n "$_cache" ]; then
    mkdir -p "$_cache/pip" "$_cache/huggingface" || exit 1
    PIP_CACHE_DIR=$_cache/pip
    export PIP_CACHE_DIR
fi

_find_python() {
    # A shim may be on PATH for an interpreter that is not there, and Debian's python can lack ensurepip: try each for real.
    for _python in ${PYTHON:-} python3.11 python3.12 python3; do
        if "$_python" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            echo "$_python"
            return 0
        fi
    done
    echo "setup_env: no Python 3.11 or 3.12 with venv found (looked for python3.11, python3.12, python3; or set PYTHON)" >&2
    return 1
}

_install_torch() {
    _version=$(sed -n 's/.*"torch==\([^"]*\)".*/\1/p' setup.py)
    case $_build in
    # The build is told by the local part of the version where pip's sources have it; else the plain version is taken as it is.
    cpu) _pip "torch==$_version+cpu" 2>/dev/null || _pip "torch==$_version" ;;
    cuda) _pip "torch==$_version" && "$_venv/bin/python" - <<'PY' ;;
import sys, torch
if torch.version.cuda is None:
    sys.exit(
        f"setup_env: MEGATRON_VLM_TORCH=cuda, but pip's sources gave torch {torch.__version__}, a CPU build: name the index "
        "of your CUDA build in MEGATRON_VLM_PIP_ARGS"
    )
PY
    *) _pip "$_build" ;;
    esac
}

_pip() {
    # shellcheck disable=SC2086 # the arguments are words
    "$_venv/bin/python" -m pip install -qq --disable-pip-version-check ${MEGATRON_VLM_PIP_ARGS:-} -c toolkits/constraints.txt "$@"
}

_make_env() {
    echo "setup_env: installing into $_venv (torch: $_build), once; this takes some minutes" >&2
    if [ ! -x "$_venv/bin/python" ]; then
        _python=$(_find_python) && "$_python" -m venv "$_venv" || return 1
    fi
    _install_torch && _pip -e ".[${MEGATRON_VLM_EXTRAS:-dev}]" && echo "$_key" >"$_venv/.megatron_vlm"
}

if [ "$(cat "$_venv/.megatron_vlm" 2>/dev/null)" != "$_key" ]; then
    _make_env || {
        echo "setup_env: the environment could not be made; see the lines above" >&2
        exit 1
    }
fi

PATH="$(cd "$_venv" && pwd)/bin:$PATH"
export PATH
# One thread a process: ranks, loader workers and tests share the cores, and sums keep one order.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if [ -n "$_run" ]; then
    if [ -n "$_cache" ] && ! grep -qsF "export HF_HOME=\"$_cache/huggingface\"" "$_venv/bin/activate"; then
        printf 'export HF_HOME="%s/huggingface" PIP_CACHE_DIR="%s/pip"\n' "$_cache" "$_cache" >>"$_venv/bin/activate"
    fi
    echo "setup_env: ready; activate it with:  . $_venv/bin/activate"
fi
