"""`est-ds finetune`: a classification head on an exported model, trained as GLUE does it.

Model and training are of transformers: `AutoModelForSequenceClassification` and `Trainer`. Adam,
a learning rate that rises over the first tenth of the steps and falls to 0 linearly, weight decay
.01, as BERT's.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from est_ds.config.run_config import RunConfig
from est_ds.data.encoders import load_encoder
from est_ds.design import Design, make_design
from est_ds.errors import Failure, UserError
from est_ds.ranks.versions import versions
from est_ds.run.scores import FineTuning, TunedModel, add_fine_tuning, check_fine_tunings
from est_ds.score.agreement import class_metrics, value_metrics
from est_ds.score.inputs import fill_up_with, inputs_of
from est_ds.score.made_tasks import MADE, make_task
from est_ds.score.source import Source, exported
from est_ds.score.tasks import Examples, Task, read_task

TOKENS = 128  # of an example, at most


@dataclass(frozen=True)
class Wish:
    """What to fine-tune.

    Attributes:
        task: a folder or file, or the name of a task that is made.
        checkpoint: `latest`, `best`, or a number of steps.
        lrs: learning rates; each is tried with every seed.
        seeds: of the head's weights and the order of the examples.
        epochs: over the training set.
        batch: examples a step.
        tokens: of an example, at most; None: `TOKENS`, or all that a smaller model takes.
        limit: examples of each set; None: all.
    """

    task: str
    checkpoint: str
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    epochs: float
    batch: int
    tokens: int | None
    limit: int | None

    @property
    def settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("epochs", "batch", "limit")}


def finetune_run(config: RunConfig, wish: Wish) -> tuple[FineTuning, str]:
    """Fine-tunes a checkpoint of a run directory, and writes `finetune.json` there.

    Returns:
        What was written, and which folder the model came from.

    Raises:
        UserError: as `exported`; or the task is of another form, or the model has no such head.
        Failure: a loss is no number.
    """
    _check_head(make_design(config))
    task = None if wish.task in MADE else read_task(Path(wish.task))
    with exported(config, wish.checkpoint) as source:
        check_fine_tunings(source.run_dir)
        if task is None:
            corpora = {name: held.corpus for name, held in source.windows.items()}
            encoder = load_encoder(source.config.data.tokenizer)
            task = make_task(wish.task, corpora, encoder)
        task = task.up_to(wish.limit)
        tuner = _Tuner(source, task, wish)
        models = []
        for lr in wish.lrs:
            for seed in wish.seeds:
                metrics = tuner.tuned(lr, seed)
                models.append(TunedModel(lr=lr, seed=seed, metrics=metrics))
                shown = f"{task.metric} {metrics[task.metric]:.4f}"
                print(f"learning rate {lr:g}, seed {seed}: {shown}", file=sys.stderr, flush=True)
        found = FineTuning(
            step=source.step,
            task=task.name,
            metric=task.metric,
            models=tuple(models),
            guess=task.guess,
            examples=(len(task.train), len(task.dev)),
            settings={
                **wish.settings,
                "tokens": tuner.tokens,
                "skipped": task.train.skipped + task.dev.skipped,
            },
            versions=versions(),
        )
        add_fine_tuning(source.run_dir, found)
        return found, source.where


def _check_head(design: Design) -> None:
    """Checks that transformers has a head for texts on this model.

    Raises:
        UserError: it has none.
    """
    from transformers import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as HEADS

    hf = design.hf_config
    if hf.is_encoder_decoder or type(hf) not in HEADS:
        raise UserError(
            f"est-ds finetune: model.model_type={hf.model_type!r} has no classification head that "
            f"reads a text from left to right or from both sides; use a run of BERT, GPT-2, Llama, "
            f"Mistral, Qwen2 or Qwen3."
        )


def _longest(wanted: int | None, positions: int | None) -> int:
    """Tokens of an example, at most.

    Raises:
        UserError: the model takes fewer.
    """
    if wanted is None:
        return min(TOKENS, positions or TOKENS)
    if positions is not None and wanted > positions:
        raise UserError(
            f"--tokens={wanted} is more than the {positions} positions of the model; use fewer."
        )
    return wanted


class _Tuner:
    """One task and one export, to fine-tune several times."""

    def __init__(self, source: Source, task: Task, wish: Wish) -> None:
        self._source, self._task, self._wish = source, task, wish
        self._tokenizer = source.tokenizer()
        fill_up_with(self._tokenizer)
        positions = source.design.family.shape(source.design.hf_config).sequence
        self.tokens = _longest(wish.tokens, positions)
        self._train, self._dev = self._rows(task.train), self._rows(task.dev)

    def tuned(self, lr: float, seed: int) -> dict[str, float]:
        """Trains a model, and returns its metrics on the development set.

        Raises:
            Failure: its predictions are no numbers.
        """
        from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, set_seed

        set_seed(seed)
        with TemporaryDirectory() as folder:
            trainer = Trainer(
                model=self._model(),
                args=self._arguments(folder, lr, seed),
                train_dataset=self._train,
                data_collator=DataCollatorWithPadding(self._tokenizer),
            )
            trainer.remove_callback(PrinterCallback)  # which prints to standard output
            trainer.train()
            predictions = trainer.predict(self._dev).predictions
        if not np.isfinite(predictions).all():
            raise Failure(
                f"fine-tuning with learning rate {lr:g} and seed {seed} gives predictions that are "
                f"no numbers; use smaller learning rates (--lr)."
            )
        labels = np.array(self._task.dev.labels)
        if not self._task.classes:
            return value_metrics(predictions[:, 0].astype(float), labels)
        classes = len(self._task.classes)
        return class_metrics(predictions.argmax(1), labels.astype(np.int64), classes)

    def _model(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        classes = len(self._task.classes)
        kind = "single_label_classification" if classes else "regression"
        return AutoModelForSequenceClassification.from_pretrained(
            self._source.folder,
            num_labels=classes or 1,
            problem_type=kind,
            pad_token_id=self._tokenizer.pad_token_id,
            dtype=torch.float32,
        )

    def _arguments(self, folder: str, lr: float, seed: int) -> Any:
        from transformers import TrainingArguments

        has_gpu = torch.cuda.is_available()
        each = max(1, self._wish.batch // max(1, torch.cuda.device_count()))  # of all GPUs
        return TrainingArguments(
            output_dir=folder,
            learning_rate=lr,
            num_train_epochs=self._wish.epochs,
            per_device_train_batch_size=each,
            per_device_eval_batch_size=each,
            weight_decay=0.01,
            warmup_steps=0.1,
            seed=seed,
            data_seed=seed,
            use_cpu=not has_gpu,
            bf16=has_gpu and self._source.config.precision == "bf16",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=has_gpu,
        )

    def _rows(self, examples: Examples) -> list[dict[str, Any]]:
        has_types = self._source.design.family.auto_class == "AutoModelForMaskedLM"
        rows = inputs_of(examples, self._tokenizer, self.tokens, has_types)
        kind = int if self._task.classes else float
        return [row | {"labels": kind(label)} for row, label in zip(rows, examples.labels)]
