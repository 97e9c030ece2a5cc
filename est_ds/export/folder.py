"""The Hugging Face folder of a trained model: written beside, proven, and only then moved there."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from est_ds.checkpoints.index import FILE as INDEX
from est_ds.checkpoints.index import Index
from est_ds.checkpoints.reader import Checkpoint, damage
from est_ds.checkpoints.store import LATEST, Store
from est_ds.checkpoints.weights import whole_weights, with_weights
from est_ds.config.run_config import RunConfig
from est_ds.data.encoders import Encoder, load_encoder
from est_ds.data.loader import Windows
from est_ds.design import Design, make_design
from est_ds.disk import describe
from est_ds.errors import UserError
from est_ds.export.card import FILE as CARD
from est_ds.export.card import card
from est_ds.export.config_file import (
    complete_config,
    complete_generation,
    complete_tokenizer,
    special_ids,
)
from est_ds.export.logits import check_logits
from est_ds.export.loss import check_loss
from est_ds.export.part import Keep, plan_to_keep
from est_ds.export.sample import continued
from est_ds.export.smaller import smaller_model
from est_ds.export.tokenizer import check_tokenizer, write_tokenizer
from est_ds.plans.plan import Plan
from est_ds.run.directory import check_run_dir
from est_ds.run.prepare import held_out_windows
from est_ds.slicing.build import count_parameters

MARK = "est_ds_export.json"  # says that a folder is an export, which another may replace


@dataclass(frozen=True)
class Wish:
    """What to export.

    Attributes:
        out: folder to write; default `run_dir/export`, of a part `run_dir/export_subnetwork`. A
            former export there is replaced.
        prompt: start of the sample.
        checkpoint: `latest`, `best`, or a number of steps.
        keep: the part to export, as a smaller model.
        skip_loss: whether the held-out loss is not computed again.
    """

    out: Path | None = None
    prompt: str = ""
    checkpoint: str = LATEST
    keep: Keep = Keep()
    skip_loss: bool = False


@dataclass(frozen=True)
class Exported:
    """What `export` did.

    Attributes:
        folder: the Hugging Face folder.
        step: steps that the weights were trained.
        largest_difference: between logits of the reloaded folder and of the weights that the
            engine saved, run piece by piece as the pipeline runs them; of a part, under its plan.
        lines: what else was proven, and what could not be, for the user.
        sample: text that the reloaded model continues; None if it cannot (BERT).
    """

    folder: Path
    step: int
    largest_difference: float
    lines: tuple[str, ...]
    sample: str | None


@dataclass(frozen=True)
class _Source:
    """The checkpoint and what it was trained on.

    Attributes:
        plan: what is kept of the model; None: the whole.
        windows: of the held-out corpora.
        encoder: the tokenizer as packing uses it.
    """

    design: Design
    checkpoint: Path
    index: Index
    plan: Plan | None
    windows: dict[str, Windows]
    encoder: Encoder

    @property
    def first(self) -> Windows:
        return next(iter(self.windows.values()))


def export(config: RunConfig, wish: Wish) -> Exported:
    """Exports a checkpoint of a run directory, in the precision of the run.

    Raises:
        UserError: no checkpoint, an incomplete one, a part that Hugging Face cannot express, a
            tokenizer that did not pack the corpus, or `out` holds something else.
        Failure: the folder computes something else than the run did. Nothing is exported then.
    """
    store = Store.of(config.run_dir)
    step = store.find(wish.checkpoint)
    with store.reading(step):
        return _export(config, replace(wish, checkpoint=str(step)))


def _export(config: RunConfig, wish: Wish) -> Exported:
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it warns of (a head that is not tied) is proven below
    default = "export" if wish.keep == Keep() else "export_subnetwork"
    folder = wish.out or Path(config.run_dir) / default
    source = _open(config, wish)
    identity = _identity(source.checkpoint)
    if folder.exists() and not (folder / MARK).is_file():
        raise UserError(
            f"--out={str(folder)!r} exists and is no export of est-ds; choose another folder."
        )
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        done = _write(source, wish, partial)
        mark = {"run_dir": config.run_dir, "step": done.step}
        mark |= {"largest_difference": done.largest_difference}
        mark |= {"checkpoint": identity}
        mark |= {name: value for name, value in vars(wish.keep).items() if value is not None}
        (partial / MARK).write_text(json.dumps(mark, indent=1))
        # safetensors hides its files from others.
        for file in partial.iterdir():
            file.chmod((partial / MARK).stat().st_mode)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except OSError as e:
        raise UserError(f"--out={str(folder)!r} cannot be written: {e}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(folder, done.step, done.largest_difference, done.lines, done.sample)


def export_of(config: RunConfig, step: int) -> Path | None:
    """Returns a run's own export folder, if it holds the whole model of that very checkpoint."""
    folder = Path(config.run_dir) / "export"
    try:
        mark = json.loads((folder / MARK).read_text())
        known = _identity(Store.of(config.run_dir).path(step))
    except (OSError, ValueError):
        return None
    is_whole = isinstance(mark, dict) and mark.keys().isdisjoint(vars(Keep()))
    return folder if is_whole and mark.get("checkpoint") == known else None


def _identity(checkpoint: Path) -> str:
    """Names the contents of a checkpoint: its index has the hashes of all its files."""
    return describe(checkpoint / INDEX).sha256


def _open(config: RunConfig, wish: Wish) -> _Source:
    design = make_design(config)
    store = Store.of(config.run_dir)
    step = store.find(wish.checkpoint)
    check_run_dir(config)
    plan = plan_to_keep(wish.keep, design.method, step)
    checkpoint = store.path(step)
    if wrong := damage(checkpoint):
        raise UserError(f"checkpoint {checkpoint} is damaged: {wrong}; choose another one.")
    with Checkpoint(checkpoint) as held:
        index = held.index
    encoder = load_encoder(config.data.tokenizer)
    return _Source(design, checkpoint, index, plan, held_out_windows(design), encoder)


def _write(source: _Source, wish: Wish, partial: Path) -> Exported:
    """Writes the folder's files and proves them."""
    import transformers

    design, corpus = source.design, source.first.corpus
    # Of the type that the engine computed with.
    dtype = torch.bfloat16 if design.config.precision == "bf16" else torch.float32
    weights = whole_weights(design, source.checkpoint, dtype)
    model = exported = with_weights(design.hf_config, weights)
    if source.plan is not None:
        smaller = smaller_model(model, design.family, design.hf_config, source.plan)
        exported = with_weights(*smaller)
    exported.save_pretrained(partial)
    objective = source.first.objective
    positions = design.family.shape(design.hf_config).sequence
    tokenizer, lines = write_tokenizer(partial, design.config.data.tokenizer, objective)
    ids = special_ids(design, source.encoder, corpus.manifest, tokenizer)
    complete_config(partial, ids)
    complete_tokenizer(partial, tokenizer, design, ids["pad_token_id"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(partial)
    complete_generation(partial, ids, tokenizer.pad_token_id, positions)
    text = card(design, source.index, count_parameters(exported), wish.keep, tokenizer)
    (partial / CARD).write_text(text, encoding="utf-8")
    lines += check_tokenizer(tokenizer, source.encoder, [w.corpus for w in source.windows.values()])

    auto_class = getattr(transformers, design.family.auto_class)
    reloaded = auto_class.from_pretrained(partial, dtype=dtype).eval()
    window = torch.from_numpy(corpus.window(0, design.config.data.sequence))[None]
    difference = check_logits(design, model.eval(), source.plan, reloaded, window)
    if wish.keep != Keep():
        lines.append("held-out loss: not compared, since the run evaluated the whole model")
    elif wish.skip_loss:
        lines.append("held-out loss: not compared (--skip-loss)")
    else:
        lines.append(check_loss(reloaded, design, source.index, source.windows))
    sample = None
    if reloaded.can_generate():
        sample, line = continued(reloaded, tokenizer, wish.prompt, positions)
        lines += line
    return Exported(partial, source.index.step, difference, tuple(lines), sample)
