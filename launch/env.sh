# shellcheck shell=bash
# Makes the environment `.venv` of this checkout, once, and activates it.
# Sourced by the scripts beside it; bash 3.2 or newer.
#
#   PYTHON              interpreter to make it with; default: the first Python 3.10+ found
#   EST_DS_TORCH_INDEX  package index to take torch from; default: the configured one, or
#                       PyTorch's own for the CPU build where no NVIDIA GPU is visible
#
# Two files in .venv say what it is worth. est_ds.installing exists while packages are being
# written: found by a later start, it means an interrupted install, which is cleared.
# est_ds.stamp is written last and holds the Python version, the checkout's path (an environment
# cannot be moved) and the hash of the pins: when it matches, nothing is installed.

EST_DS_ROOT=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
EST_DS_VENV=$EST_DS_ROOT/.venv
export EST_DS_ROOT

# One error: what is wrong, then, on lines of their own, what to do.
est_ds_error() {
    printf 'env: error: %s\n' "$1" >&2
    shift
    [ $# -eq 0 ] || printf '  %s\n' "$@" >&2
}

est_ds_has_gpu() {
    command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 </dev/null
}

# The pin of a package as `name==version`; for those that are installed on their own.
est_ds_pin() {
    sed -n "s/^\($1==[^; ]*\).*/\1/p" "$EST_DS_ROOT/launch/requirements.txt"
}

est_ds_python_version() {
    "$1" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null </dev/null
}

# Prints the interpreter to make the environment with.
est_ds_find_python() {
    local candidate candidates too_old='' no_venv=''
    candidates=(python3 python3.13 python3.12 python3.11 python3.10 python)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        if ! "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
            >/dev/null 2>&1 </dev/null; then
            too_old=$candidate
        elif ! "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1 </dev/null; then
            no_venv=$candidate
        else
            printf '%s\n' "$candidate"
            return 0
        fi
    done
    if [ -n "$no_venv" ]; then
        est_ds_error "$no_venv lacks the venv module;" \
            "install it (Debian, Ubuntu: apt install python3-venv)" \
            "or name another Python 3.10+: PYTHON=/path/to/python3 $0"
    elif [ -n "${PYTHON:-}" ]; then
        est_ds_error "PYTHON=$PYTHON is not a Python 3.10 or newer;" \
            "name one that is, or unset PYTHON."
    else
        est_ds_error "no Python 3.10+ found${too_old:+ ($too_old is older or does not start)};" \
            "install one (Debian, Ubuntu: apt install python3 python3-venv)" \
            "or name it: PYTHON=/path/to/python3 $0"
    fi
    return 1
}

# The first three lines that the stamp must have; nothing if .venv has no working Python 3.10+.
est_ds_wanted_stamp() {
    [ -x "$EST_DS_VENV/bin/python" ] || return 0
    "$EST_DS_VENV/bin/python" -I - "$EST_DS_ROOT" 2>/dev/null <<'PY' || true
import hashlib, pathlib, sys
assert sys.version_info >= (3, 10)
root = pathlib.Path(sys.argv[1])
pins = b"".join((root / name).read_bytes() for name in ("launch/requirements.txt", "setup.py"))
print("python %d.%d" % sys.version_info[:2])
print("root", root)
print("pins", hashlib.sha256(pins).hexdigest())
PY
}

est_ds_is_complete() {
    local wanted
    [ -f "$EST_DS_VENV/est_ds.stamp" ] || return 1
    [ ! -e "$EST_DS_VENV/est_ds.installing" ] || return 1
    wanted=$(est_ds_wanted_stamp)
    [ -n "$wanted" ] && [ "$wanted" = "$(head -n 3 "$EST_DS_VENV/est_ds.stamp")" ]
}

# True when .venv cannot be built upon: torn, moved, of another Python, or not there.
est_ds_must_clear() {
    local wanted
    [ ! -e "$EST_DS_VENV/est_ds.installing" ] || return 0
    wanted=$(est_ds_wanted_stamp)
    [ -n "$wanted" ] || return 0
    [ -f "$EST_DS_VENV/est_ds.stamp" ] || return 1
    [ "$(printf '%s\n' "$wanted" | head -n 2)" != "$(head -n 2 "$EST_DS_VENV/est_ds.stamp")" ]
}

# Makes .venv an empty environment. What this file did not make is not removed.
est_ds_clear() {
    local python
    if [ ! -e "$EST_DS_VENV/est_ds.installing" ] && [ ! -e "$EST_DS_VENV/est_ds.stamp" ] &&
        [ -n "$(find "$EST_DS_VENV/" -mindepth 1 -maxdepth 1 ! -name est_ds.lock)" ]; then
        est_ds_error "$EST_DS_VENV was not made here and holds no Python 3.10+ that starts;" \
            "move it away and start again."
        return 1
    fi
    python=$(est_ds_find_python) || return 1
    [ ! -e "$EST_DS_VENV/est_ds.installing" ] ||
        echo "env: the last install was interrupted; starting afresh"
    echo "env: making .venv with Python $(est_ds_python_version "$python")"
    touch "$EST_DS_VENV/est_ds.installing" || return 1
    find "$EST_DS_VENV/" -mindepth 1 -maxdepth 1 \
        ! -name est_ds.lock ! -name est_ds.installing -exec rm -rf {} + || return 1
    "$python" -m venv "$EST_DS_VENV" >"$EST_DS_VENV/install.log" 2>&1 </dev/null
}

# pip install; its words go to the log, whose end is shown if the install fails. A pip that gives
# up by itself (code 1) leaves what a later one can finish; one that is killed leaves the mark.
est_ds_pip() {
    local code=0
    touch "$EST_DS_VENV/est_ds.installing" || return 1
    PIP_USER=0 PIP_NO_INPUT=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
        "$EST_DS_VENV/bin/python" -I -m pip install "$@" \
        >>"$EST_DS_VENV/install.log" 2>&1 </dev/null || code=$?
    [ "$code" -ne 1 ] || rm -f "$EST_DS_VENV/est_ds.installing"
    return "$code"
}

est_ds_install_torch() {
    local pin
    pin=$(est_ds_pin torch)
    if [ -n "${EST_DS_TORCH_INDEX:-}" ]; then
        echo "env: installing $pin from $EST_DS_TORCH_INDEX"
        est_ds_pip --index-url "$EST_DS_TORCH_INDEX" "$pin"
        return
    fi
    if [ "$(uname -s)" = Linux ] && ! est_ds_has_gpu; then
        echo "env: installing $pin (CPU build: no NVIDIA GPU is visible)"
        est_ds_pip "$pin+cpu" && return
        est_ds_pip --index-url https://download.pytorch.org/whl/cpu \
            --timeout 10 --retries 1 "$pin" && return
        echo "env: no CPU build of torch can be had; installing the default build, which is larger"
    else
        echo "env: installing $pin"
    fi
    est_ds_pip "$pin"
}

# Repairs scripts, imports what was installed, and writes the stamp's line on torch.
est_ds_check() {
    "$EST_DS_VENV/bin/python" -I - "$EST_DS_VENV" >>"$EST_DS_VENV/install.log" 2>&1 <<'PY'
import pathlib, sys

# pip puts "#!/path with a space/python" into scripts that a package brings ready-made (deepspeed,
# ds). No kernel runs that, nor a longer line than 127 bytes. The head below is shell and Python.
venv = pathlib.Path(sys.argv[1])
python = venv / "bin" / "python"
head = f"""#!/bin/sh
'''exec' "{python}" "$0" "$@"
' '''
"""
for script in (venv / "bin").iterdir():
    if script.is_symlink() or not script.is_file():
        continue
    first, _, rest = script.read_bytes().partition(b"\n")
    if first.startswith(b"#!" + bytes(venv)) and (b" " in bytes(venv) or len(first) > 127):
        script.write_bytes(head.encode() + rest)

import deepspeed, est_ds, torch, transformers

is_gpu_build = torch.version.cuda or getattr(torch.version, "hip", None)
(venv / "est_ds.torch").write_text(f"torch {'gpu' if is_gpu_build else 'cpu'}\n")
PY
}

est_ds_install() {
    local started=$SECONDS
    if est_ds_must_clear; then
        est_ds_clear || return 1
    fi
    rm -f "$EST_DS_VENV/est_ds.stamp"
    : >"$EST_DS_VENV/install.log"
    est_ds_pip "$(est_ds_pin setuptools)" || return 1
    est_ds_install_torch || return 1
    # DeepSpeed has no wheel: its build imports torch, so it must see this environment.
    echo "env: installing $(est_ds_pin deepspeed)"
    est_ds_pip --use-pep517 --no-build-isolation --no-deps "$(est_ds_pin deepspeed)" || return 1
    echo "env: installing the other packages and est_ds"
    est_ds_pip --use-pep517 --no-build-isolation -e '.[test,s3]' || return 1
    echo "env: checking"
    est_ds_check || return 1
    {
        est_ds_wanted_stamp
        cat "$EST_DS_VENV/est_ds.torch"
        echo "index ${EST_DS_TORCH_INDEX:-}"
    } >"$EST_DS_VENV/est_ds.stamp.new" || return 1
    rm -f "$EST_DS_VENV/est_ds.torch" "$EST_DS_VENV/est_ds.installing"
    mv "$EST_DS_VENV/est_ds.stamp.new" "$EST_DS_VENV/est_ds.stamp" || return 1
    echo "env: ready after $((SECONDS - started)) s"
}

# Installs in a shell of its own, one start at a time: descriptor 9 holds a lock that ends with
# the last process of the install, however it ends. (macOS has no flock command; Python has.)
est_ds_install_locked() {
    local python
    python=$(est_ds_find_python) || return 1
    mkdir -p "$EST_DS_VENV" || return 1
    (
        trap 'exit 130' INT
        cd "$EST_DS_ROOT" || exit 1
        "$python" -I - <<'PY' || exit 1
import fcntl
try:
    fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    print("env: another start is installing; waiting for it", flush=True)
    fcntl.flock(9, fcntl.LOCK_EX)
except OSError:
    print("env: note: this file system has no locks; start only one install at a time")
PY
        est_ds_is_complete && exit 0
        est_ds_install && exit 0
        if [ -s "$EST_DS_VENV/install.log" ]; then
            tail -n 20 "$EST_DS_VENV/install.log" >&2
            est_ds_error "the install failed; above is the end of $EST_DS_VENV/install.log" \
                "Remove the cause (network, disk space, PYTHON) and start again."
        fi
        exit 1
    ) 9>"$EST_DS_VENV/est_ds.lock"
}

# A setting that a complete environment cannot follow is an error or a note, never passed over.
est_ds_check_settings() {
    local asked held stamp=$EST_DS_VENV/est_ds.stamp again="remove $EST_DS_VENV and start again"
    [ -f "$stamp" ] || return 0
    if [ -n "${PYTHON:-}" ]; then
        asked=$(est_ds_python_version "$PYTHON") || asked='none'
        held=$(sed -n 's/^python //p' "$stamp")
        if [ "$asked" != "$held" ]; then
            est_ds_error "PYTHON=$PYTHON is Python $asked, but .venv holds Python $held;" \
                "unset PYTHON, or $again."
            return 1
        fi
    fi
    if [ -n "${EST_DS_TORCH_INDEX:-}" ] && ! grep -qxF "index $EST_DS_TORCH_INDEX" "$stamp"; then
        echo "env: note: .venv holds a torch from elsewhere than EST_DS_TORCH_INDEX;" \
            "to take it from there, $again" >&2
    fi
    if grep -qx 'torch cpu' "$stamp" && est_ds_has_gpu; then
        echo "env: note: an NVIDIA GPU is visible, but .venv holds the CPU build of torch;" \
            "to train on the GPU, $again" >&2
    fi
}

est_ds_env() {
    est_ds_check_settings || return 1
    est_ds_is_complete || est_ds_install_locked || return 1
    unset PYTHONHOME
    export VIRTUAL_ENV=$EST_DS_VENV PATH=$EST_DS_VENV/bin:$PATH
}

est_ds_env
