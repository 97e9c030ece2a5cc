"""Commands on many hosts at once, by pdsh and ssh; each is bounded in time."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping

SSH_OPTIONS = "-oBatchMode=yes -oConnectTimeout=15 -oServerAliveInterval=15 -oServerAliveCountMax=4"
HERE = "est-ds-is-here"
# In /proc/PID/status, of a process that has a handler for signal 10: bit 9 of a hex number.
CATCHES_USR1 = "^SigCgt:.*[2367abef]..$"


def with_ssh_options(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which pdsh uses ssh without asking for anything."""
    appended = f"{SSH_OPTIONS} {environment.get('PDSH_SSH_ARGS_APPEND', '')}".strip()
    return {**environment, "PDSH_RCMD_TYPE": "ssh", "PDSH_SSH_ARGS_APPEND": appended}


def on_hosts(hosts: Iterable[str], command: str) -> str:
    """Runs a command on every host; returns their output, in lines `HOST: TEXT`.

    A host that cannot be reached within 10 s is passed over.
    """
    done = subprocess.run(
        ["pdsh", "-t", "5", "-u", "10", "-f", "1024", "-w", ",".join(hosts), command],
        env=with_ssh_options(os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    return done.stdout


def answering(hosts: Iterable[str]) -> list[str]:
    """The hosts that run a command now, in the given order."""
    hosts = list(hosts)
    lines = on_hosts(hosts, f"echo {HERE}").splitlines()
    return [host for host in hosts if f"{host}: {HERE}" in lines]


def notify(hosts: Iterable[str], start: str) -> None:
    """Sends a notice of pre-emption to the training processes of a start.

    One that does not heed it yet is left out: it would die of it.
    """
    on_hosts(
        hosts,
        f"for p in $(pgrep -f '[-]m est_ds[.]cli .*start[=]{start}'); do "
        f"grep -q '{CATCHES_USR1}' /proc/$p/status && kill -USR1 $p; done",
    )


def kill(hosts: Iterable[str], start: str) -> None:
    """Kills all processes of a start."""
    on_hosts(hosts, f"pkill -KILL -f 'start[=]{start}'")
