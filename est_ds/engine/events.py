"""Figures in the monitors that `deepspeed` names, over steps done."""

from __future__ import annotations

from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from est_ds.errors import error_line
from est_ds.ranks.world import say

# How DeepSpeed begins the names of its own figures, and those that the training loop sends anyway.
DEEPSPEED = "Train/Samples/"
KNOWN_BETTER = ("lr", "train_loss", "eval_loss")


def count_steps(monitor: Any, global_batch: int) -> None:
    """Makes a monitor take each figure once, and by optimizer steps, until it fails, which ends no
    training.

    DeepSpeed sends its own over samples: those that nobody else sends are put over steps, and the
    others dropped. TensorBoard writes on a thread, and raises its error where the next figures
    come.
    """
    write_events = monitor.write_events

    def write(events: list[tuple[str, float, int]]) -> None:
        found = [_over_steps(*event, global_batch) for event in events]
        try:
            if shown := [event for event in found if event is not None]:
                write_events(shown)
        except Exception as e:  # whatever a library, a disk or a network raises
            monitor.enabled = False
            say(f"warning: DeepSpeed's monitor failed ({error_line(e)}); it is off now")

    monitor.write_events = write


def forget_after(monitor: Any, done: int) -> None:
    """Hides what TensorBoard shows of steps after `done`: they are trained anew."""
    board = monitor.tb_monitor
    if board is not None and board.summary_writer is not None:
        hide_after(board.summary_writer.file_writer, done)


def hide_after(file_writer: Any, done: int) -> None:
    """Has TensorBoard hide what its file says of steps after `done`."""
    log = SessionLog(status=SessionLog.START)
    file_writer.add_event(Event(step=done + 1, session_log=log))


def _over_steps(
    name: str, value: float, at: int, global_batch: int
) -> tuple[str, float, int] | None:
    if not name.startswith(DEEPSPEED):
        return name, value, at
    own = name.removeprefix(DEEPSPEED)
    return None if own in KNOWN_BETTER else (f"train/{own}", value, at // global_batch)
