"""Corpora of given documents."""

import numpy as np
from deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset import MMapIndexedDatasetBuilder


def write_corpus(prefix, documents, dtype=np.uint16):
    """A corpus as Megatron's tools leave it: .bin and .idx, no manifest."""
    builder = MMapIndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_item_numpy(np.asarray(document, dtype))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return prefix
