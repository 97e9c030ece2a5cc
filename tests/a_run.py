"""Run directories as a training left them, with figures that can be worked out by hand."""

from __future__ import annotations

from cases.tiny import TINY_MODEL
from est_ds.config.run_config import RunConfig
from est_ds.data.manifest import Manifest, manifest_path
from est_ds.run.directory import write_config
from est_ds.run.metrics import MetricsFile

PHASES = [
    {"name": "small", "until": 4, "layers": 0.5, "heads": 0.5, "columns": 0.5},
    {"name": "na<rr>ow [b]", "until": 6, "heads": 0.5, "columns": 0.5},
    {"name": "full", "until": 10},
]
STEP_S = [9.0, 1.0, 1.2, 1.1, 2.0, 2.4, 4.0, 4.0, 5.0, 4.0]
# Model and block FLOPs of each phase, of 100 and 80.
ACTIVE = {0: (40, 20), 1: (60, 40), 2: (100, 80)}


def make_run(
    folder,
    *,
    method=None,
    num_steps=10,
    every=1,
    evaluate=True,
    manifest=True,
    steps=10,
    phases=(4, 6, 10),
    objective="causal",
    gpu=False,
):
    """A run directory as a training loop that did not note layouts left it after `num_steps`."""
    folder.mkdir(exist_ok=True)
    sections = [{**phase, "until": until} for phase, until in zip(PHASES, phases)]
    config = RunConfig.model_validate(
        {
            "run_dir": str(folder / "run"),
            "steps": steps,
            "model": TINY_MODEL,
            "method": method or {"name": "est", "phases": sections},
            "objective": {"name": objective},
            "data": {
                "train": str(folder / "train"),
                "valid": str(folder / "valid"),
                "tokenizer": "absent",
                "sequence": 64,
            },
            "batch": {"global": 8, "micro": 2},
            "optimizer": {"lr": 1e-3},
            "checkpoint": {"every": 5},
            "evaluate": {"every": 5, "sequences": 4},
            "log": {"every": every},
        }
    )
    write_config(config)
    if manifest:
        write_manifest(str(folder / "valid"), entropy=5.5)
    metrics = MetricsFile(folder / "run", 0, {})
    for step in range(num_steps):
        phase = sum(step >= p["until"] for p in PHASES)
        flops, blocks = ACTIVE[phase] if method is None else ACTIVE[2]
        if (step + 1) % every == 0 or step + 1 in (4, 6, 10):
            metrics.write(
                step=step,
                phase=PHASES[phase]["name"],
                loss=6.0 - step / 10,
                lr=1e-3,
                grad_norm=1.0,
                tokens=(step + 1) * 512,
                step_s=STEP_S[step],
                tokens_per_s=512 / STEP_S[step],
                flops_active=flops,
                flops_dense=100,
                blocks_active=blocks,
                blocks_dense=80,
                kept_layers=4,
                **(use_of_gpus(step, flops) if gpu else {}),
            )
        if evaluate and (step + 1) % 5 == 0:
            metrics.write(step=step, eval_loss=5.0 - step / 10)
    metrics.close()
    return folder / "run"


def use_of_gpus(step, flops):
    """What lines of steps on GPUs have besides."""
    rate = 200 * STEP_S[step]  # FLOPs that they could have done meanwhile
    used = {"mfu": flops / rate, "mfu_dense": 100 / rate, "memory_peak_bytes": (9 - step) * 10**9}
    return {"trained_s": sum(STEP_S[: step + 1]), **used}


def write_manifest(prefix, *, entropy, num_tokens=3, text_bytes=1):
    manifest = Manifest(
        format_version=1,
        num_tokens=num_tokens,
        num_documents=3,
        dtype="uint16",
        vocabulary=512,
        bos_id=None,
        eos_id=None,
        text_bytes=text_bytes,
        unigram_entropy=entropy,
        tokenizer_sha256="0" * 64,
        bin_bytes=1,
        idx_bytes=1,
        bin_sha256="0" * 64,
        idx_sha256="0" * 64,
    )
    manifest_path(prefix).write_text(manifest.model_dump_json())
