#!/usr/bin/env bash
# Trains RUN on the hosts of a hostfile (lines HOST slots=N), reached by ssh and pdsh:
#     launch/pdsh.sh HOSTFILE RUN [field=value ...] [--restarts N]
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,3s/^# //p' "$0" >&2; exit 2; }
# shellcheck source=launch/env.sh
command -v est-ds >/dev/null || . "$(dirname -- "$0")/env.sh"

hostfile=$1
shift
exec est-ds train "$@" --hostfile "$hostfile"
