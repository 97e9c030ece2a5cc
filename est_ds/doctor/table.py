"""The doctor's report on a terminal."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from est_ds.doctor.checks import Finding, Node
from est_ds.errors import gigabytes


def show(nodes: list[Node], findings: list[Finding]) -> None:
    """Prints what every node is, then what is wrong."""
    console = Console(highlight=False, soft_wrap=False)
    table = Table(box=SIMPLE, show_edge=False)
    table.add_column("")
    for node in nodes:
        table.add_column(node.name)
    for title, cells in _rows(nodes):
        if any(cells):
            table.add_row(title, *cells)
    console.print(table)
    if not findings:
        console.print("nothing is wrong")
        return
    wrong = Table(box=SIMPLE, show_edge=False)
    for title in ("node", "", "what is wrong", "what to do"):
        wrong.add_column(title, overflow="fold")
    for finding in findings:
        level = "FAILS" if finding.fails else "warning"
        wrong.add_row(finding.node, level, finding.what, finding.mend)
    console.print(wrong)


def _rows(nodes: list[Node]) -> list[tuple[str, list[str]]]:
    def row(title, text):
        cells = []
        for node in nodes:
            cells.append("" if node.facts is None else text(node) or "")
        return title, cells

    return [
        row("host", lambda n: n.facts["host"]),
        row("system", lambda n: n.facts["system"]),
        *(
            row(name, lambda n, name=name: n.facts["versions"].get(name))
            for name in ("python", "torch", "deepspeed", "transformers", "est_ds")
        ),
        row("CUDA", lambda n: n.facts["cuda"]),
        row("driver", lambda n: n.facts["driver"]),
        row("GPUs", _gpus),
        row("cores", lambda n: str(n.facts["cores"])),
        row("memory", lambda n: gigabytes(n.facts["memory_bytes"])),
        row("interface", _interface),
        row("run file", lambda n: n.facts.get("run", {}).get("config")),
        row("training corpus", lambda n: n.facts.get("run", {}).get("corpus", {}).get("train")),
        row("held-out corpus", lambda n: n.facts.get("run", {}).get("corpus", {}).get("valid")),
        row("free for run_dir", _free),
        row("clock", lambda n: n.network and f"{n.network['skew_s'] * 1e3:+.1f} ms"),
        row("all-reduce", lambda n: n.network and f"{gigabytes(n.network['all_reduce'])}/s"),
        row("with node 0", _link),
    ]


def _gpus(node: Node) -> str:
    gpus = node.facts["gpus"]
    if not gpus:
        return "none"
    names = sorted({gpu["name"] for gpu in gpus})
    memory = min(gpu["total_bytes"] for gpu in gpus)
    speeds = [gpu["flops"] for gpu in gpus if gpu["flops"]]
    speed = f", {min(speeds) / 1e12:.0f} TFLOP/s" if speeds else ""
    return f"{len(gpus)} x {', '.join(names)}, {gigabytes(memory)}{speed}"


def _interface(node: Node) -> str | None:
    interface = node.facts["interface"]
    if not interface["address"]:
        return None
    return f"{interface['name']} ({interface['address']})"


def _free(node: Node) -> str | None:
    run = node.facts.get("run", {})
    return gigabytes(run["free_bytes"]) if "free_bytes" in run else None


def _link(node: Node) -> str | None:
    if not node.network or node.network["bandwidth"] is None:
        return None
    return f"{gigabytes(node.network['bandwidth'])}/s, {node.network['latency_s'] * 1e6:.0f} us"
