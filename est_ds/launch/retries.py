"""Starts a failed run again by itself: bounded, with back-off, on the hosts that are left.

A run goes on from its last checkpoint, which belongs to no layout: on fewer hosts it trains the
same batches with fewer replicas.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping

from est_ds.checkpoints.store import Store
from est_ds.config.run_config import RunConfig
from est_ds.config.sections import Batch
from est_ds.errors import UserError
from est_ds.launch import launcher, ssh
from est_ds.launch.placement import Launch
from est_ds.launch.signals import Signals
from est_ds.run.directory import lock_run_dir

FAILED = 1
FIRST_WAIT_S, LONGEST_WAIT_S = 5.0, 300.0  # doubled from one try to the next


def train_again_until_done(
    arguments: list[str], where: Launch, config: RunConfig, restarts: int
) -> int:
    """Trains a run under the launcher; after a failure it starts it again.

    Wrong input, divergence and what a signal has ended are not started again. A notice of
    pre-emption, or SIGINT or SIGHUP, between two starts ends the waiting at once.

    Args:
        arguments: the command line of est-ds in every process.
        restarts: how often in a row without a new checkpoint.

    Returns:
        The exit code of the last start, or what a signal between two asks for.
    """
    furthest, tries, wait_s = 0, 0, FIRST_WAIT_S
    place: Launch | None = where
    with Signals() as signals:
        while True:
            furthest = max(furthest, _saved(config))
            code = _start(arguments, place, config, signals) if place else FAILED
            if code != FAILED or not restarts:
                return code
            if _saved(config) > furthest:
                tries, wait_s = 0, FIRST_WAIT_S
            if _saved(config) == config.steps:
                _say("all steps were saved before that")
                return 0
            if tries == restarts:
                _say(f"not started again: {tries} tries have saved nothing after step {furthest}")
                return code
            if signals.code is None:
                tries += 1
                _say(
                    f"exit code {code}; try {tries} of {restarts}, from step {_saved(config)}, in "
                    f"{wait_s:g} s: {_described(where.slots)}"
                    f"{', as far as the hosts answer' if where.by_ssh else ''}"
                )
                signals.wait(wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
                place = _place(where, config, signals)
            if signals.code is not None:
                _say("not started again, because of a signal; start it again to go on")
                return signals.code


def fit(slots: Mapping[str, int], batch: Batch, pipe: int) -> dict[str, int] | None:
    """The largest layout of the same pipeline and batch on the processes that hosts can have.

    Args:
        slots: processes that every host can have, in order.
        pipe: pipe stages; the processes are a multiple of them.

    Returns:
        Processes of the hosts that have any, the first ones full; None if nothing fits.
    """
    for replicas in range(sum(slots.values()) // pipe, 0, -1):
        if batch.global_ % (batch.micro * replicas) == 0:
            break
    else:
        return None
    left, chosen = replicas * pipe, {}
    for host, most in slots.items():
        if left:
            chosen[host] = min(most, left)
            left -= chosen[host]
    return chosen


def _start(arguments: list[str], where: Launch, config: RunConfig, signals: Signals) -> int:
    code = launcher.start(arguments, where, config.watchdog.limit_s, signals)
    if code == 0 and where.is_first and _saved(config) != config.steps:
        _say("failed: the launcher was ended from outside; start the run again to go on.")
        return FAILED
    return code


def _saved(config: RunConfig) -> int:
    """The step of the latest checkpoint."""
    return Store.of(config.run_dir).latest or 0


def _place(where: Launch, config: RunConfig, signals: Signals) -> Launch | None:
    """Where the run can start now; None, after saying why, where it cannot, or if a signal came."""
    slots = _slots_left(where, config, signals) if where.by_ssh else where.slots
    if slots is None:
        return None
    if where.is_first:
        try:
            # Rank 0 takes it: a run that somebody else has started meanwhile is left alone.
            lock_run_dir(config).close()
        except UserError as e:
            _say(f"failed: {e}")
            return None
    return where.again(slots)


def _slots_left(where: Launch, config: RunConfig, signals: Signals) -> dict[str, int] | None:
    """Processes of the hosts that answer; None if nothing fits, or if a signal came."""
    there = _answering(where.slots, signals)
    if signals.code is not None:
        return None
    pipe = config.parallel.pipe
    left = {host: n for host, n in where.slots.items() if host in there}
    slots = fit(left, config.batch, pipe)
    away = ", ".join(host for host in where.slots if host not in there)
    if slots is None:
        _say(
            f"failed: no answer from {away}; the others have {sum(left.values())} processes, and "
            f"parallel.pipe={pipe} needs {pipe}"
        )
    elif away:
        _say(f"no answer from {away}; starting {_described(slots)}")
    return slots


def _answering(slots: Mapping[str, int], signals: Signals) -> list[str]:
    there: list[str] = []
    asking = threading.Thread(target=lambda: there.extend(ssh.answering(slots)), daemon=True)
    asking.start()
    while asking.is_alive() and signals.code is None:
        time.sleep(0.1)
    return there


def _described(slots: Mapping[str, int]) -> str:
    hosts = ", ".join(f"{n} on {host}" for host, n in slots.items())
    return f"{sum(slots.values())} processes ({hosts})"


def _say(text: str) -> None:
    print(f"est-ds: {text}", file=sys.stderr, flush=True)
