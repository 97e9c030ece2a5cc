"""Peak rates of GPUs by their maker's data sheets, and the share of one that training uses. No
torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Peak:
    """Dense matrix products, without structured sparsity, in 1e12 FLOP/s.

    Attributes:
        bf16: on tensor cores, with float32 sums.
        fp32: in float32 proper, which is what `precision: fp32` computes in: not TF32.
    """

    bf16: float
    fp32: float


# By the name of the device without its maker's. The sheets give bf16 with sparsity for Hopper, Ada
# and Blackwell, which is twice the dense rate.
PEAKS = {
    # NVIDIA Blackwell architecture technical overview, HGX B200, of one GPU.
    "B200": Peak(2250, 75),
    # The same, GB200 NVL72.
    "GB200": Peak(2500, 80),
    # NVIDIA H200 Tensor Core GPU data sheet: SXM and NVL.
    "H200": Peak(989, 67),
    "H200 NVL": Peak(835, 60),
    # NVIDIA GH200 Grace Hopper Superchip data sheet.
    "GH200": Peak(989, 67),
    # NVIDIA H100 Tensor Core GPU data sheet: SXM and NVL; PCIe: the sheet of 2022.
    "H100": Peak(989, 67),
    "H100 NVL": Peak(835, 60),
    "H100 PCIe": Peak(756, 51),
    # NVIDIA A100 Tensor Core GPU data sheet.
    "A100": Peak(312, 19.5),
    # NVIDIA A10 Tensor Core GPU data sheet; A10G: that of the A10G, made for AWS.
    "A10": Peak(125, 31.2),
    "A10G": Peak(70, 35),
    # NVIDIA L40S, L40 and L4 data sheets.
    "L40S": Peak(362, 91.6),
    "L40": Peak(181, 90.5),
    "L4": Peak(121, 30.3),
    # NVIDIA Ada GPU architecture (appendix A), NVIDIA Ampere GA102 GPU architecture (table 2).
    "RTX 4090": Peak(165, 82.6),
    "RTX 3090": Peak(71, 35.6),
}
# Words of devices that are a part of the one whose name they bear, or clocked otherwise.
_OTHERS = re.compile(r"\b(MIG|Laptop|Max-Q|D|Ti)\b")


def peak_flops(device: str, precision: Literal["fp32", "bf16"]) -> float | None:
    """Peak rate of a device, FLOP/s; None of one that is not in the table.

    Args:
        device: its name, as CUDA gives it.
    """
    name = device.removeprefix("NVIDIA ").removeprefix("GeForce ")
    known = [key for key in PEAKS if re.match(rf"{re.escape(key)}\b", name)]
    if not known or _OTHERS.search(name):
        return None
    peak = PEAKS[max(known, key=len)]
    return 1e12 * (peak.bf16 if precision == "bf16" else peak.fp32)


def mfu(flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation: the share of the peak rate at which a step was computed.

    What is computed anew in the backward (`activation_checkpointing`) does not count (arXiv
    2204.02311, appendix B).

    Args:
        flops: of the step, `model`.
        seconds: that it took.
        peak: of all devices together, FLOP/s.
    """
    return flops / seconds / peak
