#!/usr/bin/env bash
# Trains RUN on the hosts of a hostfile (lines HOST slots=N, every N the same), started by mpirun:
#     launch/openmpi.sh HOSTFILE RUN [field=value ...]
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
folder=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd -P)
# shellcheck source=launch/env.sh
command -v est-ds >/dev/null || . "$folder/env.sh"

hostfile=$1
shift
found=$(python -m est_ds.launch.hosts "$hostfile")
read -r slots nodes MASTER_ADDR <<<"$found"
export MASTER_ADDR NNODES=$nodes
travelling=()
for name in $(python -m est_ds.launch.hosts) MASTER_ADDR NNODES ${MASTER_PORT:+MASTER_PORT}; do
    travelling+=(-x "$name")
done

# One node.sh a host starts the training processes. mpirun passes SIGUSR1 on to it; of SIGTERM it
# would make a SIGKILL within a second.
mpirun --hostfile "$hostfile" --map-by ppr:1:node --bind-to none "${travelling[@]}" \
    "$folder/node.sh" "$@" --processes "$slots" &
trap 'kill -USR1 $! || true' TERM USR1
# A signal ends `wait`, not what it waits for.
while kill -0 $! 2>/dev/null; do wait $! || true; done
wait $!
