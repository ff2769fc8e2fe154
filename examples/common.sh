# Shared by the training scripts of this folder: settings from the environment, the model where it must be made, torchrun.
#
#   MODEL                  an HF directory or hub id, Megatron weights, or a training checkpoint (--finetune is then added)
#   LLM, VISION            instead of MODEL where a script says so: the parts to assemble a new model from
#   PROJECTOR              a trained connector for them: a folder, a whole model, or a .pth
#   DATA, VAL_DATA         folders that `megatron-vlm data build` wrote, separated by commas
#   OUTPUT                 where checkpoints and logs go; on several nodes, a file system that all of them see
#   GPUS                   ranks on this node (default: its GPUs)
#   BATCH_SIZE             rows (samples where packing is off) of one update over all ranks (default: the recipe's)
#   PER_DEVICE_BATCH_SIZE  1: one packed row at a time; above 1: packing off, that many samples at a time (default: the recipe's)
#   PACKING                1: packed rows where the recipe takes samples one at a time
#   TP, PP                 tensor and pipeline parallel size (default: TP the largest of 4, 2, 1 that GPUS allows, PP 1)
#   CP                     context parallel ranks that a row lies over (default: the recipe's, else 1)
#   NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, GPUS_PER_NODE   several nodes: run the script on each
#   DEVICE                 cpu or cuda (default: what is there)
#   TORCHRUN               another torchrun than megatron_vlm.launch.agent, which is torchrun with a quiet end
#   SHUTDOWN_TIMEOUT       seconds that a run may take to save after SIGTERM or SIGUSR1 (default: 120)
#
# `~` and environment variables in paths are expanded, as `megatron-vlm` does. A run whose OUTPUT already holds a checkpoint goes on
# from it; with RESUME=0 it starts anew, once the checkpoints there are removed. Arguments are passed on to `megatron-vlm train`.

ROOT=${ROOT:-$(cd "$(dirname "$0")/.." && pwd)}
[ ! -x "$ROOT/.venv/bin/python" ] || PATH="$ROOT/.venv/bin:$PATH"

die() {
    echo "${0##*/}: $*" >&2
    exit 1
}

# require NAME "what it is" ...: stops at the first variable that is not set.
require() {
    while [ $# -gt 0 ]; do
        eval "[ -n \"\${$1:-}\" ]" || die "$1 is not set: $2"
        shift 2
    done
}

# expand NAME ...: `~` and variables in the paths that these hold, as `megatron-vlm` reads them.
expand() {
    for name in "$@"; do
        eval "value=\${$name:-}"
        case $value in
        "~"* | *\$*)
            value=$(PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" python -c 'import sys
from megatron_vlm.errors import ConfigError
from megatron_vlm.files import expand_text
try:
    print(expand_text(sys.argv[2], sys.argv[1]))
except ConfigError as error:
    sys.exit(str(error))' "$name" "$value") || die "correct $name"
            eval "$name=\$value"
            ;;
        esac
    done
}

# listed FOLDERS: a YAML list of folders that commas separate, whatever their names are.
listed() {
    printf '%s' "$1" | sed 's/[\\"]/\\&/g; s/,/", "/g; s/^/["/; s/$/"]/'
}

# holds_checkpoints FOLDER: whether `--load FOLDER` would be read as training checkpoints.
holds_checkpoints() {
    [ -d "$1" ] || return 1
    found=$(PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" python -c 'import sys
from pathlib import Path
from megatron_vlm.weights.checkpoint_dir import holds_checkpoints
print(holds_checkpoints(Path(sys.argv[1])))' "$1") || die "cannot look for checkpoints in $1"
    [ "$found" = True ]
}

# recipe_says RECIPE KEY: a number of the recipe's section training.
recipe_says() {
    [ ! -f "$ROOT/examples/$1" ] || sed -n "s/^  $2: *\([0-9][0-9]*\).*/\1/p" "$ROOT/examples/$1"
}

count_gpus() {
    nvidia-smi -L 2>/dev/null | grep -c . || true
}

# settings [RECIPE]: fills in defaults, the batch as the recipe says; derives the accumulation, prints everything.
settings() {
    expand MODEL LLM VISION PROJECTOR OUTPUT
    GPUS_PER_NODE=${GPUS_PER_NODE:-${GPUS:-$(count_gpus)}}
    [ "$GPUS_PER_NODE" -gt 0 ] || die "GPUS is not set, and no GPU was found: set GPUS to the number of ranks on this node"
    NNODES=${NNODES:-1} NODE_RANK=${NODE_RANK:-0} MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-29500}
    CP=${CP:-$(recipe_says "${1:-}" context_parallel_size)}
    CP=${CP:-1}
    if [ -z "${TP:-}" ]; then
        for TP in 4 2 1; do [ $((GPUS_PER_NODE % TP + GPUS_PER_NODE * NNODES % (TP * CP))) -ne 0 ] || break; done
    fi
    RECIPE_DEVICE_BATCH_SIZE=$(recipe_says "${1:-}" micro_batch_size)
    RECIPE_DEVICE_BATCH_SIZE=${RECIPE_DEVICE_BATCH_SIZE:-1}
    [ "${PACKING:-0}" != 1 ] || PER_DEVICE_BATCH_SIZE=1
    PP=${PP:-1} PER_DEVICE_BATCH_SIZE=${PER_DEVICE_BATCH_SIZE:-$RECIPE_DEVICE_BATCH_SIZE}
    world=$((NNODES * GPUS_PER_NODE))
    [ $((world % (TP * CP * PP))) -eq 0 ] || die "$NNODES x $GPUS_PER_NODE ranks do not divide into TP $TP x PP $PP x CP $CP"
    dp=$((world / (TP * CP * PP)))
    BATCH_SIZE=${BATCH_SIZE:-$(recipe_says "${1:-}" global_batch_size)}
    BATCH_SIZE=${BATCH_SIZE:-$((dp * PER_DEVICE_BATCH_SIZE))}
    [ $((BATCH_SIZE % (dp * PER_DEVICE_BATCH_SIZE))) -eq 0 ] ||
        die "BATCH_SIZE $BATCH_SIZE is not a multiple of $dp data parallel ranks x PER_DEVICE_BATCH_SIZE $PER_DEVICE_BATCH_SIZE"
    for name in MODEL LLM VISION PROJECTOR DATA VAL_DATA OUTPUT DEVICE GPUS_PER_NODE NNODES NODE_RANK MASTER_ADDR MASTER_PORT TP CP PP \
        PER_DEVICE_BATCH_SIZE BATCH_SIZE; do
        eval "value=\${$name:-}"
        [ -z "$value" ] || echo "$name=$value"
    done
    echo "data parallel ranks: $dp, accumulation: $((BATCH_SIZE / dp / PER_DEVICE_BATCH_SIZE))"
}

# assemble FAMILY: makes MODEL out of LLM and VISION, once, on the first node; the others wait for it.
assemble() {
    MODEL=$OUTPUT/assembled
    if [ "$NODE_RANK" -eq 0 ] && [ ! -f "$MODEL/megatron.json" ]; then
        "$ROOT/toolkits/convert" hf2mg --family "$1" --llm "$LLM" --vision "$VISION" ${PROJECTOR:+--projector "$PROJECTOR"} \
            --tp "$TP" --pp "$PP" --out "$MODEL"
    fi
    waited=0
    while [ ! -f "$MODEL/megatron.json" ]; do
        [ $waited -lt 7200 ] || die "node 0 did not write $MODEL in 2 hours: is OUTPUT on a file system that all nodes see?"
        sleep 2
        waited=$((waited + 2))
    done
}

# train CONFIG ARGS...: runs megatron-vlm on this node's ranks.
train() {
    config=$1
    shift
    set -- "training.global_batch_size=$BATCH_SIZE" "parallel.tensor_model_parallel_size=$TP" \
        "parallel.pipeline_model_parallel_size=$PP" "parallel.context_parallel_size=$CP" "$@"
    [ "$TP" -eq 1 ] || set -- parallel.sequence_parallel=true "$@"
    if [ "$PER_DEVICE_BATCH_SIZE" -gt 1 ]; then
        set -- data.packing=false "training.micro_batch_size=$PER_DEVICE_BATCH_SIZE" "$@"
    elif [ "${PACKING:-0}" = 1 ] || [ "$RECIPE_DEVICE_BATCH_SIZE" -gt 1 ]; then
        set -- data.packing=true data.group_by=null training.micro_batch_size=1 "$@"
    fi
    [ -z "${DATA:-}" ] || set -- "data.train=$(listed "$DATA")" "$@"
    [ -z "${VAL_DATA:-}" ] || set -- "data.valid=$(listed "$VAL_DATA")" "$@"
    [ -z "${DEVICE:-}" ] || set -- "training.device=$DEVICE" "$@"
    if [ "${RESUME:-1}" != 0 ] && holds_checkpoints "$OUTPUT"; then
        echo "going on from the checkpoint in $OUTPUT"
        set -- --load "$OUTPUT" "$@"
    else
        set -- --load "$MODEL" "$@"
        # A training checkpoint of an earlier stage gives its weights alone: counters, schedule and data start anew.
        if holds_checkpoints "$MODEL"; then
            set -- checkpoint.finetune=true "$@"
        fi
    fi
    # Sequence parallel overlap wants launches in order on older GPUs. A stopped run needs longer than torchrun's 30 seconds
    # to finish its step and save.
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
    # shellcheck disable=SC2086 # a command of several words
    PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" exec ${TORCHRUN:-python -m megatron_vlm.launch.agent} --nnodes "$NNODES" --node-rank "$NODE_RANK" \
        --nproc-per-node "$GPUS_PER_NODE" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT" \
        --shutdown-timeout "${SHUTDOWN_TIMEOUT:-120}" \
        -m megatron_vlm train --config "$ROOT/examples/$config" --save "$OUTPUT" "$@"
}
