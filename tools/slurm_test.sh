#!/usr/bin/env bash
# Evaluate under Slurm. Environment: GPUS, GPUS_PER_NODE, CPUS_PER_TASK, GRES, SRUN_ARGS.
# Usage: tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [ARGUMENTS OF test.py ...]
set -euo pipefail

PARTITION=$1
JOB_NAME=$2
CONFIG=$3
CHECKPOINT=$4
shift 4

GPUS=${GPUS:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-8}
# Empty on a cluster without GPUs.
GRES=${GRES-gpu:$GPUS_PER_NODE}

# shellcheck disable=SC2086 - SRUN_ARGS is a list of words
srun -p "$PARTITION" --job-name="$JOB_NAME" ${GRES:+--gres="$GRES"} --ntasks="$GPUS" \
  --ntasks-per-node="$GPUS_PER_NODE" --cpus-per-task="${CPUS_PER_TASK:-5}" --kill-on-bad-exit=1 \
  ${SRUN_ARGS:-} \
  "${PYTHON:-python}" -u "$(dirname "$0")/test.py" "$CONFIG" "$CHECKPOINT" \
  --launcher slurm "$@"
