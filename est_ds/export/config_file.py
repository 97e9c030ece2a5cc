"""What an exported config.json says besides the run's model: token ids, and older readers' keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from est_ds.data.encoders import Encoder
from est_ds.data.manifest import Manifest
from est_ds.design import Design


def special_ids(
    design: Design, encoder: Encoder, manifest: Manifest | None, tokenizer: Any
) -> dict[str, int | None]:
    """The special ids that the model was trained with, by the names of a Hugging Face config.

    A config of its own would have the family's defaults, which are another tokenizer's.

    Args:
        manifest: of a corpus that the tokenizer made: what stands around its documents.
        tokenizer: the exported one, which may have a padding token.
    """
    config = design.hf_config
    ids = {"bos_token_id": encoder.bos_id, "eos_token_id": encoder.eos_id}
    for name in ("bos", "eos"):
        if manifest and (id_ := getattr(manifest, f"{name}_id")) is not None:
            ids[f"{name}_token_id"] = id_
    start = design.decoder_start
    # Labels that are ignored become padding in the decoder's inputs, which must be some token.
    given = "pad_token_id" in design.config.model or start is not None
    ids["pad_token_id"] = config.pad_token_id if given else None
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id < config.vocab_size:
        ids["pad_token_id"] = tokenizer.pad_token_id
    if start is not None:
        ids["decoder_start_token_id"] = start
    return ids


def complete_config(folder: Path, ids: dict[str, int | None]) -> None:
    """Writes special ids into a folder's config.json and generation_config.json, and into the first
    what readers older than transformers 5 look for.

    What transformers 5 reads back is the same but for the ids.

    Args:
        ids: by the names of the fields.
    """
    generation = folder / "generation_config.json"
    if generation.is_file():
        _update(generation, ids)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    older: dict[str, Any] = {"torch_dtype": config["dtype"]}
    if rope := config.get("rope_parameters"):
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        older["rope_theta"] = rope["rope_theta"]
        older["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    if config.get("scale_decoder_outputs") is False:
        older["tie_word_embeddings"] = False  # T5's own head, which they would tie
    _update(file, ids | older)


def _update(file: Path, fields: dict[str, Any]) -> None:
    content = json.loads(file.read_text()) | fields  # null where the family has a default
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
