"""All processes of a run meet at a store on rank 0, and compare what they run.

The store is there before the process group, so that a process that does not come, or one of another
version, is named instead of waited for.
"""

from __future__ import annotations

import ipaddress
import json
import os
import resource
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import psutil
import torch.distributed as dist

from est_ds.errors import Failure, UserError
from est_ds.ranks.board import AT_ONCE, absent, look_every_s, read_all, wait_for, within
from est_ds.ranks.versions import comparable_versions
from est_ds.ranks.world import World, meeting_place

CALL_S = 5.0  # for one request to a store that is there
TOKEN = "est_ds/token"
MISSING = "est_ds/missing"  # rank 0's words, every `TELL_EVERY_S` while it waits
TELL_EVERY_S = 2.0
RECORD = "est_ds/record"  # rank 0's, once it has seen all
READ = "est_ds/record_read"
# Of one rank at rank 0: the meeting, pre-emption, the watchdog, the process group, the copier.
SOCKETS = 5

# Until the process ends: whatever group it joins later talks by them, and rank 0's is the server.
_stores: list[dist.Store] = []


@dataclass(frozen=True)
class Meeting:
    """The store on rank 0, its port, and what a process knows of the others.

    The token is another one whenever the run is started again, on the same port too.

    Attributes:
        host: this process's.
        first_host: rank 0's.
        near: the ranks on this host, with the process of each.
        addresses: of a few ranks, each the one on the way to rank 0; none is the loopback's.
    """

    store: dist.Store
    port: int
    token: str
    host: str
    first_host: str
    near: Mapping[int, int]
    addresses: tuple[str, ...] = ()

    def connect(self) -> dist.Store:
        """A connection of its own, for a thread; a lost one does not come back by itself.

        Never to the store of a later start, whose processes would hear this one's alarm.

        Raises:
            OSError, dist.DistError: rank 0 does not answer.
        """
        if World.from_environment().is_first:
            return self.store.clone()
        return connect(os.environ["MASTER_ADDR"], self.port, self.token)


def meet(
    world: World, limit_s: float, reached: Callable[[dist.Store], None] | None = None
) -> Meeting:
    """Waits until every process is there. Every process calls it.

    Each leaves a record of itself. Rank 0 reads all, and publishes one for everybody and one for
    each host.

    Args:
        limit_s: for how long.
        reached: is given the store as soon as rank 0 answers.

    Raises:
        Failure: rank 0 cannot be reached or falls silent, or processes are missing; it says which.
        UserError: processes run different versions.
    """
    address, port = meeting_place(world)
    deadline = time.monotonic() + limit_s
    store = _serve(port, world.size) if world.is_first else _reach(world, address, port, limit_s)
    _stores.append(store)
    if reached:
        reached(store)
    own, host = own_address(address), host_name()
    mine = {"host": host, "address": own, "versions": comparable_versions(), "pid": os.getpid()}
    exchange = partial(_exchange, store, world, mine, deadline, limit_s)
    try:
        token, record, near = within(
            deadline - time.monotonic() + 2 * TELL_EVERY_S + CALL_S, exchange
        )
    except TimeoutError:
        raise Failure(
            f"rank 0 at {address}:{port} no longer answers; it was stopped, or its host or network "
            f"is gone."
        ) from None
    except (dist.DistError, OSError):
        raise Failure(
            f"rank 0 at {address}:{port} ended before all processes had come; see its output."
        ) from None
    addresses = tuple(record["addresses"])
    near = {int(rank): pid for rank, pid in near.items()}
    return Meeting(store, store.port, token, host, record["host"], near, addresses)


def _exchange(
    store: dist.Store, world: World, mine: dict[str, Any], deadline: float, limit_s: float
) -> tuple[str, dict[str, Any], dict[str, int]]:
    """Leaves a process's record, and waits for the others'.

    Returns:
        The token, the record that rank 0 published, and the processes of the ranks of this host.
    """
    token = store.get(TOKEN).decode()
    store.set(_key(world.rank), json.dumps(mine))
    if world.is_first:
        record = _gather(store, world.size, deadline, limit_s)
    elif wait_for(store, RECORD, world.size, deadline + 2 * TELL_EVERY_S):
        record = json.loads(store.get(RECORD))
    else:  # rank 0 came later, and still waits
        record = {"missing": store.get(MISSING).decode()}
    _raise_fault(store, world, record)
    return token, record, json.loads(store.get(_near_key(mine["host"])))


def host_name() -> str:
    return socket.gethostname()


def host_of(store: dist.Store, rank: int) -> str:
    """The host of a rank that has come to the meeting at a store."""
    return json.loads(store.get(_key(rank)))["host"]


def latest_store() -> dist.Store:
    """The store by which this process has met the others."""
    return _stores[-1]


class OtherStart(OSError):
    """The run was started again: what answers is not the store of this process's start."""


def connect(address: str, port: int, token: str | None = None) -> dist.TCPStore:
    """A connection to the store that rank 0 has opened.

    Args:
        token: of the meeting that it must be.

    Raises:
        OtherStart: it is another one.
        OSError: nobody answers there.
    """
    # Without this look TCPStore tries again and again, and logs each.
    socket.create_connection((address, port), timeout=CALL_S).close()
    timeout = timedelta(seconds=CALL_S)
    store = dist.TCPStore(address, port, timeout=timeout, wait_for_workers=False)
    if token is not None and store.get(TOKEN).decode() != token:
        raise OtherStart(f"the processes of another start meet at {address}:{port}")
    return store


def _serve(port: int, num_ranks: int) -> dist.TCPStore:
    _allow_sockets(SOCKETS * num_ranks)
    try:
        store = dist.TCPStore(
            "localhost",
            port,
            is_master=True,
            timeout=timedelta(seconds=CALL_S),
            wait_for_workers=False,
        )
    except dist.DistError as e:
        raise Failure(
            f"port {port} of {host_name()} cannot be used ({_first_line(e)}); end what "
            f"uses it, or start with another port (--master HOST:PORT)."
        ) from None
    store.set(TOKEN, secrets.token_hex(8))
    return store


def _allow_sockets(number: int) -> None:
    """Raises this process's limit of open files for the sockets of all ranks.

    Raises:
        Failure: the system does not allow as many.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    least, ample = number + 128, number + 1024  # with its own files
    most = ample if hard == resource.RLIM_INFINITY else hard
    if most < least:
        raise Failure(
            f"rank 0 on {host_name()} may open {hard} files (ulimit -Hn), and the connections of "
            f"all ranks take up to {number}; raise that limit there and start again."
        )
    if soft != resource.RLIM_INFINITY and soft < ample:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(ample, most)), hard))


def _reach(world: World, address: str, port: int, limit_s: float) -> dist.TCPStore:
    """Tries until rank 0 answers."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return connect(address, port)
        except (OSError, dist.DistError) as e:
            if time.monotonic() > deadline:
                raise Failure(
                    f"rank {world.rank} on {host_name()} could not reach rank 0 at "
                    f"{address}:{port} within {limit_s:.0f} s ({_first_line(e)}); see that it was "
                    f"started and that no firewall is between them (est-ds doctor measures it)."
                ) from None
            time.sleep(0.5)


def choose_interface(environment: Mapping[str, str], meeting: Meeting) -> str | None:
    """The interface that leads to the other hosts, for gloo; None where gloo needs no help.

    Gloo takes the one that the host's own name resolves to, which on Debian and Ubuntu is the
    loopback: between hosts nothing connects then.
    """
    if "GLOO_SOCKET_IFNAME" in environment:
        return None
    for peer in (environment["MASTER_ADDR"], *meeting.addresses):
        own = own_address(peer)
        if own is not None and not ipaddress.ip_address(own).is_loopback:
            return interface_of(own)
    return None


def own_address(peer: str) -> str | None:
    """This host's address on the way to `peer`; None if there is no way."""
    try:
        family, _, _, _, target = socket.getaddrinfo(peer, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as s:
            s.connect(target)  # chooses a route and sends nothing
            return s.getsockname()[0]
    except OSError:
        return None


def interface_of(address: str) -> str | None:
    """The name of the interface with this address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            return name
    return None


def _key(rank: int) -> str:
    return f"est_ds/met/{rank}"


def _keys(size: int) -> list[str]:
    return [_key(rank) for rank in range(size)]


def _near_key(host: str) -> str:
    return f"est_ds/near/{host}"


def _gather(store: dist.Store, size: int, deadline: float, limit_s: float) -> dict[str, Any]:
    """On rank 0: reads what every rank has left, and publishes what they need of it.

    Returns:
        The record that all read: `missing` or `differ` with what is wrong, or rank 0's `host` and
        some `addresses`.
    """
    record = {"missing": _wait_for_all(store, size, deadline, limit_s)}
    if not record["missing"]:
        everyone = [json.loads(text) for text in read_all(store, _keys(size))]
        hosts = [theirs["host"] for theirs in everyone]
        record = {"differ": _difference(hosts, [theirs["versions"] for theirs in everyone])}
        if not record["differ"]:
            record = {"host": hosts[0], "addresses": _away(everyone)}
            near: dict[str, dict[int, int]] = {}
            for rank, theirs in enumerate(everyone):
                near.setdefault(theirs["host"], {})[rank] = theirs["pid"]
            for host, processes in near.items():
                store.set(_near_key(host), json.dumps(processes))
    store.set(RECORD, json.dumps(record))
    return record


def _wait_for_all(store: dist.Store, size: int, deadline: float, limit_s: float) -> str | None:
    """Waits for the records of all; who is missing at the deadline, if anybody is."""
    missing, told = _keys(size), float("-inf")
    while missing:
        if store.check(missing[:AT_ONCE]):
            del missing[:AT_ONCE]
            continue
        now = time.monotonic()
        if now > deadline or now - told > TELL_EVERY_S:
            missing, told = absent(store, missing), now
            text = _missing_text(missing, size, limit_s)
            if missing and now > deadline:
                return text
            store.set(MISSING, text)
        time.sleep(0.1)
    return None


def _missing_text(keys: list[str], size: int, limit_s: float) -> str:
    shown = ", ".join(key.rpartition("/")[2] for key in keys[:8]) + ", ..." * (len(keys) > 8)
    return (
        f"{len(keys)} of {size} processes did not come within {limit_s:.0f} s: ranks {shown}; see "
        f"their nodes' output, or try est-ds doctor."
    )


def _raise_fault(store: dist.Store, world: World, record: dict[str, Any]) -> None:
    """Raises what is wrong, everywhere alike; rank 0, where the record lies, last."""
    if differ := record.get("differ"):
        deadline = time.monotonic() + CALL_S
        while store.add(READ, 0 if world.is_first else 1) < world.size - 1:
            if not world.is_first or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        raise UserError(differ)
    if missing := record.get("missing"):
        if world.is_first:  # nobody knows how many are there to read it
            time.sleep(look_every_s(0.1, world.size) + 0.5)
        raise Failure(missing)


def _away(everyone: list[dict[str, Any]]) -> list[str]:
    """Addresses that may lead to other hosts; a few, as one may have no route."""
    found = dict.fromkeys(theirs["address"] for theirs in everyone if theirs["address"])
    return [a for a in found if not ipaddress.ip_address(a).is_loopback][:8]


def _difference(hosts: list[str], found: list[dict[str, str]]) -> str | None:
    for name, expected in found[0].items():
        other = {h: v[name] for h, v in zip(hosts, found) if v[name] != expected}
        if other:
            shown = [f"{value} on {host}" for host, value in sorted(other.items())]
            shown = shown[:8] + [f"{len(shown) - 8} more"] * (len(shown) > 8)
            return (
                f"{name} is {expected} on {hosts[0]} and {', '.join(shown)}; install the same "
                f"versions on every node (launch/requirements.txt)."
            )
    return None


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
