"""The model card of an export: what it is, what its training cost and came to, and how to load it.

It says no path of this machine or of a bucket but the last two names of each: exports are
published.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from est_ds.checkpoints.index import Index
from est_ds.config.published import FROM, HUB_NAME
from est_ds.config.yaml12 import dump
from est_ds.design import Design
from est_ds.errors import UserError
from est_ds.export.part import Keep
from est_ds.report.files import RunFiles, read_run
from est_ds.run.metrics import read_metrics

FILE = "README.md"  # as the Hub looks for it
# The sections of a run file that the weights depend on.
_SHOWN = (
    *("seed", "seeds", "steps", "precision", "model", "method", "objective", "data", "batch"),
    *("optimizer", "schedule", "start"),
)
_TASKS = {"AutoModelForCausalLM": "text-generation", "AutoModelForMaskedLM": "fill-mask"}
_URL = re.compile(r"[A-Za-z][\w+.-]*://[^/]*")  # up to its path: scheme and bucket or host
_PROMPTS = {"text-generation": "def ", "fill-mask": "def {mask}"}
_USE = """from transformers import pipeline

pipe = pipeline("{task}", model="FOLDER")
print(pipe("{prompt}"))"""
_USE_SEQ2SEQ = """from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

model = AutoModelForSeq2SeqLM.from_pretrained("FOLDER")
tokenizer = AutoTokenizer.from_pretrained("FOLDER")
ids = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=40)
print(tokenizer.batch_decode(ids))"""
_CARD = """---
{metadata}---

# {name}

A base model: pretrained on text, and not tuned to follow instructions or to chat. {what}

| | |
| --- | --- |
{rows}

## Use

FOLDER is this folder, or the name of this repository.

```python
{use}
```

## Configuration

```yaml
{config}```
"""


def card(design: Design, index: Index, parameters: int, keep: Keep, tokenizer: Any) -> str:
    """Returns the model card of a checkpoint.

    Args:
        parameters: of the exported model.
        keep: the part of the model that was exported.
        tokenizer: the exported one.
    """
    config = design.config
    task = _TASKS.get(design.family.auto_class)
    prompt = _PROMPTS.get(task, "").format(mask=tokenizer.mask_token)
    tree = {name: config.model_dump(mode="json", by_alias=True)[name] for name in _SHOWN}
    what = f"It was trained with est_ds, method `{config.method['name']}`."
    if keep != Keep():
        what += f" It is a part of the trained model (`{keep}`), with its rescaling in the weights."
    return _CARD.format(
        metadata=dump(_metadata(design, task)),
        name=Path(config.run_dir).resolve().name,
        what=what,
        rows="\n".join(f"| {name} | {text} |" for name, text in _rows(design, index, parameters)),
        use=_USE.format(task=task, prompt=prompt) if task else _USE_SEQ2SEQ,
        config=dump(_public(tree)),
    )


def _metadata(design: Design, task: str | None) -> dict[str, Any]:
    """What the Hub files a model by."""
    begun_with = design.config.model.get(FROM)
    found: dict[str, Any] = {"library_name": "transformers", "tags": ["est_ds"]}
    if task:
        found["pipeline_tag"] = task
    if begun_with and HUB_NAME.fullmatch(begun_with) and not Path(begun_with).exists():
        found["base_model"] = begun_with
    return found


def _rows(design: Design, index: Index, parameters: int) -> list[tuple[str, str]]:
    config, sequence = design.config, design.family.shape(design.hf_config).sequence
    return [
        ("parameters", f"{parameters:,}"),
        ("longest text", f"{sequence:,} tokens" if sequence else "no bound"),
        ("trained on sequences of", f"{config.data.sequence:,} tokens"),
        ("method", f"`{config.method['name']}`, objective `{config.objective['name']}`"),
        ("steps", f"{index.step:,} of {config.steps:,}"),
        ("tokens read", f"{index.state.tokens:,}"),
        *_flops(design, index.step),
        ("held-out loss of the whole model", _loss(Path(config.run_dir), index)),
        ("trained by", ", ".join(f"{n} {v}" for n, v in index.state.versions.items())),
    ]


def _loss(run_dir: Path, index: Index) -> str:
    """The last evaluation after the checkpoint's steps, as the run made it."""
    at = [e for e in read_metrics(run_dir)[1] if e["step"] == index.step - 1]
    line = at[-1] if at else {}
    loss = line.get("eval_loss") or index.eval_loss
    if loss is None:
        return "not measured at this step"
    bits = line.get("eval_bits_per_byte")
    each = ", ".join(
        f"{name} {one:.4f}" for name, one in line.get("eval_losses", {}).items() if one
    )
    text = f"{loss:.4f} nats a token" + (f", {bits:.4f} bits a byte" if bits else "")
    return text + (f" ({each})" if each else "")


def _flops(design: Design, step: int) -> list[tuple[str, str]]:
    """The FLOPs of the run's own steps before `step`, by both accounts, and those of as many steps
    of the full model."""
    try:
        run = read_run(design.config.run_dir)
    except UserError:
        return [("FLOPs", "not known: the lines of the run's steps cannot be read")]
    rows = []
    for account, field, what in (
        ("model", "flops", "all matrix products"),
        ("blocks", "blocks", "projections of attention and MLP alone"),
    ):
        active, dense = (_summed(run, f"{field}_{kind}", step) for kind in ("active", "dense"))
        if not active or not dense:
            return [("FLOPs", "not known: a phase has no line of its steps")]
        text = f"{active:.4g}, {1 - active / dense:.1%} below the full model's {dense:.4g}"
        since = f" since step {run.config.first_step:,}" if run.config.first_step else ""
        rows.append((f"training FLOPs, {account}", f"{text}{since} ({what})"))
    return rows


def _summed(run: RunFiles, figure: str, step: int) -> float | None:
    """Over the steps before `step`: of every phase the mean of its lines, times its steps."""
    total = 0.0
    for i, phase in enumerate(run.method.phases):
        count = min(phase.until_step, step) - max(phase.from_step, run.config.first_step)
        lines = [line[figure] for line in run.lines_of(i) if line["step"] < step]
        if count > 0 and not lines:
            return None
        total += count * sum(lines) / len(lines) if count > 0 else 0.0
    return total


def _public(value: Any) -> Any:
    """A tree in which an absolute path, and the path of a URL, is its last two names."""
    if isinstance(value, dict):
        return {name: _public(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_public(one) for one in value]
    if isinstance(value, str) and (_URL.match(value) or value.startswith("/")):
        return "/".join(Path(_URL.sub("", value)).parts[1:][-2:])
    return value
