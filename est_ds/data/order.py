"""The order of training samples: a permutation that is computed, not stored.

Epoch e visits range(num_samples) in the order of a permutation keyed by (seed, e). Any
position is found in constant time and memory, so seeking costs nothing, and neither the
number of processes nor the history of a run enters.

The permutation is a Feistel network over the smallest power of two that holds
num_samples, made a permutation of range(num_samples) by cycle walking: J. Black and
P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002, methods 2 and 3. Round
keys come from Philox, addressed by seed and epoch. The order is fixed for ever: a change
would move every resumed run to other data, and a test holds golden values.
"""

import numpy as np

from est_ds.errors import UserError

_KIND = 0x64617461  # separates these draws from every other use of the same seed
_BLOCK_KIND = 0x646F637300000000  # + the block: the order of documents
_NUM_ROUNDS = 8
# On a handful of samples a minimal network has too few distinct permutations; walking
# in a domain of 256 costs little there.
_MIN_BITS = 8


def positions(first: int, count: int, num_samples: int, seed: int, corpus: int = 0) -> np.ndarray:
    """Sample ids at the positions first, ..., first + count - 1 of a corpus's order.

    Position p lies in epoch p // num_samples. Within an epoch each id in
    range(num_samples) comes exactly once.

    Args:
        corpus: index among the corpora of a mixture; each has orders of its own.

    Returns:
        int64 [count].

    Raises:
        UserError: seed is outside [0, 2**64).
    """
    assert first >= 0 and count >= 0 and 1 <= num_samples < 2**62
    if not 0 <= seed < 2**64:
        raise UserError(f"seed={seed} is not allowed; use a whole number from 0 to 2**64 - 1.")
    ids = np.empty(count, np.int64)
    done = 0
    while done < count:
        epoch, start = divmod(first + done, num_samples)
        length = min(num_samples - start, count - done)
        keys = _keys(_NUM_ROUNDS, seed, epoch, corpus, _KIND)
        ids[done : done + length] = _permuted(start, length, num_samples, keys)
        done += length
    return ids


def shuffled_block(length: int, seed: int, epoch: int, corpus: int, block: int) -> np.ndarray:
    """A uniform permutation of range(length), int64, for one block of a corpus's documents."""
    keys = _keys(length, seed, epoch, corpus, _BLOCK_KIND + block)
    return np.argsort(keys, kind="stable")


def _keys(n: int, seed: int, epoch: int, corpus: int, kind: int) -> np.ndarray:
    # The corpus stands in the upper half of Philox's key, which is 0 for a seed alone.
    key = seed + (corpus << 64)
    return np.random.Philox(key=key, counter=[0, kind, 0, epoch]).random_raw(n)


def _permuted(start: int, length: int, num_samples: int, keys: np.ndarray) -> np.ndarray:
    """Images of start, ..., start + length - 1 in the permutation that the keys define."""
    num_bits = max(_MIN_BITS, (num_samples - 1).bit_length())
    ids = _feistel(np.arange(start, start + length, dtype=np.uint64), keys, num_bits)
    outside = np.flatnonzero(ids >= num_samples)
    while outside.size:
        ids[outside] = _feistel(ids[outside], keys, num_bits)
        outside = outside[ids[outside] >= num_samples]
    return ids.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, num_bits: int) -> np.ndarray:
    """A keyed permutation of range(2**num_bits), element by element (uint64)."""
    low_bits = np.uint64(num_bits // 2)
    low_mask = np.uint64((1 << num_bits // 2) - 1)
    high_mask = np.uint64((1 << num_bits - num_bits // 2) - 1)
    low, high = values & low_mask, values >> low_bits
    for low_key, high_key in zip(keys[::2], keys[1::2], strict=True):
        low = low ^ (_mix(high ^ low_key) & low_mask)
        high = high ^ (_mix(low ^ high_key) & high_mask)
    return (high << low_bits) | low


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: every output bit depends on every input bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
