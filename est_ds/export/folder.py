"""Writes the trained model as a Hugging Face folder, and proves that it is the trained model."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from est_ds.checkpoints.reader import Checkpoint, damage
from est_ds.checkpoints.store import LATEST, Store
from est_ds.config.sections import RunConfig
from est_ds.data.indexed import Corpus
from est_ds.data.tokenizer import tokenizer_files
from est_ds.design import Planned, plan_run
from est_ds.errors import UserError
from est_ds.export.part import Keep, plan_to_keep
from est_ds.export.smaller import smaller_model
from est_ds.plans.plan import Plan
from est_ds.run.directory import check_run_dir
from est_ds.slicing.build import build_model, empty_model
from est_ds.slicing.subnetwork import Subnetwork

MARK = "est_ds_export.json"  # says that a folder is an export, which another may replace
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}  # of logits; the same arithmetic in another order


@dataclass(frozen=True)
class Exported:
    """What `export` did.

    Attributes:
        folder: the Hugging Face folder.
        step: steps that the weights were trained.
        largest_difference: between logits of the reloaded folder and of the weights that the
            engine saved, run piece by piece as the pipeline runs them; of a part, under its plan.
        sample: text that the reloaded model continues; None if it cannot (BERT).
    """

    folder: Path
    step: int
    largest_difference: float
    sample: str | None


def export(
    config: RunConfig,
    out: Path | None,
    prompt: str,
    checkpoint: str = LATEST,
    keep: Keep = Keep(),
) -> Exported:
    """Exports a checkpoint of a run directory, in the precision of the run.

    Args:
        out: folder to write; default `run_dir/export`, of a part `run_dir/export_subnetwork`. A
            former export there is replaced.
        checkpoint: `latest`, `best`, or a number of steps.
        keep: the part to export, as a smaller model.

    Raises:
        UserError: no checkpoint, an incomplete one, a part that Hugging Face cannot express, or
            `out` holds something else.
    """
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    planned = plan_run(config)
    store = Store(Path(config.run_dir) / "checkpoints")
    step = store.find(checkpoint)
    check_run_dir(config)
    plan = plan_to_keep(keep, planned.method, step)
    folder = out or Path(config.run_dir) / ("export" if keep == Keep() else "export_subnetwork")
    if folder.exists() and not (folder / MARK).is_file():
        raise UserError(
            f"--out={str(folder)!r} exists and is no export of est-ds; choose another folder."
        )
    ids_BT = torch.from_numpy(
        Corpus.open(next(iter(config.data.held_out.values()))).window(0, config.data.sequence)
    )[None]
    tokenizer_sources = tokenizer_files(config.data.tokenizer)
    weights = _weights(store.path(step), planned)
    model = exported = _with_weights(planned.hf_config, weights)
    if plan is not None:
        exported = _with_weights(*smaller_model(model, planned.family, planned.hf_config, plan))

    partial = folder.with_name(f".{folder.name}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        exported.save_pretrained(partial)
        for source in tokenizer_sources:
            shutil.copyfile(source, partial / source.name)
        dtype = next(iter(weights.values())).dtype
        auto_class = getattr(transformers, planned.family.auto_class)
        reloaded = auto_class.from_pretrained(partial, dtype=dtype).eval()
        difference = _largest_difference(planned, model.eval(), plan, reloaded, ids_BT)
        if not difference <= TOLERANCE[config.precision]:
            raise RuntimeError(
                f"the reloaded folder's logits differ by {difference} from those of the engine's "
                f"weights; nothing was exported"
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(partial)
        sample = _continue(reloaded, tokenizer, prompt) if reloaded.can_generate() else None
        mark = {"run_dir": config.run_dir, "step": step, "largest_difference": difference}
        mark |= {name: value for name, value in vars(keep).items() if value is not None}
        (partial / MARK).write_text(json.dumps(mark, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    except OSError as e:
        raise UserError(f"--out={str(folder)!r} cannot be written: {e}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(folder, step, difference, sample)


def _weights(checkpoint: Path, planned: Planned) -> dict[str, Tensor]:
    """The weights that the engine computed with, tied ones under all their names."""
    if wrong := damage(checkpoint):
        raise UserError(f"checkpoint {checkpoint} is damaged: {wrong}; choose another one.")
    dtype = torch.bfloat16 if planned.config.precision == "bf16" else torch.float32
    with Checkpoint(checkpoint) as held:
        weights = {name: tensor.to(dtype) for name, tensor in held.weights().items()}
    tied = empty_model(planned.hf_config).all_tied_weights_keys
    return weights | {name: weights[source] for name, source in tied.items()}


def _with_weights(hf_config: Any, weights: dict[str, Tensor]) -> nn.Module:
    model = build_model(hf_config, seed=0)
    model.load_state_dict(weights, strict=True, assign=True)
    return model


@torch.no_grad()
def _largest_difference(planned: Planned, model, plan: Plan | None, reloaded, ids_BT) -> float:
    """Between the full model's pieces in a row, as a pipeline runs them, and the reloaded folder.

    Args:
        plan: active on the pieces.
    """
    ids = (ids_BT, ids_BT) if planned.hf_config.is_encoder_decoder else (ids_BT,)
    named = planned.family.named_inputs(ids)
    x: Tensor | tuple[Tensor, ...] = ids if len(ids) > 1 else ids_BT
    layers = dict(enumerate(planned.family.layers(model)))
    subnetwork = Subnetwork(planned.family, planned.method.shape, layers)
    with subnetwork.active(plan) if plan else nullcontext():
        for piece in planned.family.pieces(planned.hf_config):
            x = piece.forward(*(model.get_submodule(path) for path in piece.modules), x)
    logits = reloaded(**named).logits
    return (logits.float() - x.float()).abs().max().item()


def _continue(model, tokenizer, prompt: str) -> str:
    # Some tokenizers return more than a model of another family takes.
    encoded = tokenizer(prompt, return_tensors="pt")
    inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
    tokens = model.generate(**inputs, max_new_tokens=48, do_sample=False)
    return tokenizer.decode(tokens[0], skip_special_tokens=True)
