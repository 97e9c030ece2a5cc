"""All processes of a run meet at a store on rank 0, and compare what they run.

The store is there before the process group, so that a process that does not come, or one of another
version, is named instead of waited for.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch.distributed as dist

from est_ds.errors import Failure, UserError
from est_ds.ranks.versions import comparable_versions
from est_ds.ranks.world import World, meeting_place

CALL_S = 5.0  # for one request to a store that is there
TOKEN = "est_ds/token"

# Until the process ends: whatever group it joins later talks by them, and rank 0's is the server.
_stores: list[dist.Store] = []


@dataclass(frozen=True)
class Meeting:
    """The store on rank 0, its port, and of all ranks the hosts and their addresses.

    An address is the one on the way to rank 0; on rank 0's own host it may be the loopback's. The
    token is another one whenever the run is started again, on the same port too.
    """

    store: dist.Store
    port: int
    token: str
    hosts: list[str]
    addresses: list[str | None]

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

    Args:
        limit_s: for how long.
        reached: is given the store as soon as rank 0 answers.

    Raises:
        Failure: rank 0 cannot be reached, or processes are missing; it says which.
        UserError: processes run different versions.
    """
    address, port = meeting_place(world)
    deadline = time.monotonic() + limit_s
    store = _serve(port) if world.is_first else _reach(world, address, port, limit_s)
    _stores.append(store)
    if reached:
        reached(store)
    own = own_address(address)
    mine = {"host": socket.gethostname(), "address": own, "versions": comparable_versions()}
    try:
        token = store.get(TOKEN).decode()
        store.set(_key(world.rank), json.dumps(mine))
        everyone = [json.loads(text) for text in _all(store, world.size, deadline, limit_s)]
    except (dist.DistError, OSError):
        raise Failure(
            f"rank 0 at {address}:{port} ended before all processes had come; see its output."
        ) from None
    hosts = [theirs["host"] for theirs in everyone]
    _compare(hosts, [theirs["versions"] for theirs in everyone])
    return Meeting(store, store.port, token, hosts, [theirs["address"] for theirs in everyone])


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


def _serve(port: int) -> dist.TCPStore:
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
            f"port {port} of {socket.gethostname()} cannot be used ({_first_line(e)}); end what "
            f"uses it, or start with another port (--master HOST:PORT)."
        ) from None
    store.set(TOKEN, secrets.token_hex(8))
    return store


def _reach(world: World, address: str, port: int, limit_s: float) -> dist.TCPStore:
    """Tries until rank 0 answers."""
    deadline = time.monotonic() + limit_s
    while True:
        try:
            return connect(address, port)
        except (OSError, dist.DistError) as e:
            if time.monotonic() > deadline:
                raise Failure(
                    f"rank {world.rank} on {socket.gethostname()} could not reach rank 0 at "
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
    for peer in (environment["MASTER_ADDR"], *filter(None, meeting.addresses)):
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


def _all(store: dist.Store, size: int, deadline: float, limit_s: float) -> list[bytes]:
    missing = set(range(size))
    while True:
        missing -= {rank for rank in missing if store.check([_key(rank)])}
        if not missing:
            return store.multi_get([_key(rank) for rank in range(size)])
        if time.monotonic() > deadline:
            raise Failure(
                f"{len(missing)} of {size} processes did not come within {limit_s:.0f} s: ranks "
                f"{_shown(sorted(missing))}; see their nodes' output, or try est-ds doctor."
            )
        time.sleep(0.1)


def _compare(hosts: list[str], found: list[dict[str, str]]) -> None:
    for name, expected in found[0].items():
        other = {h: v[name] for h, v in zip(hosts, found) if v[name] != expected}
        if other:
            shown = ", ".join(f"{value} on {host}" for host, value in sorted(other.items()))
            raise UserError(
                f"{name} is {expected} on {hosts[0]} and {shown}; install the same versions on "
                f"every node (launch/requirements.txt)."
            )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _shown(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
