"""Verb `pack`: documents into Megatron's indexed dataset, with a manifest."""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import sentencepiece

from data_prep.documents import Document, list_sources, read_documents, report_skipped
from data_prep.files import staged
from est_ds.data.indexed import file_sha256, tokenizer_sha256
from est_ds.data.manifest import FORMAT_VERSION, Manifest, manifest_path
from est_ds.errors import UserError

_BATCH_CHARACTERS = 1 << 22
_REPORT_S = 5.0


def pack(inputs: list[Path], tokenizer: Path, out: str, workers: int) -> None:
    """Writes `OUT.bin`, `OUT.idx` and `OUT.manifest.json`.

    Each document becomes BOS + tokens + EOS (whichever of the two the tokenizer has), one
    sequence and one document of the index. Tokens are uint16 where the vocabulary fits,
    else int32; the type codes are DeepSpeed's. The output does not depend on `workers`.

    Raises:
        UserError: Wrong input, or no document.
    """
    if workers < 1:
        raise UserError(f"--workers={workers} is not allowed; use at least 1.")
    processor = load_processor(tokenizer)
    vocabulary = processor.vocab_size()
    prefix = [processor.bos_id()] if processor.bos_id() >= 0 else []
    suffix = [processor.eos_id()] if processor.eos_id() >= 0 else []
    dtype = np.uint16 if vocabulary <= 1 << 16 else np.int32
    sources = list_sources(inputs)
    skipped, counts = Counter(), np.zeros(vocabulary, np.int64)
    num_documents = text_bytes = 0

    from deepspeed.runtime.data_pipeline.data_sampling import indexed_dataset

    targets = [Path(f"{out}.bin"), Path(f"{out}.idx"), manifest_path(out)]
    with staged(*targets) as (bin_, idx, manifest_file):
        builder = indexed_dataset.MMapIndexedDatasetBuilder(str(bin_), dtype=dtype)
        started = reported = time.monotonic()
        for batch in _batches(read_documents(sources, skipped)):
            texts = [document.text for document in batch]
            packed = [
                np.array(prefix + ids + suffix, dtype)
                for ids in processor.encode(texts, num_threads=workers)
            ]
            for tokens in packed:
                builder.add_item_numpy(tokens)
                builder.end_document()
            counts += np.bincount(np.concatenate(packed), minlength=vocabulary)
            num_documents += len(batch)
            text_bytes += sum(len(text.encode()) for text in texts)
            if time.monotonic() - reported > _REPORT_S:
                reported = time.monotonic()
                elapsed_s = reported - started
                print(
                    f"{num_documents:,} documents, {counts.sum():,} tokens, {elapsed_s:.0f} s",
                    flush=True,
                )
        builder.finalize(str(idx))
        if not num_documents:
            raise UserError("--input: no document with text in it; give other files.")
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            num_tokens=int(counts.sum()),
            num_documents=num_documents,
            dtype=np.dtype(dtype).name,
            vocabulary=vocabulary,
            bos_id=prefix[0] if prefix else None,
            eos_id=suffix[0] if suffix else None,
            text_bytes=text_bytes,
            unigram_entropy=unigram_entropy(counts),
            tokenizer_sha256=tokenizer_sha256(tokenizer),
            bin_bytes=bin_.stat().st_size,
            idx_bytes=idx.stat().st_size,
            bin_sha256=file_sha256(bin_),
            idx_sha256=file_sha256(idx),
        )
        manifest_file.write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        # Between the moves no old manifest may vouch for new files.
        targets[-1].unlink(missing_ok=True)
    print(
        f"{out}: {num_documents:,} documents, {manifest.num_tokens:,} tokens, "
        f"{text_bytes / manifest.num_tokens:.2f} bytes a token, "
        f"unigram entropy {manifest.unigram_entropy:.4f} nats"
    )
    report_skipped(skipped)


def load_processor(directory: Path) -> sentencepiece.SentencePieceProcessor:
    """Loads `DIRECTORY/tokenizer.model`.

    Raises:
        UserError: There is none, or it is not a sentencepiece model.
    """
    tokenizer_sha256(directory)  # says what to do if the file is missing
    path = Path(directory) / "tokenizer.model"
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
    except RuntimeError:
        raise UserError(
            f"--tokenizer: {path} is not a sentencepiece model; copy it again or train one with "
            f"`python -m data_prep tokenizer`."
        ) from None


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats per token of the frequencies [vocabulary]."""
    shares = counts[counts > 0] / counts.sum()
    return max(0.0, float(-(shares * np.log(shares)).sum()))


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    """Documents in order, in groups of a few million characters (at least one document)."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
