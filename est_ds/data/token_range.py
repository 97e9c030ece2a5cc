"""The smallest and the largest token of a corpus made elsewhere: looked for once, and remembered.

Reading a whole `.bin` takes as long as the disk gives it, or 6 GB/s from memory. What was found
lies beside the corpus as `PREFIX.range.json` and holds as long as `.bin` has its size and time.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from est_ds.data.header import Header

_BLOCK_TOKENS = 1 << 22
_SAID_FROM_BYTES = 1 << 32
# Where nothing can be remembered, every process of every start would read it all.
_FORGOTTEN_BYTES = 1 << 33


def token_range(header: Header) -> tuple[int, int] | None:
    """Smallest and largest token of one pair of files.

    Returns:
        None of more than 8 GiB in a folder that cannot be written, which is not read.
    """
    path = Path(f"{header.prefix}.range.json")
    status = os.stat(f"{header.prefix}.bin")
    of = {"bin_bytes": status.st_size, "bin_mtime_ns": status.st_mtime_ns}
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        seen = json.loads(path.read_text())
        if {name: seen[name] for name in of} == of:
            return int(seen["smallest"]), int(seen["largest"])
    if header.bin_bytes > _FORGOTTEN_BYTES and not os.access(path.parent, os.W_OK):
        return None
    if header.bin_bytes > _SAID_FROM_BYTES:
        print(
            f"corpus {header.prefix}: looking for its largest token, once: "
            f"{header.bin_bytes / 1e9:.0f} GB to read",
            file=sys.stderr,
            flush=True,
        )
    smallest, largest = _looked_for(header)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):
        beside.write_text(json.dumps(of | {"smallest": smallest, "largest": largest}) + "\n")
        os.replace(beside, path)
    return smallest, largest


def _looked_for(header: Header) -> tuple[int, int]:
    tokens = header.tokens()
    blocks = [tokens[at : at + _BLOCK_TOKENS] for at in range(0, len(tokens), _BLOCK_TOKENS)]
    found = [(int(block.min()), int(block.max())) for block in blocks]
    return min(low for low, _ in found), max(high for _, high in found)
