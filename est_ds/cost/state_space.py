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
