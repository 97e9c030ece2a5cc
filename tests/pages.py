"""Pages read back: what stands in their tables and in their figures."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from typing import Any

from plotly.offline import get_plotlyjs

MAX_BYTES = 6_000_000


@dataclass(frozen=True)
class Plot:
    """A figure as Plotly is given it."""

    traces: list[dict[str, Any]]
    layout: dict[str, Any]

    def of(self, name: str) -> list[dict[str, Any]]:
        """Traces of a name."""
        return [trace for trace in self.traces if trace.get("name") == name]

    def button(self, label: str) -> list[dict[str, Any]]:
        """What a button changes: of the traces, and of the layout."""
        [found] = [b for b in self.layout["updatemenus"][0]["buttons"] if b["label"] == label]
        return found["args"]


class Page:
    """A page that is one well-formed file of bounded size, and asks the network for nothing."""

    def __init__(self, text: str) -> None:
        assert len(text.encode()) < MAX_BYTES
        assert text.count(get_plotlyjs()) <= 1
        self.own = text.replace(get_plotlyjs(), "")
        written = re.sub(r'"data:image/[^"]*"', '""', self.own)  # base64 may hold any letters
        assert not re.search(r"https?:|//[a-z]|@import|<link|<iframe", written)
        scripts = re.compile(r"(<script[^>]*>).*?(</script>)", re.DOTALL)
        self.tree = ET.fromstring(scripts.sub(r"\1\2", self.own).replace("<!DOCTYPE html>", ""))
        loaded = [e for e in self.tree.iter() if e.get("src") or e.get("href")]
        assert all(e.get("src", "data:").startswith("data:") and not e.get("href") for e in loaded)

    @property
    def headings(self) -> list[str]:
        return ["".join(e.itertext()) for e in self.tree.iter("h2")]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.tree.find("body").itertext()).split())

    def rows(self, table: int = 0) -> dict[str, list[str]]:
        """Cells by the row's first, white space aside."""
        rows = list(self.tree.iter("table"))[table].iter("tr")
        cells = [[" ".join("".join(cell.itertext()).split()) for cell in row] for row in rows]
        return {first: rest for first, *rest in cells}

    def plot(self, name: str) -> Plot:
        """A figure by its id."""
        found = re.search(rf'Plotly\.newPlot\(\s*"{name}",\s*', self.own)
        decode = json.JSONDecoder().raw_decode
        traces, end = decode(self.own, found.end())
        layout, _ = decode(self.own, self.own.index("{", end))
        return Plot(traces, layout)
