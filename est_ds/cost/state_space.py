"""Matrix products of a state-space mixer, forward alone. No torch.

Projections: Mamba's `in_proj`, `x_proj`, `dt_proj` and `out_proj`; Mamba2's `in_proj` and
`out_proj`. Of the scan, as the library computes it without kernels:

- Mamba goes from position to position, and only the product of a state with C is a matrix product:
  2 x channels x state a token. The recurrence itself multiplies element by element.
- Mamba2 (arXiv 2405.21060, section 6) goes by chunks of Q positions, the last one padded to its
  full length: C of n chunks times B (Q x Q x state), the scores times the values (Q x Q x width),
  the states of the chunks (Q x width x state), what they hand on ((n + 1)^2 x width x state), and
  what is read of it (Q x width x state), for every head.

The depthwise convolution multiplies every channel by numbers of its own: like norms, gates and
activations it is no matrix product, and not counted.
"""

from __future__ import annotations

from est_ds.plans.shape import StateSpace


def projected(part: StateSpace, columns: float) -> float:
    """Returns the FLOPs of the projections of one token where some columns are kept."""
    return 2.0 * weights(part, columns)


def weights(part: StateSpace, columns: float) -> float:
    """Returns the weights of the projections of kept columns; none of a part that is skipped."""
    if not columns:
        return 0.0
    channels = columns * part.width
    if part.step_rank is None:
        shared = 2 * part.groups * part.state  # B and C, whatever is kept
        return part.hidden * (3 * channels + columns + shared)
    read = part.step_rank + 2 * part.state
    return channels * (3 * part.hidden + read + part.step_rank)


def scanned(part: StateSpace, columns: float, sequence: int) -> float:
    """Returns the FLOPs of the scan of one token where some columns are kept."""
    channels = columns * part.width
    if part.chunk is None:
        return 2.0 * channels * part.state
    chunks = -(-sequence // part.chunk)
    within = part.chunk**2 * (columns * part.state + channels)
    of_states = 2 * part.chunk * channels * part.state
    handed_on = (chunks + 1) ** 2 * channels * part.state
    return 2.0 * (chunks * (within + of_states) + handed_on) / sequence


def kept_bytes(part: StateSpace, value_bytes: int) -> float:
    """Returns the bytes of a token that a whole mixer keeps for its backward outside the scan.

    They are what the projection in gives, the convolution and its activation, step sizes, and of
    every channel what comes out of the scan, its gate, their product and copies of these; in bf16
    also float32 copies of what the scan reads.
    """
    channels = part.columns * part.width
    if part.step_rank is not None:
        read = part.step_rank + 2 * part.state
        copies = 6 * channels if value_bytes == 2 else 0
        return value_bytes * (10 * channels + read) + copies
    convolved = channels + 2 * part.groups * part.state
    values = 4 * channels + 3 * convolved + 2 * part.columns
    return value_bytes * values + (14 if value_bytes == 2 else 4) * channels


def kept_of_scan(part: StateSpace, sequence: int, value_bytes: int) -> float:
    """Returns the bytes of a token that the scan of a whole mixer keeps.

    In float32: Mamba: the decay, what is added and the state itself, channels x state each (in bf16
    the state once more). Mamba2, of every head: B and C twice and B decayed, the scores of a chunk,
    its decays and their product, the decays of a position, and five times the values; of every
    chunk its state twice.
    """
    channels = part.columns * part.width
    if part.chunk is None:
        return (14 if value_bytes == 2 else 12) * channels * part.state
    chunks = -(-sequence // part.chunk)
    of_heads = part.columns * (5 * part.state + 3 * part.chunk + 2)
    of_states = (2 * chunks + 1) * channels * part.state
    return 4 * (chunks * part.chunk * (of_heads + 5 * channels) + of_states) / sequence
