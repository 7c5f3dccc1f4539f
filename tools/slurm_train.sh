#!/usr/bin/env bash
# Train under Slurm. Environment: GPUS, GPUS_PER_NODE, CPUS_PER_TASK, GRES, SRUN_ARGS.
# Usage: tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [ARGUMENTS OF train.py ...]
set -euo pipefail

PARTITION=$1
JOB_NAME=$2
CONFIG=$3
WORK_DIR=$4
shift 4

GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
# Empty on a cluster without GPUs.
GRES=${GRES-gpu:$GPUS_PER_NODE}

# shellcheck disable=SC2086 - SRUN_ARGS is a list of words
srun -p "$PARTITION" --job-name="$JOB_NAME" ${GRES:+--gres="$GRES"} --ntasks="$GPUS" \
  --ntasks-per-node="$GPUS_PER_NODE" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
  ${SRUN_ARGS:-} \
  "${PYTHON:-python}" -u "$(dirname "$0")/train.py" "$CONFIG" --work-dir "$WORK_DIR" \
  --launcher slurm "$@"
