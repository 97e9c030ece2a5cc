"""Figures in DeepSpeed's monitor (TensorBoard and whatever else is configured) over steps done."""

from __future__ import annotations

from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from est_ds.errors import naming

# How DeepSpeed begins the names of its own figures, and those that the training loop sends anyway.
DEEPSPEED = "Train/Samples/"
KNOWN_BETTER = ("lr", "train_loss", "eval_loss")


def count_steps(monitor: Any, folder: str, global_batch: int) -> None:
    """Makes a monitor take each figure once, and by optimizer steps.

    DeepSpeed sends its own over samples: those that nobody else sends are put over steps, and the
    others dropped. TensorBoard writes on a thread, and raises its error, which names no file, where
    the next figures come: that is enough to be said of it.
    """
    write_events = monitor.write_events

    def write(events: list[tuple[str, float, int]]) -> None:
        found = [_over_steps(*event, global_batch) for event in events]
        with naming(folder):
            if shown := [event for event in found if event is not None]:
                write_events(shown)

    monitor.write_events = write


def forget_after(monitor: Any, done: int) -> None:
    """Hides what TensorBoard shows of steps after `done`: they are trained anew."""
    board = monitor.tb_monitor
    if board is not None and board.summary_writer is not None:
        log = SessionLog(status=SessionLog.START)
        board.summary_writer.file_writer.add_event(Event(step=done + 1, session_log=log))


def _over_steps(
    name: str, value: float, at: int, global_batch: int
) -> tuple[str, float, int] | None:
    if not name.startswith(DEEPSPEED):
        return name, value, at
    own = name.removeprefix(DEEPSPEED)
    return None if own in KNOWN_BETTER else (f"train/{own}", value, at // global_batch)
