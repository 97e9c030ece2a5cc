"""GPUs that `est-ds plan --gpu NAME` knows: memory, rates, links. No torch.

Rates of matrix products are those of `est_ds/cost/peaks.py`. The other columns are of the same data
sheets, where no other source stands beside them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from est_ds.cost.peaks import peak_flops
from est_ds.errors import UserError, did_you_mean

# A link's share that NCCL's collectives of large messages reach: nccl-tests, bus bandwidth of 8
# A100 (235 of 300 GB/s) and of 8 H100 without in-network sums (360 of 450 GB/s).
LINK_SHARE = 0.8


@dataclass(frozen=True)
class Gpu:
    """One GPU of a node.

    Attributes:
        name: as `--gpu` takes it.
        device: as `peaks.PEAKS` has it.
        memory_bytes: that a process can allocate: the total capacity that CUDA names, rounded down
            to half a GiB. ECC and the driver hold the rest of what the data sheet says.
        memory_bytes_s: rate of its memory, bytes/s.
        link_bytes_s: rate to another GPU of the node in one direction, bytes/s.
        network_bytes_s: rate to another node in one direction, bytes/s, its share of the network.
        per_node: GPUs that such links connect.
    """

    name: str
    device: str
    memory_bytes: float
    memory_bytes_s: float
    link_bytes_s: float
    network_bytes_s: float
    per_node: int

    def peak_flops(self, precision: Literal["fp32", "bf16"]) -> float:
        """Peak rate of matrix products, FLOP/s."""
        peak = peak_flops(self.device, precision)
        assert peak is not None  # a test compares the tables
        return peak


def _gpu(
    name: str, device: str, memory: tuple[float, float], links: tuple[float, float], per_node: int
) -> Gpu:
    """Of GiB and TB/s of memory, GB/s to the neighbour, and Gbit/s to other nodes."""
    return Gpu(
        name, device, memory[0] * 2**30, memory[1] * 1e12, links[0] * 1e9, links[1] / 8e-9, per_node
    )


# Links: NVLink, half of the sheet's figure, which is of both directions; else PCI Express x16 of
# the card's generation (4: 32 GB/s, 5: 64 GB/s). A consumer's card reaches its neighbour through
# the host, at half of that. Network: of the maker's reference node (DGX B200, H200, H100: 400
# Gbit/s a GPU, DGX A100: 200); for other cards 100 Gbit/s for a node of eight.
_TABLE = (
    _gpu("b200", "B200", (178, 8.0), (900, 400), 8),
    _gpu("gb200", "GB200", (184, 8.0), (900, 400), 72),
    _gpu("h200", "H200", (139, 4.8), (450, 400), 8),
    _gpu("h200-nvl", "H200 NVL", (139, 4.8), (450, 50), 4),
    _gpu("gh200-96g", "GH200", (94, 4.0), (64, 400), 1),
    _gpu("h100-80g", "H100", (79, 3.35), (450, 400), 8),
    _gpu("h100-nvl", "H100 NVL", (93, 3.9), (64, 12.5), 8),
    _gpu("h100-pcie", "H100 PCIe", (79, 2.0), (64, 12.5), 8),
    _gpu("a100-80g", "A100", (79, 2.039), (300, 200), 8),
    _gpu("a100-40g", "A100", (39, 1.555), (300, 200), 8),
    _gpu("a10", "A10", (21.5, 0.6), (32, 12.5), 8),
    _gpu("a10g", "A10G", (21.5, 0.6), (32, 12.5), 8),
    _gpu("l40s", "L40S", (44, 0.864), (32, 12.5), 8),
    _gpu("l40", "L40", (44, 0.864), (32, 12.5), 8),
    _gpu("l4", "L4", (21.5, 0.3), (32, 12.5), 8),
    _gpu("rtx-4090", "RTX 4090", (23.5, 1.008), (16, 12.5), 8),
    _gpu("rtx-3090", "RTX 3090", (23.5, 0.936), (16, 12.5), 8),
)
GPUS = {gpu.name: gpu for gpu in _TABLE}


def gpu_of(name: str) -> Gpu:
    """The GPU of a name.

    Raises:
        UserError: it is not in the table.
    """
    if name not in GPUS:
        alike = [other for other in GPUS if other.startswith(name)] or GPUS
        raise UserError(
            f"--gpu={name} is not known; {did_you_mean(name, alike)}Known are {', '.join(GPUS)}; a "
            f"new one is a row in est_ds/cost/gpus.py."
        )
    return GPUS[name]
