"""What packing shows: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from est_ds.training.progress import clock

_LINE_EVERY_S = 10.0


class PackingProgress:
    """Tokens, tokens/s and time left; the rate is that of this process, without what was resumed.

    Args:
        total_bytes: stored bytes of all sources; None if that is not known, as of a stream.
        done_bytes: of those, what former processes read.
        done_tokens: tokens that they packed.
    """

    def __init__(self, total_bytes: int | None, done_bytes: int, done_tokens: int) -> None:
        self._total, self._first_bytes, self._first_tokens = total_bytes, done_bytes, done_tokens
        self._started = self._last_line = time.monotonic()
        self._bar = None
        if sys.stdout.isatty():
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            self._bar = Progress(
                TextColumn("packing"),
                BarColumn(bar_width=24),
                TaskProgressColumn(),
                TextColumn("{task.description}"),
            )
            self._task = self._bar.add_task("starting", total=total_bytes, completed=done_bytes)

    def __enter__(self) -> PackingProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done_bytes: int, num_tokens: int) -> None:
        """Shows how far the packing is."""
        now = time.monotonic()
        if not self._bar and now - self._last_line < _LINE_EVERY_S:
            return
        elapsed_s = max(now - self._started, 1e-9)
        tokens_per_s = (num_tokens - self._first_tokens) / elapsed_s
        text = f"{num_tokens:,} tokens  {tokens_per_s:,.0f} tokens/s"
        read = done_bytes - self._first_bytes
        if self._total is not None and read > 0:
            left_s = elapsed_s * max(0, self._total - done_bytes) / read
            text += f"  {clock(left_s)} left"
        if self._bar:
            self._bar.update(self._task, completed=done_bytes, description=text)
        else:
            self._last_line = now
            share = f"{done_bytes / self._total:.1%}  " if self._total else ""
            print(f"packing  {share}{text}", flush=True)
