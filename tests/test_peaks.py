"""Peak rates of GPUs, and what a line of a step says of their use."""

from __future__ import annotations

import pytest

from est_ds.cost.peaks import PEAKS, mfu, peak_flops
from est_ds.run.metrics import phase_note, steps_of, use_texts

# What CUDA calls devices; the data sheets' bf16 and float32, 1e12 FLOP/s.
DEVICES = {
    "NVIDIA B200": (2250, 75),
    "NVIDIA GB200": (2500, 80),
    "NVIDIA H200": (989, 67),
    "NVIDIA H200 NVL": (835, 60),
    "NVIDIA GH200 480GB": (989, 67),
    "NVIDIA H100 80GB HBM3": (989, 67),
    "NVIDIA H100 PCIe": (756, 51),
    "NVIDIA H100 NVL": (835, 60),
    "NVIDIA A100-SXM4-80GB": (312, 19.5),
    "NVIDIA A100 80GB PCIe": (312, 19.5),
    "NVIDIA A10": (125, 31.2),
    "NVIDIA A10G": (70, 35),
    "NVIDIA L4": (121, 30.3),
    "NVIDIA L40": (181, 90.5),
    "NVIDIA L40S": (362, 91.6),
    "NVIDIA GeForce RTX 4090": (165, 82.6),
    "NVIDIA GeForce RTX 3090": (71, 35.6),
}
# Parts of a device, others that are named alike, and what nobody has listed.
UNKNOWN = (
    "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce RTX 3090 Ti",
    "NVIDIA A1000",
    "NVIDIA L400",
    "Tesla T4",
    "cpu",
)


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_has_the_rate_of_its_data_sheet(device):
    found = [peak_flops(device, precision) / 1e12 for precision in ("bf16", "fp32")]
    assert found == pytest.approx(DEVICES[device])


def test_every_entry_is_the_name_of_a_device():
    assert len(PEAKS) == len(DEVICES) - 1  # A100 has two names


@pytest.mark.parametrize("device", UNKNOWN)
def test_no_rate_is_said_of_another_device(device):
    assert peak_flops(device, "bf16") is None


def test_mfu_is_that_of_palm():
    """PaLM 540B (arXiv 2204.02311, appendix B and table 3): 6144 TPU v4 of 275e12 FLOP/s each,
    238.3 k tokens/s, 46.2 % with the FLOPs of attention."""
    layers, heads, width, sequence = 118, 48, 256, 2048
    per_token = 6 * 540.35e9 + 12 * layers * heads * width * sequence
    assert mfu(per_token * 238.3e3, 1.0, 6144 * 275e12) == pytest.approx(0.462, abs=1e-3)


def test_a_phase_has_median_mfu_and_the_largest_memory():
    lines = [
        {"clipped": False, "mfu": m, "mfu_dense": 2 * m, "memory_peak_bytes": n * 10**9}
        for m, n in ((0.1, 30), (0.3, 20), (0.2, 10))
    ]
    steps = steps_of(lines)
    assert steps.used == {"mfu": 0.2, "mfu_dense": 0.4, "memory_peak_bytes": 30 * 10**9}
    assert use_texts(steps.used) == ["MFU 20.0% (dense 40.0%)", "30 GB on a GPU"]
    assert phase_note(steps).endswith("clipped, MFU 20.0% (dense 40.0%), 30 GB on a GPU")
    unknown = steps_of([{"memory_peak_bytes": 10**9}])  # of a GPU without a known peak
    assert use_texts(unknown.used) == ["1 GB on a GPU"]
    assert not steps_of([{"clipped": True}]).used
