"""`model.from`: a run that begins with the weights of a Hugging Face folder, or of the Hub.

The section becomes the folder's config.json, with the run file's own fields above it, and the hash
of the weights. So a run directory needs the folder no more once it holds a checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from est_ds.config.yaml12 import read_mapping
from est_ds.disk import describe
from est_ds.errors import UserError

FROM, SHA256 = "from", "from_sha256"
CONFIG, WEIGHTS = "config.json", "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
TAKEN = ("*.json", "*.safetensors", "*.txt", "*.model")  # of a repository of the Hub
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# What a published config.json says of its own weights and of use, not of training.
NOT_OF_TRAINING = (
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "use_cache",
    "id2label",
    "label2id",
    "problem_type",
    "task_specific_params",
    "output_past",
    "gradient_checkpointing",
    "n_ctx",
    "n_special",
    "predict_special_tokens",
    "is_llama_config",
    "transformers.js_config",
    "directionality",
    "pooler_fc_size",
    "pooler_num_attention_heads",
    "pooler_num_fc_layers",
    "pooler_size_per_head",
    "pooler_type",
)
ROPE = ("rope_parameters", "rope_theta", "rope_scaling")  # today's name, and the older ones
# And what means nothing in the config.json of a model_type, though it may elsewhere: a T5's
# positions are relative, and a Mamba's says some of it again in the words of its first code.
IDLE_OF_TYPE = {
    "t5": ("n_positions",),
    "mamba": (
        "d_inner",
        "d_model",
        "fused_add_norm",
        "n_layer",
        "pad_vocab_size_multiple",
        "rms_norm",
        "ssm_cfg",
    ),
}


def of_training(config: dict[str, Any]) -> dict[str, Any]:
    """What a Hugging Face config.json says of the model that is trained."""
    idle = (*NOT_OF_TRAINING, *IDLE_OF_TYPE.get(str(config.get("model_type")), ()))
    return {k: value for k, value in config.items() if k not in idle and not k.startswith("_")}


def published_config(folder: Path) -> dict[str, Any]:
    """The model section that a folder's config.json is.

    Raises:
        UserError: it cannot be read.
    """
    return of_training(read_mapping(folder / CONFIG, "config of the weights (model.from)"))


def anchored(section: dict[str, Any], folder: Path) -> None:
    """Makes `from` absolute where it names a folder in `folder`."""
    name = section.get(FROM)
    if isinstance(name, str) and name and (folder / name).is_dir():
        section[FROM] = os.path.abspath(folder / name)


def with_weights(section: dict[str, Any], run_dir: Any) -> dict[str, Any]:
    """A model section with what its `from` holds.

    Args:
        run_dir: of the run: what it began with, it goes on with.

    Raises:
        UserError: there are no such weights, or they are not those of `from_sha256`.
    """
    if FROM not in section:
        if SHA256 in section:
            raise UserError(f"model.{SHA256} has no effect without model.{FROM}; remove it.")
        return section
    name, pinned = section[FROM], section.get(SHA256)
    if not isinstance(name, str) or not name:
        raise UserError(f"model.{FROM}={name!r}: give a folder of Hugging Face, or a Hub's name.")
    if "init" in section:
        raise UserError(
            f"model.init cannot take effect beside model.{FROM}={name!r}, which gives the first "
            f"weights; remove one of them."
        )
    anchored(section, Path())
    name = section[FROM]
    own = {key: value for key, value in section.items() if key not in (FROM, SHA256)}
    begun = _begun(run_dir, name)
    if begun is None:
        folder = folder_of(name)
        config, sha256 = published_config(folder), weights_sha256(folder)
    else:
        config, sha256 = begun, begun.pop(SHA256)
    if pinned not in (None, sha256):
        raise UserError(
            f"model.{SHA256}={pinned!r} is not the hash of the weights in {name!r}, which is "
            f"{sha256}; give that folder, or correct the hash."
        )
    return {FROM: name, SHA256: sha256, **_above(config, own)}


def _above(config: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A folder's config with the run file's own fields above it. Those of RoPE, which have older
    and newer names, stand above one another one by one."""
    theirs, given = ({k: side[k] for k in ROPE if k in side} for side in (config, own))
    rope, changed = _rope(theirs), _rope(given)
    if not theirs or not given or rope is None or changed is None:
        return {**config, **own}
    if "rope_type" in changed:  # another scaling, with its own numbers
        rope = {key: rope[key] for key in rope if key == "rope_theta"}
    others = {key: value for key, value in {**config, **own}.items() if key not in ROPE}
    return {**others, ROPE[0]: rope | changed}


def _rope(fields: dict[str, Any]) -> dict[str, Any] | None:
    """Fields of RoPE in today's words; None if they are none, or contradict each other."""
    found: dict[str, Any] = {}
    if "rope_scaling" in fields and fields["rope_scaling"] is None:
        found["rope_type"] = "default"
    for part in (fields.get("rope_scaling"), fields.get(ROPE[0])):
        if not isinstance(part, dict | None):
            return None
        found |= {"rope_type" if key == "type" else key: x for key, x in (part or {}).items()}
    theta = fields.get("rope_theta")
    if theta is not None and found.setdefault("rope_theta", theta) != theta:
        return None
    return found


def _begun(run_dir: Any, name: str) -> dict[str, Any] | None:
    """The section of a run that has begun with these weights; None if there is none."""
    if not isinstance(run_dir, str) or not has_begun(Path(run_dir)):
        return None
    try:
        section = read_mapping(Path(run_dir) / "config.yaml", "run file")["model"]
        return dict(section) if section.pop(FROM) == name and SHA256 in section else None
    except (OSError, UserError, KeyError, AttributeError):
        return None  # `run.directory.check_run_dir` says what is wrong with it


def has_begun(run_dir: Path) -> bool:
    """Whether a run has a checkpoint, from which it goes on."""
    return (run_dir / "checkpoints" / "latest").exists()


@cache
def folder_of(name: str) -> Path:
    """The folder of weights: a local one, or that of a repository of the Hub, which is fetched.

    Args:
        name: a folder, or a name of the Hub. `HF_ENDPOINT` and `HF_HOME` mean what they mean to
            huggingface_hub.

    Raises:
        UserError: there is none, or the Hub cannot be reached.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise UserError(
                f"model.{FROM}={name!r} holds no {CONFIG}; give a folder as save_pretrained or "
                f"est-ds export writes it."
            )
        return folder
    if folder.is_absolute() or not HUB_NAME.fullmatch(name):
        raise UserError(
            f"model.{FROM}={name!r} is no folder; give one that holds {CONFIG} and {WEIGHTS}, or "
            f"the name of a repository of the Hub (OWNER/NAME)."
        )
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    endpoint = os.environ.get("HF_ENDPOINT") or constants.ENDPOINT
    try:
        return Path(snapshot_download(name, endpoint=endpoint, allow_patterns=list(TAKEN)))
    except Exception as e:  # whatever the library raises without a network, or such a name
        raise UserError(
            f"model.{FROM}={name!r} is no folder here, and {endpoint} does not give it "
            f"({type(e).__name__}: {' '.join(str(e).split())[:160]}); fetch it where there is a "
            f"network (hf download {name} --local-dir DIR), and give model.{FROM}=DIR."
        ) from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in order.

    Raises:
        UserError: there is none, or one that the index names is missing.
    """
    names = [WEIGHTS]
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(
                f"{folder / INDEX} cannot be read ({type(e).__name__}); copy the folder again."
            ) from None
    for name in names:
        if not (folder / name).is_file():
            raise UserError(
                f"model.{FROM}: {str(folder / name)!r} does not exist; weights are read from "
                f"safetensors alone: copy it, or write them so "
                f"(AutoModel...from_pretrained(DIR).save_pretrained(NEW))."
            )
    return [folder / name for name in names]


def weights_sha256(folder: Path) -> str:
    """SHA-256 of the hashes of a folder's weight files by their names, 64 hex characters."""
    state = hashlib.sha256()
    for file in weight_files(folder):
        status = file.stat()
        digest = _file_sha256(str(file), status.st_size, status.st_mtime_ns)
        state.update(f"{file.name} {digest}\n".encode())
    return state.hexdigest()


@cache
def _file_sha256(file: str, num_bytes: int, changed_ns: int) -> str:
    """The hash of a file; a command reads run files more than once, and weights are large."""
    return describe(Path(file)).sha256
