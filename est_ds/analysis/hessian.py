"""`analyse hessian`: trace and largest eigenvalue of the Hessian of the held-out loss.

EST's paper (arXiv 2406.06962) explains its models' better scores by a smaller trace: a flatter
minimum. The trace is Hutchinson's estimate (1990): the mean of v'Hv over vectors v of random signs,
whose expectation is the trace; over the parameters of one layer alone it is that layer's.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from est_ds.analysis.product import Hessian, flat, groups_of, unflat
from est_ds.analysis.subject import Wanted, open_subject
from est_ds.errors import Failure, UserError

LEAST_SAMPLES = 10  # the standard error of fewer says little
TOLERANCE = 1e-3  # of the largest eigenvalue, relative
RESTARTS = 30  # of Lanczos, each of up to 20 products


@dataclass(frozen=True)
class Effort:
    """How much is spent.

    Attributes:
        samples: of the trace, at most.
        error: the standard error at which sampling ends, relative to the trace.
        processes: that compute samples; the result does not depend on it.
        eigenvalue: whether the largest eigenvalue is computed as well.
    """

    samples: int = 100
    error: float = 0.05
    processes: int = 1
    seed: int = 0
    eigenvalue: bool = True

    def check(self) -> None:
        """Raises UserError if a value is not allowed."""
        if self.samples < 2:
            raise UserError(
                f"--samples={self.samples} is not allowed: a standard error needs at least 2; "
                f"leave it out for {Effort.samples}."
            )
        if not 0 < self.error < 1:
            raise UserError(
                f"--error={self.error:g} is not allowed; use more than 0 and less than 1, such as "
                f"{Effort.error} for a standard error of 5 % of the trace."
            )


def measure_hessian(wanted: Wanted, effort: Effort) -> dict[str, Any]:
    """Returns what is known of the Hessian at a checkpoint, as it stands in the file of numbers.

    Raises:
        UserError: see `open_subject`, and `Effort.check`.
    """
    effort.check()
    began = time.monotonic()
    subject = open_subject(wanted)
    hessian = Hessian(subject)
    groups = groups_of(subject.design, subject.model)
    samples, peak = _enough(wanted, effort, hessian, list(groups.values()))
    trace, error = mean_and_error(samples.sum(1))
    by_layer = {
        name: {
            "parameters": sum(hessian.parameters[i].numel() for i in places),
            **dict(zip(("trace", "standard_error"), mean_and_error(samples[:, column]))),
        }
        for column, (name, places) in enumerate(groups.items())
    }
    eigenvalue = largest_eigenvalue(hessian, effort.seed) if effort.eigenvalue else None
    return {
        "step": subject.step,
        "windows": wanted.windows,
        "loss": subject.held_out_loss(),
        "parameters": hessian.size,
        "trace": trace,
        "standard_error": error,
        "samples": len(samples),
        "wanted_error": effort.error,
        "reached": bool(error <= effort.error * abs(trace)),
        "by_layer": by_layer,
        "largest_eigenvalue": eigenvalue,
        "eigenvalue_wanted": effort.eigenvalue,
        "seed": effort.seed,
        "seconds": time.monotonic() - began,
        "processes": effort.processes,
        "memory": _memory(hessian, peak),
    }


def _enough(
    wanted: Wanted, effort: Effort, hessian: Hessian, groups: list[list[int]]
) -> tuple[np.ndarray, int]:
    """Returns the samples of every group, in their order, up to the one at which the rule ends, and
    the most that a process held which computed some, bytes."""
    found: list[np.ndarray] = []
    most = 0
    source = (
        _here(hessian, groups, effort)
        if effort.processes == 1
        else _in_processes(wanted, groups, effort)
    )
    with closing(source) as samples:
        for sample, peak in samples:
            found.append(sample)
            most = max(most, peak)
            if len(found) >= LEAST_SAMPLES:
                mean, error = mean_and_error(np.array(found).sum(1))
                if error <= effort.error * abs(mean):
                    break
    return np.array(found), most


def one_sample(hessian: Hessian, groups: list[list[int]], seed: int, sample: int) -> np.ndarray:
    """Returns v'Hv over the parameters of every group, float64 [groups]."""
    signs = hessian.signs(seed, sample)
    products = [(v * h).sum(dtype=torch.float64) for v, h in zip(signs, hessian.times(signs))]
    values = torch.stack(products).cpu().numpy()
    return np.array([values[places].sum() for places in groups])


Sampled = tuple[np.ndarray, int]  # a sample, and `peak_bytes` of the process that computed it


def _here(hessian: Hessian, groups: list[list[int]], effort: Effort) -> Iterator[Sampled]:
    for sample in range(effort.samples):
        yield one_sample(hessian, groups, effort.seed, sample), peak_bytes()


def _in_processes(wanted: Wanted, groups: list[list[int]], effort: Effort) -> Iterator[Sampled]:
    """Yields the samples in their order; each process has a model of its own."""
    pool = ProcessPoolExecutor(
        effort.processes,
        multiprocessing.get_context("spawn"),  # torch's threads do not survive a fork
        _open_here,
        (wanted, max(1, torch.get_num_threads() // effort.processes)),
    )
    try:
        numbers = iter(range(effort.samples))
        waiting: list[Future] = []
        # Each of the first samples starts one. An interrupt from the keyboard reaches them too,
        # and the parent alone says what it means.
        with _ignored(signal.SIGINT):
            for sample in islice(numbers, effort.processes):
                waiting.append(pool.submit(_sample_there, groups, effort.seed, sample))
        while True:
            for sample in islice(numbers, effort.processes + 1 - len(waiting)):
                waiting.append(pool.submit(_sample_there, groups, effort.seed, sample))
            if not waiting:
                return
            yield waiting.pop(0).result()
    except KeyboardInterrupt:
        for child in multiprocessing.active_children():
            child.kill()
        raise
    except BrokenProcessPool:
        raise Failure(
            f"a process of --processes={effort.processes} ended before its sample was done, maybe "
            f"for want of memory; use fewer, or fewer --windows or a smaller batch.micro."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _ignored(number: int) -> Iterator[None]:
    """Ignores a signal; so do processes that are started meanwhile."""
    former = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(number, former)


_opened: Hessian  # of a process of the pool


def _open_here(wanted: Wanted, threads: int) -> None:
    global _opened
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Also where the parent is killed: the pool's own queue does not tell.
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    number = multiprocessing.current_process()._identity[-1]
    gpus = torch.cuda.device_count()
    _opened = Hessian(open_subject(wanted, f"cuda:{number % gpus}" if gpus else None))


def _sample_there(groups: list[list[int]], seed: int, sample: int) -> Sampled:
    return one_sample(_opened, groups, seed, sample), peak_bytes()


def mean_and_error(samples: np.ndarray) -> tuple[float, float]:
    """Returns the mean of independent values and its standard error."""
    return float(samples.mean()), float(samples.std(ddof=1) / math.sqrt(len(samples)))


def largest_eigenvalue(hessian: Hessian, seed: int = 0) -> float | None:
    """Returns the largest eigenvalue, by Lanczos (ARPACK); None if it has not converged."""
    size = hessian.size

    def product(values: np.ndarray) -> np.ndarray:
        return flat(hessian.times(unflat(values, hessian.parameters)))

    operator = LinearOperator((size, size), matvec=product, dtype=np.float32)
    first = flat(hessian.signs(seed, 0)) / math.sqrt(size)
    settings = {"which": "LA", "v0": first, "tol": TOLERANCE, "maxiter": RESTARTS}
    try:
        [value] = eigsh(operator, k=1, return_eigenvectors=False, **settings)
    except ArpackNoConvergence:
        return None
    return float(value)


def _memory(hessian: Hessian, peak: int) -> dict[str, int]:
    """What one process holds at least, and what the largest one held, bytes.

    Args:
        peak: of the processes that computed samples.
    """
    vectors = 4  # weights, gradient, signs, product
    found = {"vectors_bytes": 4 * vectors * hessian.size, "peak_bytes": max(peak, peak_bytes())}
    if torch.cuda.is_available():
        found["peak_device_bytes"] = torch.cuda.max_memory_allocated()
    return found


def peak_bytes() -> int:
    """Returns the most memory that this process has held.

    Linux's own figure goes first: that of getrusage counts what the process that started this one
    held.
    """
    with suppress(OSError, ValueError):
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].partition("kB")[0])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
