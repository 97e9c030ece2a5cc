"""One node's part, started by ssh: `python -m est_ds.doctor.node` prints a line of JSON."""

from __future__ import annotations

import argparse
import json
import warnings
from typing import Any

import torch.distributed as dist

from est_ds.config.run_file import load_run
from est_ds.doctor import network
from est_ds.doctor.facts import collect
from est_ds.errors import Failure, UserError

MARK = "est-ds-doctor "  # before the line, among what a login may print
ERRORS = (UserError, Failure, RuntimeError, OSError)


def network_of(nodes: int, rank: int, master: str, port: int, run_dir: str | None) -> dict:
    """All nodes' measurements, under `network`; or why there are none, under `error`."""
    try:
        network.join(rank, nodes, master, port)
        measured = network.measure(run_dir)
        dist.destroy_process_group()
    except ERRORS as e:
        return {"error": str(e).splitlines()[0]}
    return {"network": measured}


def run_dir_of(run: str | None, overrides: list[str]) -> str | None:
    try:
        return None if run is None else load_run(run, overrides).run_dir
    except UserError:
        return None  # the facts say why


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--task", type=json.loads, required=True)
    task: dict[str, Any] = parser.parse_args().task
    warnings.simplefilter("ignore")
    run, overrides, master = task["run"], task["overrides"], task["master"]
    if "rank" in task:
        run_dir = run_dir_of(run, overrides)
        found = network_of(task["nodes"], task["rank"], master, task["port"], run_dir)
    else:
        found = collect(run, overrides, master, task["peers"], task["light"])
    print(MARK + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
