"""Megatron's `.idx` files: written, and read with a check against the file they describe.

Layout, little endian: magic (9 bytes), version (u64), type code (u8), number of
sequences S (u64), number of document boundaries D (u64), then S lengths in tokens
(i32), S byte offsets into `.bin` (i64) and D sequence numbers where documents begin
(i64, the last one is S).
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from est_ds.errors import UserError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_BLOCK_ENTRIES = 1 << 20
AGAIN = "copy the files again or pack the corpus again with `python -m data_prep pack`."

# DeepSpeed and Megatron / GPT-NeoX agree up to 5. Above, DeepSpeed has uint16, uint32,
# uint64 and Megatron has two float types (never tokens) and uint16. So 8 is uint16 or
# uint64, and the size of `.bin` tells which.
_DTYPES = {
    1: ["u1"],
    2: ["i1"],
    3: ["i2"],
    4: ["i4"],
    5: ["i8"],
    6: ["u2"],
    7: ["u4"],
    8: ["u2", "u8"],
}


# Of the types that `data_prep pack` writes, by who is to read them.
WRITTEN_CODES = {"deepspeed": {"int32": 4, "uint16": 6}, "megatron": {"int32": 4, "uint16": 8}}


@dataclass(frozen=True)
class Header:
    """What an `.idx` file says, after `read_header` found it consistent.

    Attributes:
        type_code: As written in the file.
        dtype: Little-endian type of one token in `.bin`.
        num_sequences: S; one a document in corpora made by `data_prep pack`.
        num_boundaries: D, the number of documents plus one.
        bin_bytes: Size of `.bin`.
        idx_bytes: Size of `.idx`.
    """

    prefix: str
    type_code: int
    dtype: np.dtype
    num_sequences: int
    num_boundaries: int
    bin_bytes: int
    idx_bytes: int

    @property
    def num_tokens(self) -> int:
        return self.bin_bytes // self.dtype.itemsize

    @property
    def num_documents(self) -> int:
        return self.num_boundaries - 1

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Memory maps of the lengths [S], byte offsets [S] and boundaries [D]."""
        return _arrays(f"{self.prefix}.idx", self.num_sequences, self.num_boundaries)

    def check_entries(self) -> None:
        """Checks every entry of `.idx`, of which `read_header` looks at the ends only: sequences
        follow one another without a gap, and so do documents.

        Reads the whole `.idx`, 20 bytes a document.

        Raises:
            UserError: They do not.
        """
        lengths, offsets, boundaries = self.arrays()
        size = self.dtype.itemsize
        for first in range(0, self.num_sequences, _BLOCK_ENTRIES):
            part = slice(first, first + _BLOCK_ENTRIES + 1)
            ends = offsets[part] + lengths[part].astype(np.int64) * size
            wrong = lengths[part] < 0
            wrong[1:] |= ends[:-1] != offsets[part][1:]
            self._refuse("sequence", first, wrong)
        for first in range(0, self.num_documents, _BLOCK_ENTRIES):
            wrong = np.diff(boundaries[first : first + _BLOCK_ENTRIES + 1]) < 0
            self._refuse("document", first + 1, wrong)

    def _refuse(self, what: str, first: int, wrong: np.ndarray) -> None:
        if wrong.any():
            raise UserError(
                f"{self.prefix}.idx: its entries do not follow one another without a gap (the "
                f"first that does not is that of {what} {first + int(wrong.argmax()):,}); {AGAIN}"
            )

    def tokens(self) -> np.ndarray:
        """Memory map of the tokens [num_tokens]."""
        return np.memmap(f"{self.prefix}.bin", self.dtype, mode="r")


def write_index(path: Path, dtype: np.dtype, type_code: int, lengths: np.ndarray) -> None:
    """Writes the `.idx` of documents that lie in `.bin` one after the other.

    Args:
        dtype: uint16 or int32.
        type_code: its number, of `WRITTEN_CODES`.
        lengths: Tokens of every document, at most 2**31 - 1, int [documents].
    """
    count = len(lengths)
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    with path.open("wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, type_code, count, count + 1))
        file.write(lengths.astype("<i4").tobytes())
        file.write((ends - lengths.astype(np.int64) * dtype.itemsize).astype("<i8").tobytes())
        file.write(np.arange(count + 1, dtype="<i8").tobytes())


def _arrays(path, num_sequences, num_boundaries):
    # One map for the three: a map holds a file descriptor, and a corpus may have many shards.
    index = np.memmap(path, np.uint8, mode="r")
    arrays, offset = [], _HEADER.size
    for dtype, count in (("<i4", num_sequences), ("<i8", num_sequences), ("<i8", num_boundaries)):
        arrays.append(np.frombuffer(index, dtype, count, offset))
        offset += arrays[-1].nbytes
    return tuple(arrays)


def read_header(prefix: str) -> Header:
    """Reads the header of `PREFIX.idx` and checks it against both files.

    Costs the same for every size of corpus: besides the header only the first and the
    last sequence are read.

    Raises:
        UserError: A file is missing, truncated or foreign, or the two do not match.
    """
    idx, bin_ = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (idx, bin_):
        if not path.is_file():
            raise UserError(
                f"corpus {prefix}: {path} does not exist; give the common prefix of the .bin and "
                f".idx files without the ending, or make them with `python -m data_prep pack`."
            )
    idx_bytes, bin_bytes = idx.stat().st_size, bin_.stat().st_size
    with idx.open("rb") as file:
        head = file.read(_HEADER.size)
    if len(head) < _HEADER.size or not head.startswith(_MAGIC):
        raise UserError(
            f"{idx}: not an index of Megatron's indexed dataset (.idx), or cut off; {AGAIN}"
        )
    _, version, type_code, num_sequences, num_boundaries = _HEADER.unpack(head)
    if version != 1 or type_code not in _DTYPES:
        raise UserError(
            f"{idx}: version {version}, type code {type_code}; allowed are version 1 and type "
            f"codes 1 to 8 (integer tokens); {AGAIN}"
        )
    if num_sequences < 1 or num_boundaries < 2:
        raise UserError(f"{idx}: holds no document; at least one is needed; {AGAIN}")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if idx_bytes != expected:
        raise UserError(
            f"{idx}: {idx_bytes} bytes instead of the {expected} that its header announces; {AGAIN}"
        )
    lengths, offsets, boundaries = _arrays(idx, num_sequences, num_boundaries)
    last, length = int(offsets[-1]), int(lengths[-1])
    dtypes = [np.dtype(f"<{name}") for name in _DTYPES[type_code]]
    dtype = next((d for d in dtypes if last + length * d.itemsize == bin_bytes), None)
    if dtype is None:
        raise UserError(
            f"{bin_}: {bin_bytes} bytes instead of the {last + length * dtypes[0].itemsize} that "
            f"{idx.name} announces: truncated, or from another corpus; {AGAIN}"
        )
    if bin_bytes == 0 or offsets[0] != 0 or boundaries[0] != 0 or boundaries[-1] != num_sequences:
        raise UserError(f"{idx}: its offsets do not cover {bin_.name} from end to end; {AGAIN}")
    return Header(
        str(prefix), type_code, dtype, num_sequences, num_boundaries, bin_bytes, idx_bytes
    )
