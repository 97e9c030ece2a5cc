"""Hosts of a run: the hostfile, and the environment that must travel to them."""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from est_ds.errors import UserError, is_secret
from est_ds.ranks.meeting import own_address
from est_ds.ranks.world import PORT

LINE = re.compile(r"(\S+)\s+slots=([1-9]\d{0,5})")
TRAVELLING = (
    "NCCL_",
    "PYTHON",
    "UCX_",
    "PATH",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "VIRTUAL_ENV",
    "CUDA_HOME",
    "CUDA_DEVICE_ORDER",
    "HF_",
    "TRANSFORMERS_",
    "TOKENIZERS_",
    "XDG_CACHE_HOME",
    "TORCH",
    "TRITON_",
    "PYTORCH_",
    "OMP_",
    "MKL_",
    "GLOO_",
    "FI_",
    "DS_ACCELERATOR",
    "DEEPSPEED_",
    "EST_DS_",
    "AWS_",
    "FSSPEC_",
    "GOOGLE_",
    "WANDB_",
    "COMET_",
    "MLFLOW_",
    "TRACKIO_",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
)
STAYING = ("EST_DS_STARTER", "DEEPSPEED_ENV", "TORCHELASTIC")


def read_hostfile(path: str) -> dict[str, int]:
    """Processes of every host, in order; the first host has rank 0.

    Raises:
        UserError: the file is missing, or a line is not `HOST slots=N`.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as e:
        # DeepSpeed would train on this machine alone.
        raise UserError(f"--hostfile {path!r} cannot be read ({e.strerror}); check it.") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = LINE.fullmatch(text)
        if not match:
            raise UserError(
                f"--hostfile {path}, line {number}: {text!r} is not `HOST slots=N` (N processes, "
                f"one a GPU); correct it."
            )
        if match[1] in slots:
            raise UserError(f"--hostfile {path}, line {number}: {match[1]} stands twice; keep one.")
        slots[match[1]] = int(match[2])
    if not slots:
        raise UserError(f"--hostfile {path} names no host; write lines `HOST slots=N` into it.")
    return slots


def write_hostfile(path: Path, slots: Mapping[str, int]) -> None:
    path.write_text("".join(f"{host} slots={n}\n" for host, n in slots.items()))


def split_address(address: str) -> tuple[str, int]:
    """HOST or HOST:PORT as host and port.

    Raises:
        UserError: it is neither.
    """
    host, colon, port = address.rpartition(":")
    if not colon:
        return address, PORT
    if not host or not port.isdecimal() or len(port) > 5 or not 0 < int(port) < 65536:
        raise UserError(f"--master {address!r}: write HOST or HOST:PORT, as in node0:{PORT}.")
    return host, int(port)


def address_of(hosts: list[str]) -> str | None:
    """An address at which the others reach the first host; None if it is not to be known here."""
    try:
        address = socket.gethostbyname(hosts[0])
    except OSError:
        return None
    if not address.startswith("127.") or len(hosts) == 1:
        return address
    # Its own name is on the loopback (Debian, Ubuntu): this is the first host.
    return own_address(hosts[1])


def travelling(environment: Mapping[str, str]) -> dict[str, str]:
    """What of the environment the hosts need, by name.

    Secrets stay here: they would show in every host's list of processes.
    """
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(TRAVELLING)
        and not name.startswith(STAYING)
        and not is_secret(name, value)
        and "\n" not in value
    }


def write_environment(path: Path, environment: Mapping[str, str], users: list[Path]) -> None:
    """Writes a `.deepspeed_env` for DeepSpeed's launcher.

    Args:
        environment: of this process; what travels is chosen from it.
        users: the user's own such files, whose lines win. DeepSpeed fails on their comments and
            blank lines, which are left out.
    """
    sent = travelling(environment)
    for file in users:
        for line in file.read_text().splitlines() if file.is_file() else []:
            name, equals, value = line.strip().removeprefix("export ").partition("=")
            if equals and not name.startswith("#"):
                sent[name.strip()] = value.strip()
    path.write_text("".join(f"{name}={_in_quotes(value)}\n" for name, value in sent.items()))
    path.chmod(0o600)


def _in_quotes(text: str) -> str:
    """For DeepSpeed, which puts double quotes around it and gives it to a shell."""
    return re.sub(r'([\\"$`])', r"\\\1", text)


def through_ssh(argument: str) -> str:
    """An argument as DeepSpeed's pdsh launcher must get it.

    With a space in it DeepSpeed puts it in double quotes, and escapes only those in it; without,
    it goes to the remote shell as it is.
    """
    if " " in argument:
        return re.sub(r"([\\$`])", r"\\\1", argument)
    return shlex.quote(argument)


def _main() -> None:
    """For launch/openmpi.sh: `SLOTS NODES FIRST-HOST` of a hostfile; else the travelling names."""
    if len(sys.argv) < 2:
        print(*travelling(os.environ))
        return
    try:
        slots = read_hostfile(sys.argv[1])
        if len(set(slots.values())) > 1:
            raise UserError(
                f"{sys.argv[1]}: mpirun needs the same slots=N on every host; give all the same."
            )
    except UserError as e:
        print(f"est-ds: error: {e}", file=sys.stderr)
        sys.exit(2)
    print(next(iter(slots.values())), len(slots), next(iter(slots)))


if __name__ == "__main__":
    _main()
