"""What the JSON files of an export say besides the run's model: token ids, lengths, and keys that
other readers look for."""

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
    """Writes special ids into a folder's config.json, and what readers look for that are older than
    transformers 5, or that go by the file alone (llama.cpp's converter).

    What transformers 5 reads back is the same but for the ids.

    Args:
        ids: by the names of the fields.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text())
    older: dict[str, Any] = {"torch_dtype": config["dtype"]}
    if rope := config.get("rope_parameters"):
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        older["rope_theta"] = rope["rope_theta"]
        older["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    if config.get("scale_decoder_outputs") is False:
        older["tie_word_embeddings"] = False  # T5's own head, which they would tie
    if config["model_type"] == "gpt2":
        older["n_ctx"] = config["n_positions"]
    _update(file, ids | older)


def complete_generation(
    folder: Path, ids: dict[str, int | None], padding: int | None, positions: int | None
) -> None:
    """Writes into a folder's generation_config.json where generation stops, if there is one.

    Args:
        ids: special ids by the names of the fields.
        padding: id that fills up the shorter rows of a batch: the tokenizer's.
        positions: tokens that the model takes; None: any number.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        return
    content = json.loads(file.read_text())
    content.pop("_from_model_config", None)  # it is more than that
    file.write_text(json.dumps(content))
    longest = {} if positions is None else {"max_length": positions}
    _update(file, ids | {"pad_token_id": padding} | longest)


def complete_tokenizer(folder: Path, tokenizer: Any, design: Design, padding: int | None) -> None:
    """Writes into a folder's tokenizer_config.json the longest text, and how batches are padded.

    A tokenizer without a padding token that the model knows gets one: the model's, or else EOS, as
    `generate()` takes it. The model's own config.json has none then: a row of its embedding would
    not train on in transformers. Where texts are not continued at their right end, padding stands
    there, so that the first token is at position 0 as in training.

    Args:
        padding: the model's padding id.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return  # nor are there special tokens
    is_continued = design.family.auto_class == "AutoModelForCausalLM"
    fields: dict[str, Any] = {} if is_continued else {"padding_side": "right"}
    if (positions := design.family.shape(design.hf_config).sequence) is not None:
        fields["model_max_length"] = positions
    own = tokenizer.pad_token_id
    if own is None or own >= design.hf_config.vocab_size:
        is_special = padding in tokenizer.all_special_ids
        token = tokenizer.convert_ids_to_tokens(padding) if is_special else tokenizer.eos_token
        fields |= {} if token is None else {"pad_token": token}
    _update(file, fields)


def _update(file: Path, fields: dict[str, Any]) -> None:
    content = json.loads(file.read_text()) | fields  # null where the family has a default
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
