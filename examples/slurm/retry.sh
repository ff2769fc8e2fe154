#!/bin/sh
# Submits a training script several times, each on other machines and only if the one before did not finish: preempted, out of time, or failed.
#   sh examples/slurm/retry.sh examples/finetune_idefics2.sh "--nodes 4 --constraint h100" "--nodes 2 --constraint a100"
# Each goes on from the last checkpoint in OUTPUT, which any number of ranks and any layout loads; BATCH_SIZE has to divide over every choice.
# MODEL, DATA, OUTPUT ... come from the environment, `section.key=value` from ARGS. `scancel` of a waiting job ends the chain there.
set -eu

[ $# -ge 2 ] || { echo "retry.sh: name a script of examples/, then the options of sbatch, a word for each job" >&2; exit 1; }
script=$1 after=
shift
for options in "$@"; do
    # shellcheck disable=SC2086 # several words each
    id=$(sbatch --parsable $after $options "$(dirname "$0")/train.sbatch" "$script" ${ARGS:-})
    id=${id%%;*} # of a federation it names the cluster too
    echo "job $id: $options${after:+, $after}"
    after="--dependency=afternotok:$id --kill-on-invalid-dep=yes"
done
