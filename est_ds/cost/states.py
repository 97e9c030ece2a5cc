"""What a process keeps of weights, gradients and optimizer, as DeepSpeed 0.19 keeps it. No torch.

n parameters of the process's pipe stage, d replicas, w bytes of a weight (2 in bf16, 4 in fp32), a
bucket of b elements. Held from step to step:

| ZeRO | weights | optimizer | else |
| --- | --- | --- | --- |
| 0 (fp32 alone) | w n | 8 n (AdamW's moments) | |
| 1, 2 | w n | 12 n / d (a float32 copy of the weights too; in fp32 8 n / d without `offload`) | |
| 3 | w n / d, and w times the parameters of `stage3_param_persistence_threshold` or fewer | 12 n / d | sums of gradients 4 n / d, bucket 4 b |

`optimizer.inactive=freeze` adds a count of steps to the optimizer, as large as a moment. With
`parallel.offload` the optimizer is on the host, with gradients of 4 n / d (ZeRO 3: twice).

Within a step gradients are added up in float32: 4 n with ZeRO 0 and 1, 4 n / d with ZeRO 2 and 3.
Where they are reduced there are a bucket and a flat copy of it; with ZeRO 1 a bucket, where several
replicas reduce, of the kept units of what it takes, and what the replica steps
(`engine/reduction.py`). All of it was read off torch's allocator (`tests/benchmarks/memory.py`).
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from est_ds.config.deepspeed_keys import reduces_flat, steps_in_place
from est_ds.config.run_config import RunConfig

FALLBACK_BUCKET = 500_000_000  # elements that DeepSpeed flattens at once without ZeRO
# Temporaries of an element in a step with `inactive: freeze`, five numbers and a truth value, and
# how many elements are stepped at once.
FREEZING_BYTES, AT_ONCE = 21.0, 1 << 22
# DeepSpeed's defaults for ZeRO 3, in elements.
PERSISTS, REUSED_WITHIN, PREFETCHED = 100_000, 1_000_000_000, 50_000_000


@dataclass(frozen=True)
class Process:
    """One process of a layout.

    Attributes:
        parameters: of its pipe stage.
        tensors: their sizes, in elements; what is missing of `parameters` are vectors.
        data_parallel: replicas.
        trained: parameters that get a gradient in a step, on average.
        reduced: elements of these that replicas send each other where est_ds reduces.
        on_gpu: NCCL reduces; gloo copies what it scatters.
    """

    config: RunConfig
    parameters: int
    tensors: tuple[int, ...]
    data_parallel: int
    trained: float
    reduced: float
    on_gpu: bool

    @property
    def zero(self) -> int:
        return self.config.parallel.zero

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return 2 if self.config.precision == "bf16" else 4

    @property
    def share(self) -> float:
        """Parameters of this replica's share."""
        return self.parameters / self.data_parallel

    @property
    def keeps_gradients(self) -> bool:
        """Whether ZeRO 2 keeps the gradients of a backward to its end: with `draw: micro_batch`,
        where replicas reduce those of all together."""
        return self.zero == 2 and self.config.method.get("draw") == "micro_batch"

    @property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(self.tensors, default=0)

    def option(self, name: str, default: Any) -> Any:
        """An option of DeepSpeed's section on ZeRO."""
        return self.config.deepspeed.get("zero_optimization", {}).get(name, default)

    @property
    def bucket(self) -> float:
        """Elements that are reduced at once; those that are set aside."""
        if self.zero == 0:
            return min(FALLBACK_BUCKET, self.parameters)
        return self.option("reduce_bucket_size", min(FALLBACK_BUCKET, self.parameters))

    @property
    def persistent(self) -> float:
        """Parameters that ZeRO 3 never cuts; one replica holds all as its share."""
        if self.data_parallel == 1:
            return 0.0
        limit = self.option("stage3_param_persistence_threshold", PERSISTS)
        cut = sum(size for size in self.tensors if size > limit)
        return self.parameters - cut

    @property
    def cut(self) -> float:
        """Parameters that ZeRO 3 cuts, of what a step uses."""
        return max(0.0, self.trained - self.persistent)

    @property
    def gathered(self) -> tuple[float, float]:
        """Parameters that ZeRO 3 has whole at the turn from forward to backward, the persistent
        ones aside, and what it fetches ahead.

        It keeps what its trace uses again within `stage3_max_reuse_distance` elements: at the turn
        the last half of that. What it fetches is there twice while it is put together.
        """
        if self.data_parallel == 1:
            return 0.0, 0.0
        cut = self.cut
        within = self.option("stage3_max_reuse_distance", REUSED_WITHIN) / 2
        ahead = self.option("stage3_prefetch_bucket_size", PREFETCHED)
        return max(self.largest, min(within, cut)), min(ahead, cut)


@dataclass(frozen=True)
class States:
    """Bytes of model states and of what moves them.

    Attributes:
        host: on the host, with `parallel.offload`.
    """

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    buckets: float = 0.0
    gathered: float = 0.0
    host: float = 0.0

    def __add__(self, other: States) -> States:
        return States(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))


def held(process: Process) -> States:
    """What is there between two steps."""
    zero, share, width = process.zero, process.share, process.width
    counts = process.config.optimizer.inactive == "freeze"
    copies = zero > 0 and not steps_in_place(process.config)
    optimizer = (8 + 4 * counts + 4 * copies) * (share if zero else process.parameters)
    weights: float = width * process.parameters
    gradients = buckets = host = 0.0
    if zero == 3:
        weights = width * (share + process.persistent)
        gradients, buckets = 4 * share, 4 * process.bucket
    if process.config.parallel.offload:
        host, optimizer = optimizer + 4 * share, 0.0
        if zero == 3:
            host, gradients = host + gradients, 0.0
        else:
            host += width * (share + process.largest)
            buckets += width * process.largest
    return States(weights, gradients, optimizer, buckets, 0.0, host)


def gathered(process: Process, forward: bool) -> States:
    """What ZeRO 3 has whole of the shares: at the end of a forward, or in a backward."""
    if process.zero < 3:
        return States()
    whole, ahead = process.gathered
    more = ahead if forward or whole < process.cut else 0.0
    return States(gathered=process.width * (whole + more))


def before_backward(process: Process, accumulated: bool) -> States:
    """What a micro-batch finds of gradients.

    Args:
        accumulated: there was another one in the step.
    """
    if not accumulated or process.zero == 3:
        return States()
    if process.zero == 2:
        return States(gradients=4 * process.share)
    return States(gradients=4 * process.trained, buckets=_buckets(process))


def within_backward(
    process: Process, accumulated: bool, done: float, reducing: bool = False
) -> States:
    """What a backward has added.

    Args:
        done: parameters whose gradients have come.
        reducing: a bucket is full, and reduced.
    """
    if process.keeps_gradients:
        return States(gradients=process.width * done, buckets=_buckets(process))
    if process.zero >= 2:
        full = done >= process.bucket
        copies = _reducing(process) if full and reducing else 0.0
        first = 4 * process.share if full and process.zero == 2 and not accumulated else 0.0
        return States(gradients=first, buckets=_buckets(process) + copies)
    if accumulated:
        return States(gradients=process.width * process.largest)
    return States(gradients=4 * done, buckets=_buckets(process) if done else 0.0)


def reduction(process: Process, accumulated: bool) -> States:
    """The most that is there behind the last backward, where gradients are reduced."""
    share, bucket = 4 * process.share, min(process.bucket, process.trained)
    if reduces_flat(process.config):
        if process.data_parallel == 1:
            return States(gradients=4 * process.trained + share)
        sent = min(process.bucket, process.reduced)
        joined = 4 * process.trained * sent / process.reduced
        left = 4 * process.trained - joined
        return States(gradients=left + max(joined, share), buckets=4 * sent)
    if process.zero == 0:
        return States(gradients=4 * process.trained, buckets=4 * bucket)
    if process.zero >= 2:
        # In bf16 the share's sums have a buffer of their own; in fp32 there is one for every
        # bucket after the first, and one for the sum of all micro-batches.
        sums = 1 if process.width == 2 else accumulated + (bucket < process.trained)
        grads = 0.0 if process.zero == 3 else share * sums
        one = process.width * process.largest if process.gathered[0] and process.zero == 3 else 0.0
        if process.keeps_gradients:
            grads += process.width * max(0.0, process.trained - bucket)
        buckets = _buckets(process) + _reducing(process)
        return States(gradients=grads, buckets=buckets, gathered=one)
    second = _buckets(process) if process.config.parallel.pipe > 1 else 0.0
    compact = share if process.width == 2 else 0.0
    left = 4 * (process.trained - bucket)
    filling = States(gradients=left + 4 * bucket, buckets=_buckets(process) + second)
    flat = States(gradients=left + compact, buckets=_buckets(process) + second + 4 * bucket)
    copied = States(gradients=left + share, buckets=_buckets(process) + second)
    return max(filling, flat, copied, key=lambda s: s.gradients + s.buckets)


def update(process: Process) -> States:
    """What the optimizer's step adds: the share's gradients; and where DeepSpeed reduces them, a
    flat copy of them in fp32, and under ZeRO 1 the bucket, which it keeps."""
    freezes = process.config.optimizer.inactive == "freeze"
    temporary = FREEZING_BYTES * min(AT_ONCE, process.share) if freezes else 0.0
    if process.zero == 0:
        return States(gradients=4 * process.parameters + temporary)
    if process.zero == 3 or process.config.parallel.offload:
        return States(gradients=temporary)
    copies = process.width == 4 and not reduces_flat(process.config)
    buckets = _buckets(process) if process.zero == 1 else 0.0
    return States(gradients=4 * process.share * (1 + copies) + temporary, buckets=buckets)


def _buckets(process: Process) -> float:
    """Bytes of the buffer that gradients are reduced from, but for the one that ZeRO 3 holds."""
    if process.zero in (0, 3) or not process.option("contiguous_gradients", True):
        return 0.0
    if reduces_flat(process.config):
        return 0.0
    width = process.width if process.zero == 2 else 4
    return process.bucket * width * (2 if process.option("overlap_comm", False) else 1)


def _reducing(process: Process) -> float:
    """Bytes of copies while a bucket is reduced under ZeRO 2 and 3."""
    bucket = min(process.bucket, process.trained)
    if process.zero == 3:
        return 4 * bucket * (1 if process.on_gpu else 2)
    return (process.width + (4 if process.width == 2 else 0)) * bucket
