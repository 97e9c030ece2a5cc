#!/usr/bin/env bash
# Trains RUN on this node, one of several that each start this script; no ssh is used:
#     NODE_RANK=0 NNODES=2 MASTER_ADDR=node0 launch/node.sh RUN [field=value ...]
# Slurm, OpenMPI and a Kubernetes Job with an index say rank and number themselves. MASTER_ADDR is
# node 0's address, MASTER_PORT (29500) a port that is free there.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
# shellcheck source=launch/env.sh
command -v est-ds >/dev/null || . "$(dirname -- "$0")/env.sh"

rank=${NODE_RANK:-${SLURM_NODEID:-${OMPI_COMM_WORLD_RANK:-${JOB_COMPLETION_INDEX:-}}}}
nodes=${NNODES:-${SLURM_JOB_NUM_NODES:-${OMPI_COMM_WORLD_SIZE:-}}}
for name in rank:NODE_RANK nodes:NNODES MASTER_ADDR:MASTER_ADDR; do
    value=${name%%:*}
    [ -n "${!value:-}" ] || { echo "node: error: set ${name#*:}, as in: $(sed -n '3s/^# *//p' "$0")" >&2; exit 2; }
done
exec est-ds train "$@" --nodes "$nodes" --node-rank "$rank" \
    --master "$MASTER_ADDR:${MASTER_PORT:-29500}"
