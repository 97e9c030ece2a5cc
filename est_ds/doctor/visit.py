"""Visits the nodes: this machine, one node of several, or all hosts of a hostfile over ssh."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch.distributed as dist

from est_ds.doctor import network
from est_ds.doctor.checks import Node, find
from est_ds.doctor.facts import collect
from est_ds.doctor.node import ERRORS, MARK, run_dir_of
from est_ds.doctor.table import show
from est_ds.errors import UserError
from est_ds.launch import hosts
from est_ds.ranks.gather import gathered
from est_ds.ranks.world import PORT

VISIT_S = 240.0


def doctor(given: Namespace) -> int:
    """Checks, prints and returns the exit code: 0, or 2 where a run would fail.

    Args:
        given: run, overrides, hostfile, nodes, node_rank, master of the command line.

    Raises:
        UserError: these do not fit each other.
    """
    if given.hostfile is not None:
        nodes = _over_ssh(given)
    elif given.nodes is not None and given.nodes > 1:
        nodes = _one_of_many(given)
    else:
        facts = collect(given.run, given.overrides, light=given.light)
        nodes = [Node(facts["host"], facts=facts)]
    findings = find(nodes)
    show(nodes, findings)
    return 2 if any(finding.fails for finding in findings) else 0


def _one_of_many(given: Namespace) -> list[Node]:
    """Every node is visited by its own est-ds, and all see all."""
    if given.node_rank is None or given.master is None or given.node_rank >= given.nodes:
        raise UserError(
            f"--nodes={given.nodes} needs --node-rank (0 to {given.nodes - 1}) and --master "
            f"(address of node 0); give both."
        )
    address, port = hosts.split_address(given.master)
    facts = collect(given.run, given.overrides, address, light=given.light)
    mine = Node(facts["host"], facts=facts)
    try:
        network.join(given.node_rank, given.nodes, address, port)
        everyone = [Node(theirs["host"], facts=theirs) for theirs in gathered(facts)]
        measured = network.measure(run_dir_of(given.run, given.overrides))
        dist.destroy_process_group()
    except ERRORS as e:
        mine.error = str(e).splitlines()[0]
        return [mine]
    for node, result in zip(everyone, measured):
        node.network = result
    return everyone


def _over_ssh(given: Namespace) -> list[Node]:
    """Asks every host for its facts, then those that answered measure what is between them."""
    slots = hosts.read_hostfile(given.hostfile)
    nodes = [Node(name, number) for name, number in slots.items()]
    address, port = hosts.split_address(given.master) if given.master else (None, PORT)
    address = address or hosts.address_of(list(slots)) or nodes[0].name
    task = {"run": given.run, "overrides": given.overrides, "master": address}

    def ask(node: Node) -> None:
        peers = [name for name in slots if name != node.name]
        node.facts = _visit(node, task | {"peers": peers, "light": given.light})

    _together(ask, nodes)
    there = [node for node in nodes if node.facts is not None]
    for node in there:  # who does not answer at all is said once
        for other in nodes:
            if other.facts is None:
                node.facts["unreachable"].pop(other.name, None)
    if len(there) < 2 or nodes[0].facts is None or _versions_differ(there):
        return nodes

    def measure(node: Node) -> None:
        place = {"port": port, "nodes": len(there), "rank": there.index(node)}
        found = _visit(node, task | place) or {}
        node.error = node.error or found.get("error")
        if "network" in found:
            node.network = found["network"][place["rank"]]

    _together(measure, there)
    return nodes


def _together(work: Callable[[Node], None], nodes: list[Node]) -> None:
    with ThreadPoolExecutor(len(nodes)) as pool:
        list(pool.map(work, nodes))


def _versions_differ(nodes: list[Node]) -> bool:
    """Then they do not come together, and the findings say so already."""
    return any(node.facts["versions"] != nodes[0].facts["versions"] for node in nodes)


def _visit(node: Node, task: dict[str, Any]) -> dict[str, Any] | None:
    """What `est_ds.doctor.node` says on a host; None, and the node's error, if it says nothing."""
    sent = hosts.travelling(os.environ)
    sent["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")]))
    words = [f"{name}={value}" for name, value in sent.items()]
    python = [sys.executable, "-m", "est_ds.doctor.node", "--task", json.dumps(task)]
    there = f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(['env', *words, *python])}"
    command = ["ssh", "-oBatchMode=yes", "-oConnectTimeout=10", node.name, there]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=VISIT_S
        )
    except subprocess.TimeoutExpired:
        node.error = f"no answer within {VISIT_S:.0f} s"
        return None
    except OSError as e:
        raise UserError(f"ssh cannot be started ({e}); install it (openssh-client).") from None
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line[len(MARK) :])
    said = _last_line(done.stderr) or f"exit code {done.returncode} and not a word"
    node.error = f"ssh from {socket.gethostname()} gives: {said}"
    return None


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""
