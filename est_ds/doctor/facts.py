"""What one node has and is, as plain values that travel as JSON."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import torch

import est_ds
from est_ds.config.kinds import is_url
from est_ds.config.run_config import RunConfig
from est_ds.config.run_file import load_run
from est_ds.cost.parameters import total_parameters
from est_ds.data.indexed import Corpus
from est_ds.design import make_design
from est_ds.errors import UserError
from est_ds.ranks.meeting import interface_of, own_address
from est_ds.ranks.versions import comparable_versions

SMI_FIELDS = (
    "index",
    "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total",
    "remapped_rows.pending",
    "remapped_rows.failure",
    "clocks_event_reasons.hw_slowdown",
)
# Weights and two moments in float32: what a checkpoint holds of a parameter.
CHECKPOINT_BYTES = 12


def collect(
    run: str | None,
    overrides: list[str],
    master: str | None = None,
    peers: list[str] | None = None,
    light: bool = False,
) -> dict[str, Any]:
    """Looks at this node; nothing is started but a product on every GPU, and nothing written.

    Args:
        run: run file or run directory; None leaves out what belongs to a run.
        master: address of node 0; None with a single node.
        peers: hosts to try to reach by ssh.
        light: leaves the GPUs alone, and asks the driver about them.
    """
    own = (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    )
    facts: dict[str, Any] = {
        "host": socket.gethostname(),
        "executable": sys.executable,
        "versions": comparable_versions() | {"est_ds": f"{est_ds.__version__} ({_source_hash()})"},
        "cuda": torch.version.cuda or "CPU build",
        "driver": _driver(),
        "gpus": _gpus_of_driver() if light else _gpus(),
        "cores": len(own),
        "memory_bytes": psutil.virtual_memory().total,
        "shm_bytes": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "system": platform.platform(terse=True),
        "interface": _interface(master),
        "unreachable": _unreachable(peers or []),
    }
    if run is not None:
        facts["run"] = _run(run, overrides)
    return facts


def _source_hash() -> str:
    """8 hex characters that change with any line of the package."""
    package = Path(est_ds.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:8]


def _run(path: str, overrides: list[str]) -> dict[str, Any]:
    try:
        config = load_run(path, overrides)
        design = make_design(config.with_micro(config.batch.micro))
        found = {
            "config": hashlib.sha256(config.to_yaml().encode()).hexdigest()[:16],
            "corpus": {name: _fingerprint(config, name) for name in ("train", "valid")},
            "checkpoint_bytes": CHECKPOINT_BYTES * total_parameters(design.facts.pieces),
        }
    except UserError as e:
        return {"error": str(e)}
    folder = existing_parent(config.run_dir)
    return found | {
        "folder": str(folder),
        "free_bytes": shutil.disk_usage(folder).free,
        "writable": os.access(folder, os.W_OK),
        "keep": config.checkpoint.keep_last,
    }


def existing_parent(path: str) -> Path:
    """The run directory, or the nearest folder above it that is there."""
    folder = Path(path).absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _fingerprint(config: RunConfig, name: str) -> str:
    data = config.data
    parts = [p.corpus for p in data.parts] if name == "train" else data.held_out.values()
    corpora = [_corpus(prefix) for prefix in parts]
    for corpus in corpora:
        corpus.check_tokenizer(data.tokenizer)
    return "+".join(corpus.fingerprint for corpus in corpora)


def _corpus(prefix: str) -> Corpus:
    """A corpus; of one in a bucket, of which nothing is fetched, what its manifest says."""
    return (Corpus.described(prefix) if is_url(prefix) else None) or Corpus.open(prefix)


def _interface(master: str | None) -> dict[str, str | None]:
    """The way to node 0, and what gloo would take if it were left alone."""
    try:
        by_name = socket.gethostbyname(socket.gethostname())
    except OSError:
        by_name = None
    if master is None:
        return {"name": None, "address": None, "by_name": by_name}
    address = own_address(master)
    name = interface_of(address) if address else None
    return {"name": name, "address": address, "by_name": by_name}


def _unreachable(peers: list[str]) -> dict[str, str]:
    """Hosts that ssh does not reach from here, and what it says."""

    def reach(host: str) -> str | None:
        command = ["ssh", "-oBatchMode=yes", "-oConnectTimeout=8", host, "true"]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired) as e:
            return type(e).__name__
        return None if done.returncode == 0 else done.stderr.strip().splitlines()[-1:] or "failed"

    with ThreadPoolExecutor(16) as pool:
        found = dict(zip(peers, pool.map(reach, peers)))
    return {host: "".join(said) for host, said in found.items() if said}


def _driver() -> str | None:
    lines = _smi("driver_version")
    return lines[0][0] if lines else None


def _gpus_of_driver() -> list[dict[str, Any]]:
    return [
        {
            "name": name,
            "total_bytes": int(float(mib) * 2**20),
            "free_bytes": None,
            "flops": None,
            "error": None,
            "health": row,
        }
        for (name, mib), (_, *row) in zip(_smi("name", "memory.total"), _smi(*SMI_FIELDS))
    ]


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    health = {row[0]: row[1:] for row in _smi(*SMI_FIELDS)}
    all_visible = len(health) == torch.cuda.device_count()  # else torch counts otherwise
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        try:
            free, total = torch.cuda.mem_get_info(index)
            speed, error = _matmul_flops(index), None
        except RuntimeError as e:
            free, total, speed, error = 0, properties.total_memory, 0.0, str(e).splitlines()[0]
        found.append(
            {
                "name": properties.name,
                "total_bytes": total,
                "free_bytes": free,
                "flops": speed or None,
                "error": error,
                "health": health.get(str(index)) if all_visible else None,
            }
        )
    return found


def _matmul_flops(index: int, size: int = 8192, times: int = 8) -> float:
    """FLOP/s of bf16 products, all of which must agree.

    Raises:
        RuntimeError: they do not, or the GPU does not work.
    """
    with torch.cuda.device(index):
        generator = torch.Generator("cuda").manual_seed(0)
        a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16, generator=generator)
        first = a @ a
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(times):
            again = a @ a
        torch.cuda.synchronize()
        took_s = time.perf_counter() - began
        if not torch.equal(first, again):
            raise RuntimeError("the same product gave two results")
    return 2 * size**3 * times / took_s


def _smi(*fields: str) -> list[list[str]]:
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return []
    if done.returncode:
        return []
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
