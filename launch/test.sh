#!/usr/bin/env bash
# The fast tests, two at a time, on the CPU if there is no GPU. Arguments go to pytest instead:
#     launch/test.sh tests/test_launch.py     one file (paths are seen from the checkout)
#     launch/test.sh -m slow                  the slow tests, which .pytest.ini leaves out
set -euo pipefail
{ : <&0; } 2>/dev/null || exec </dev/null

. "$(dirname -- "${BASH_SOURCE[0]}")/env.sh"
cd "$EST_DS_ROOT"

# Tests start several processes each: one thread a process, or they take the cores from one another.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
unset PYTHONDONTWRITEBYTECODE # images set it: then every process compiles est_ds anew
est_ds_has_gpu || export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}
# A test waits for much of its time; those that share a training stand in one file.
[ $# -gt 0 ] || set -- --numprocesses 2 --dist loadfile --no-loadscope-reorder
exec python -m pytest -q "$@"
