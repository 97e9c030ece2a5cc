"""Where the processes of a run are started: here, on one node of several, or on hosts over ssh."""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import shutil
import socket
import sys
from argparse import Namespace
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from est_ds.config.run_config import RunConfig
from est_ds.errors import UserError
from est_ds.launch import hosts
from est_ds.ranks.world import PORT


@dataclass(frozen=True)
class Launch:
    """Where the processes of a run are started.

    Attributes:
        slots: processes of every node.
        master: address and port of rank 0; an address of None is left to DeepSpeed.
        devices: numbers of the GPUs to use on this node; None: the first ones.
        node_rank: this node, when every node is started by itself; None when this process starts
            all.
        by_ssh: whether the nodes are other hosts.
        name: of this one start; it stands on the command line of every process.
        module: what every process runs.
    """

    slots: dict[str, int]
    master: tuple[str | None, int]
    devices: tuple[int, ...] | None = None
    node_rank: int | None = None
    by_ssh: bool = False
    name: str = field(default_factory=lambda: secrets.token_hex(4))
    module: str = "est_ds.cli"

    @property
    def processes(self) -> int:
        return sum(self.slots.values())

    @property
    def is_first(self) -> bool:
        """Whether this is the only or the first `est-ds` of the run."""
        return not self.node_rank

    def again(self, slots: dict[str, int]) -> Launch:
        """Another start on `slots`, which are this one's or fewer."""
        address, port = self.master
        if self.by_ssh and next(iter(slots)) != next(iter(self.slots)):
            address = hosts.address_of(list(slots))
        elif not self.by_ssh and self.node_rank is None:
            port = free_port()
        master, name = (address, port), secrets.token_hex(4)
        return replace(self, slots=slots, master=master, name=name)

    def command(self, arguments: list[str], folder: Path) -> list[str]:
        """The command line of DeepSpeed's launcher; `folder` is for files that it reads."""
        arguments = [*arguments, f"--start={self.name}"]
        address, port = self.master
        always = ["--log_level=critical", "--no_local_rank", "--module", self.module]
        if not self.by_ssh:
            # Its part for one node, which the other would start, three seconds later.
            return [
                *(sys.executable, "-u", "-m", "deepspeed.launcher.launch"),
                f"--world_info={self._world_info()}",
                f"--node_rank={self.node_rank or 0}",
                f"--master_addr={address}",
                f"--master_port={port}",
                *always,
                *arguments,
            ]
        hostfile = folder / "hostfile"
        hosts.write_hostfile(hostfile, self.slots)
        return [
            *(sys.executable, "-m", "deepspeed.launcher.runner"),
            f"--hostfile={hostfile}",
            *("--force_multi", "--launcher=pdsh", "--no_ssh_check"),
            *((f"--master_addr={address}",) if address else ()),
            f"--master_port={port}",
            *always,
            *map(hosts.through_ssh, arguments),
        ]

    def _world_info(self) -> str:
        """Numbers of the processes' devices by node, as the launcher of a node takes them."""
        devices = {node: list(range(slots)) for node, slots in self.slots.items()}
        if self.devices:
            devices[list(devices)[self.node_rank or 0]] = list(self.devices)
        return base64.urlsafe_b64encode(json.dumps(devices).encode()).decode()


def where_to(config: RunConfig, given: Namespace) -> Launch:
    """What the command line asks for: `hostfile`, `nodes`, `node_rank`, `master`, `processes`.

    Raises:
        UserError: it does not fit itself, or this machine.
    """
    if given.hostfile is not None:
        for name in ("nodes", "node_rank", "processes"):
            if getattr(given, name) is not None:
                raise UserError(
                    f"--{name.replace('_', '-')} with --hostfile: the hostfile says which hosts "
                    f"and how many processes (slots); leave one of the two out."
                )
        return over_ssh(given.hostfile, given.master)
    if given.nodes is not None:
        return one_node(config, given.nodes, given.node_rank, given.master, given.processes)
    if given.node_rank is not None or given.master is not None:
        raise UserError(
            "--node-rank needs --nodes (the number of nodes), and --master needs --nodes or "
            "--hostfile; add that, or leave it out to start on this machine alone."
        )
    return this_machine(config, given.processes)


def this_machine(config: RunConfig, processes: int | None) -> Launch:
    """Processes on this machine alone.

    Raises:
        UserError: there are too few GPUs.
    """
    processes = processes or default_processes(config)
    check_processes(processes)
    slots = {"localhost": processes}
    return Launch(slots, ("127.0.0.1", free_port()), _devices(processes))


def one_node(
    config: RunConfig, nodes: int, node_rank: int | None, master: str | None, processes: int | None
) -> Launch:
    """This node of several that are each started by themselves.

    Args:
        processes: of every node.

    Raises:
        UserError: they do not fit each other.
    """
    if node_rank is None or master is None:
        raise UserError(
            f"--nodes={nodes} needs --node-rank (0 to {nodes - 1}, another one on every node) and "
            f"--master (address of node 0, the same on every node); give both."
        )
    if node_rank >= nodes:
        raise UserError(f"--node-rank={node_rank} with --nodes={nodes}: use 0 to {nodes - 1}.")
    if processes is None:
        processes = default_processes(config)
        if not torch.cuda.is_available():
            if processes % nodes:
                raise UserError(
                    f"{processes} processes do not divide into --nodes={nodes}; give those of one "
                    f"node with --processes."
                )
            processes //= nodes
    check_processes(processes)
    slots = {f"node-{rank}": processes for rank in range(nodes)}
    return Launch(slots, hosts.split_address(master), _devices(processes), node_rank)


def over_ssh(hostfile: str, master: str | None) -> Launch:
    """All hosts of a hostfile, reached by ssh.

    Raises:
        UserError: the hostfile is wrong.
    """
    slots = hosts.read_hostfile(hostfile)
    for tool, package in (("pdsh", "pdsh"), ("ssh", "openssh-client")):
        if not shutil.which(tool):
            raise UserError(
                f"--hostfile needs {tool} on this machine; install it (Debian: {package}), or "
                f"start every node by itself (--nodes; launch/README.md)."
            )
    address = hosts.split_address(master) if master else (hosts.address_of(list(slots)), PORT)
    return Launch(slots, address, by_ssh=True)


def default_processes(config: RunConfig) -> int:
    """Every GPU; without GPUs what the run file says, or one replica."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return config.parallel.processes or config.parallel.pipe


def check_processes(processes: int) -> None:
    """Refuses more processes than GPUs.

    Raises:
        UserError: there are too few GPUs.
    """
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise UserError(
            f"--processes={processes}: this machine has {torch.cuda.device_count()} GPUs; use at "
            f"most that many, or more machines (--hostfile, or --nodes on each)."
        )


def _devices(processes: int) -> tuple[int, ...] | None:
    """The first GPUs of CUDA_VISIBLE_DEVICES, which DeepSpeed would set anew; None if it is unset.

    Raises:
        UserError: it does not hold numbers.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if not visible or not torch.cuda.is_available():
        return None
    if not re.fullmatch(r"\d+(,\d+)*", visible):
        raise UserError(
            f"CUDA_VISIBLE_DEVICES={visible!r}: the deepspeed launcher takes numbers only, as in "
            f"CUDA_VISIBLE_DEVICES=2,3; give those, or unset it."
        )
    return tuple(int(n) for n in visible.split(",")[:processes])


# Below those that systems give to outgoing connections (Linux: from 32768 on): one of these could
# take a port between here and rank 0's start.
PORTS = range(20_000, 32_768)


def free_port() -> int:
    """A port on which nobody listens on this machine.

    Raises:
        UserError: none was found.
    """
    for _ in range(100):
        port = PORTS[secrets.randbelow(len(PORTS))]
        with socket.socket() as s:
            try:
                s.bind(("", port))
            except OSError:
                continue
            return port
    raise UserError(
        f"no free port was found among {PORTS.start} to {PORTS.stop - 1}; end what listens there."
    )
