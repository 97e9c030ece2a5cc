"""`results.jsonl`: what a study found, one finished run a line; enough to redraw and to go on.

Line one says which study it is. A line `run` holds a finished run, a line `times` what the steps of
the arms took in turns; of two lines on one thing the later one counts. Held-out losses by window
lie beside it, in the folder `results.windows` (the file's name without its ending).
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import Field, ValidationError

from est_ds.config.strict import Stored
from est_ds.disk import replace_text
from est_ds.errors import UserError, naming
from est_ds.run.scores import TaskScore

FORMAT = 1
_RESTORE = "restore the file, or choose another study_dir (or results)."


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]


class Header(Stored):
    """Which study the results are of.

    Attributes:
        study: name of what the baseline trains, whatever its seed and its tuned values.
        corpora: fingerprints of the corpora by `train.0`, `valid.NAME`; None if none was there.
    """

    format: int = FORMAT
    study: str
    corpora: dict[str, str] | None


class RunResult(Stored):
    """A finished run.

    Attributes:
        run: its key (`runs.key_of`).
        values: of the tuned fields, as JSON.
        loss: held-out, of the full model at the end, nats a token; None: it diverged.
        losses: by held-out corpus, where there are several.
        curve: pairs of steps done and held-out loss.
        first_loss: training loss of the first step.
        data: digests of the batches of the first and the last step.
        boundaries: held-out losses at both sides of the phase boundaries (`evaluate.boundaries`).
        flops, blocks_flops: of the run, as its method expects them.
        tasks: what the model scores at the end, by task, where the study asks for it.
        step_s: median over its logged steps; runs of one study share a machine, so that it is no
            measurement (that is `Times`).
    """

    run: str
    arm: str
    seed: int
    values: dict[str, str]
    steps: int
    tokens: int
    parameters: int
    flops: Positive
    blocks_flops: NotNegative
    loss: NotNegative | None
    losses: dict[str, NotNegative] = {}
    bits_per_byte: NotNegative | None = None
    curve: list[tuple[int, NotNegative]] = []
    first_loss: NotNegative | None = None
    data: tuple[str, str] | None = None
    boundaries: list[dict[str, Any]] = []
    tasks: dict[str, TaskScore] = {}
    step_s: NotNegative | None = None
    device: str = ""
    versions: dict[str, str] = {}
    finished: str = ""


class ArmTimes(Stored):
    """Step times of an arm in turns with the baseline's.

    Attributes:
        run: what was timed (`Runs.timed_key`).
        ratio: wall-clock time of an arm's mean step over that of the baseline.
        cpu_ratio: the same of processor time; None on a GPU.
        step_s: wall-clock time of the arm's mean step.
        spread: half of the middle half of the rounds' ratios, over their median.
    """

    run: str
    ratio: Positive
    cpu_ratio: Positive | None
    step_s: Positive
    spread: NotNegative | None


class Times(Stored):
    """Step times of all arms, measured in turns on one machine.

    Attributes:
        busy: processors that other programs kept busy meanwhile, on average; None if unknown.
    """

    device: str
    processes: int
    arms: dict[str, ArmTimes]
    busy: float | None
    measured: str


@dataclass
class Results:
    """The results of a study so far."""

    file: Path
    header: Header | None = None
    runs: dict[str, RunResult] = field(default_factory=dict)
    times: Times | None = None

    @property
    def losses(self) -> dict[str, float]:
        """Held-out loss by key; infinite of a run that diverged."""
        return {k: math.inf if r.loss is None else r.loss for k, r in self.runs.items()}

    def begin(self, header: Header) -> None:
        """Writes line one of a new file, or compares it.

        Raises:
            UserError: the file is of another study, or other corpora.
        """
        if self.header is None:
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                replace_text(self.file, _text("study", header))
            except OSError as e:
                raise UserError(
                    f"results {str(self.file)!r} cannot be written ({e.strerror}); mend that, or "
                    f"choose another results."
                ) from None
            self.header = header
            return
        if self.header.study != header.study:
            raise UserError(
                f"{self.file} holds the results of another study: its baseline was trained on "
                f"another config (steps, model, data or batch); choose another study_dir (or "
                f"results), or move the file away."
            )
        if header.corpora and self.header.corpora and header.corpora != self.header.corpora:
            names = [n for n in header.corpora if header.corpora[n] != self.header.corpora.get(n)]
            raise UserError(
                f"{self.file} holds results on other corpora: data.{names[0] if names else ''} has "
                f"other contents now; put the former corpora back, or choose another study_dir."
            )

    def add(self, result: RunResult) -> None:
        """Appends a finished run; it is on disk when the call returns."""
        self._append("run", result)
        self.runs[result.run] = result

    def add_times(self, times: Times) -> None:
        """Appends step times; they are on disk when the call returns."""
        self._append("times", times)
        self.times = times

    def windows(self, key: str) -> Path:
        """Where the held-out losses by window of a run lie."""
        return self.file.with_suffix(".windows") / f"{key}.npz"

    def _append(self, kind: str, line: Stored) -> None:
        with naming(self.file), self.file.open("a") as f:
            whole = os.fstat(f.fileno()).st_size
            try:
                f.write(_text(kind, line))
                f.flush()
                os.fsync(f.fileno())
            except OSError:  # as of a full disk: no half line is left for the next one
                os.truncate(self.file, whole)
                raise


def read_results(file: Path, repair: bool = False) -> Results:
    """Reads the results of a study; none where there is no file.

    Args:
        repair: drops a last line that a killed process left half-written.

    Raises:
        UserError: a line is not of this format.
    """
    results = Results(file)
    if not file.exists():
        return results
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as e:
        why = getattr(e, "strerror", None) or "it is no text in UTF-8"
        raise UserError(f"results {str(file)!r} cannot be read: {why}; {_RESTORE}") from None
    whole = text[: text.rfind("\n") + 1]
    if text and not whole and not '{"study": '.startswith(text[:10]):
        raise UserError(f"{file} is no file of results; {_RESTORE}")
    for number, line in enumerate(whole.splitlines(), 1):
        _read_line(results, number, line)
    if results.header is None:
        if whole:
            raise UserError(f"{file}: line 1 does not say which study it is; {_RESTORE}")
        return results
    if repair and whole != text:
        replace_text(file, whole)
    return results


def _read_line(results: Results, number: int, line: str) -> None:
    try:
        tree = json.loads(line, parse_constant=_refuse_constant)
        [(kind, value)] = tree.items()
        if kind == "study" and number == 1:
            if value.get("format") != FORMAT:
                raise UserError(
                    f"{results.file}: format {value.get('format')}, and this version reads "
                    f"{FORMAT}; use the version of est_ds that wrote it."
                )
            results.header = Header.model_validate(value)
        elif kind == "run":
            result = RunResult.model_validate(value)
            results.runs[result.run] = result
        elif kind == "times":
            results.times = Times.model_validate(value)
        else:
            raise ValueError(f"unknown kind {kind!r}")
    except UserError:
        raise
    except (ValueError, AttributeError, ValidationError) as e:
        why = " ".join(str(e).split())[:120]
        raise UserError(
            f"{results.file}: line {number} is no result of a study ({why}); {_RESTORE}"
        ) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _text(kind: str, line: Stored) -> str:
    return json.dumps({kind: line.model_dump(mode="json")}, allow_nan=False) + "\n"
