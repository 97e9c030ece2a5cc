"""What is wrong with nodes, from their facts and measurements, and how to mend it."""

from __future__ import annotations

import ipaddress
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from est_ds.errors import gigabytes
from est_ds.ranks.world import PORT

SLOW_GPU = 0.85  # of the median
BUSY_GPU = 0.9  # of the memory that is free
SKEW_S = 1.0
SLOW_LINK = 0.5  # of the median
FEW_FILES = 4096


@dataclass
class Node:
    """What is known of one node.

    Attributes:
        name: as in the hostfile; the host's own name otherwise.
        slots: processes that the hostfile wants; None: one a GPU.
        facts: of `facts.collect`; None if the node did not answer.
        error: why it did not, or why its network could not be measured.
        network: of `network.measure`; None if it was not measured.
    """

    name: str
    slots: int | None = None
    facts: dict[str, Any] | None = None
    error: str | None = None
    network: dict[str, Any] | None = None


@dataclass(frozen=True)
class Finding:
    """Something wrong: `fails` if a run would fail of it."""

    node: str
    fails: bool
    what: str
    mend: str = field(default="")


def find(nodes: list[Node]) -> list[Finding]:
    """Everything that is wrong, node by node; differences are to the first node that answered."""
    found = []
    for node in nodes:
        if node.facts is None:
            found.append(Finding(node.name, True, node.error or "did not answer", MENDS["answer"]))
    known = [node for node in nodes if node.facts is not None]
    for check in (_differences, _gpus, _run, _system, _interface, _ssh):
        for node in known:
            found += check(node, known[0])
    for node in nodes:
        if node.facts is not None and node.error:
            found.append(Finding(node.name, True, node.error, MENDS["network"]))
    return found + list(_network([node for node in known if node.network]))


MENDS = {
    "answer": "try `ssh HOST true` by hand; the key, the host's name and est_ds at the same path",
    "network": f"open all ports between the nodes (rank 0 listens on {PORT}); see the interface",
    "versions": "install launch/requirements.txt on every node, or use one image",
}


def _differences(node: Node, first: Node) -> Iterator[Finding]:
    for name, expected in first.facts["versions"].items():
        if (own := node.facts["versions"].get(name)) != expected:
            what = f"{name} is {own}, and {expected} on {first.name}"
            yield Finding(node.name, True, what, MENDS["versions"])
    for name, mend in (("cuda", MENDS["versions"]), ("driver", "install the same NVIDIA driver")):
        own, expected = node.facts[name], first.facts[name]
        if own != expected:
            what = f"{name} is {own}, and {expected} on {first.name}"
            yield Finding(node.name, name == "cuda", what, mend)


def _gpus(node: Node, first: Node) -> Iterator[Finding]:
    gpus, expected = node.facts["gpus"], first.facts["gpus"]
    if bool(gpus) != bool(expected):
        mend = "see nvidia-smi there, and that torch is a CUDA build; or leave the node out"
        yield Finding(node.name, True, f"has {len(gpus)} GPUs, {first.name} {len(expected)}", mend)
    elif node.slots is not None and gpus and node.slots > len(gpus):
        what = f"has {len(gpus)} GPUs for slots={node.slots}"
        yield Finding(node.name, True, what, "correct slots in the hostfile")
    elif node.slots is None and len(gpus) != len(expected):
        what = f"has {len(gpus)} GPUs, {first.name} {len(expected)}"
        yield Finding(node.name, True, what, "give the same --processes on every node")
    speeds = [gpu["flops"] for gpu in expected if gpu["flops"]]
    usual = statistics.median(speeds) if speeds else 0.0
    for index, gpu in enumerate(gpus):
        where = f"GPU {index}"
        if gpu["error"]:
            mend = "reset or drain this GPU; try it with another program"
            yield Finding(node.name, True, f"{where}: {gpu['error']}", mend)
            continue
        if expected and gpu["name"] != expected[0]["name"]:
            what = f"{where} is {gpu['name']}, and {expected[0]['name']} on {first.name}"
            yield Finding(node.name, False, what, "the slowest sets the pace: use nodes alike")
        if gpu["free_bytes"] is not None and gpu["free_bytes"] < BUSY_GPU * gpu["total_bytes"]:
            what = (
                f"{where}: {gigabytes(gpu['free_bytes'])} of {gigabytes(gpu['total_bytes'])} free"
            )
            yield Finding(node.name, False, what, "end what uses it: nvidia-smi names it")
        if gpu["flops"] and gpu["flops"] < SLOW_GPU * usual:
            what = f"{where}: {gpu['flops'] / 1e12:.0f} TFLOP/s, the usual is {usual / 1e12:.0f}"
            yield Finding(node.name, False, what, "look at temperature, power and clocks")
        yield from _health(node, where, gpu["health"])


def _health(node: Node, where: str, health: list[str] | None) -> Iterator[Finding]:
    """Args: health: temperature, uncorrected errors, remapping pending, failed, slowed down."""
    if not health:
        return
    celsius, errors, pending, failed, slowed = health
    if errors.isdigit() and int(errors):
        what = f"{where}: {errors} uncorrected memory errors"
        yield Finding(node.name, True, what, "reset the GPU; replace the node if they come back")
    if pending in ("1", "Yes") or failed in ("1", "Yes"):
        what = f"{where}: rows of its memory wait to be remapped, or could not be"
        yield Finding(node.name, True, what, "reset the GPU, or replace the node")
    if slowed == "Active" or (celsius.isdigit() and int(celsius) >= 88):
        what = f"{where}: {celsius} C, slowed down: {slowed}"
        yield Finding(node.name, False, what, "look at its cooling")


def _run(node: Node, first: Node) -> Iterator[Finding]:
    run, expected = node.facts.get("run"), first.facts.get("run")
    if run is None:
        return
    if "error" in run:
        yield Finding(node.name, True, run["error"])
        return
    if "error" not in expected:
        if run["config"] != expected["config"]:
            what = f"the run file differs from {first.name}'s"
            yield Finding(node.name, True, what, "use one file for all, on shared storage")
        for name, own in run["corpus"].items():
            if own != expected["corpus"][name]:
                what = f"data.{name} is another corpus than on {first.name} ({own})"
                yield Finding(node.name, True, what, "copy it again, or share it")
    one, free = run["checkpoint_bytes"], gigabytes(run["free_bytes"])
    if not run["writable"]:
        mend = "choose another run_dir, or change its owner"
        yield Finding(node.name, True, f"{run['folder']} cannot be written", mend)
    elif run["free_bytes"] < one:
        what = f"{free} free in {run['folder']}, a checkpoint takes {gigabytes(one)}"
        yield Finding(node.name, True, what, "make room")
    elif run["free_bytes"] < (kept := one * ((run["keep"] or 5) + 1)):
        what = f"{free} free in {run['folder']}, all checkpoints take {gigabytes(kept)}"
        yield Finding(node.name, False, what, "make room, or lower checkpoint.keep_last")


def _system(node: Node, first: Node) -> Iterator[Finding]:
    shm, gpus = node.facts["shm_bytes"], len(node.facts["gpus"])
    if gpus > 1 and shm is not None and shm < 2**30:
        mend = "in Docker --ipc=host or --shm-size=16g; in Kubernetes an emptyDir of medium Memory"
        yield Finding(node.name, True, f"/dev/shm holds {gigabytes(shm)}: NCCL needs more", mend)
    if node.facts["open_files"] < FEW_FILES and gpus:
        what = f"{node.facts['open_files']} open files are allowed"
        yield Finding(node.name, False, what, f"ulimit -n {FEW_FILES * 16}")


def _interface(node: Node, first: Node) -> Iterator[Finding]:
    interface = node.facts["interface"]
    if interface["address"] is None or node is first:
        return
    if interface["name"] and ipaddress.ip_address(interface["address"]).is_loopback:
        what = f"node 0's address leads to the loopback ({interface['address']})"
        mend = "give --master an address that the others can reach"
        yield Finding(node.name, True, what, mend)


def _ssh(node: Node, first: Node) -> Iterator[Finding]:
    for host, said in node.facts["unreachable"].items():
        what = f"ssh to {host} fails: {said}"
        yield Finding(node.name, False, what, "only mpirun needs it: copy the key there too")


def _network(nodes: list[Node]) -> Iterator[Finding]:
    links = {n.name: n.network["bandwidth"] for n in nodes if n.network["bandwidth"]}
    usual = statistics.median(links.values()) if links else 0.0
    for node in nodes:
        network = node.network
        if abs(network["skew_s"]) > SKEW_S:
            what = f"the clock is {network['skew_s']:+.1f} s off {nodes[0].name}'s"
            yield Finding(node.name, False, what, "start chrony or systemd-timesyncd")
        if network["shares"] is False:
            what = "run_dir is not the same folder as on node 0"
            yield Finding(node.name, True, what, "put it on storage that all nodes share")
        if node.name in links and links[node.name] < SLOW_LINK * usual:
            what = f"{gigabytes(links[node.name])}/s to node 0, the usual is {gigabytes(usual)}/s"
            yield Finding(node.name, False, what, "look at its cable, switch port or placement")
