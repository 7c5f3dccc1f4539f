#!/usr/bin/env bash
# Train on several processes of one machine (or several: NNODES, NODE_RANK, MASTER_ADDR, PORT).
# Usage: tools/dist_train.sh CONFIG PROCESSES [ARGUMENTS OF train.py ...]
set -euo pipefail

if [ $# -lt 2 ]; then
  echo "usage: tools/dist_train.sh CONFIG PROCESSES [ARGUMENTS OF train.py ...]" >&2
  exit 2
fi
CONFIG=$1
PROCESSES=$2
shift 2

"${PYTHON:-python}" -m torch.distributed.run \
  --nnodes="${NNODES:-1}" \
  --node_rank="${NODE_RANK:-0}" \
  --master_addr="${MASTER_ADDR:-127.0.0.1}" \
  --master_port="${PORT:-29500}" \
  --nproc_per_node="$PROCESSES" \
  "$(dirname "$0")/train.py" "$CONFIG" --launcher pytorch "$@"
