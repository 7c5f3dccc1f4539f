#!/usr/bin/env bash
# Evaluate on several processes of one machine (or several: NNODES, NODE_RANK, MASTER_ADDR, PORT).
# Usage: tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [ARGUMENTS OF test.py ...]
set -euo pipefail

if [ $# -lt 3 ]; then
  echo "usage: tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [ARGUMENTS OF test.py ...]" >&2
  exit 2
fi
CONFIG=$1
CHECKPOINT=$2
PROCESSES=$3
shift 3

"${PYTHON:-python}" -m torch.distributed.run \
  --nnodes="${NNODES:-1}" \
  --node_rank="${NODE_RANK:-0}" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" \
  --master_port="${PORT:-29500}" \
  --nproc_per_node="$PROCESSES" \
  "$(dirname "$0")/test.py" "$CONFIG" "$CHECKPOINT" --launcher pytorch "$@"
