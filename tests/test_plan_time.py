"""`est-ds plan --gpu`: GPUs, hours and money."""

from __future__ import annotations

import argparse

import pytest

from est_ds.cost.gpus import GPUS, gpu_of
from est_ds.cost.peaks import PEAKS
from est_ds.errors import UserError
from est_ds.report.asked import Asked


def test_every_gpu_with_a_peak_rate_can_be_planned_for():
    assert {gpu.device for gpu in GPUS.values()} == set(PEAKS)
    for gpu in GPUS.values():
        assert gpu.peak_flops("bf16") == 1e12 * PEAKS[gpu.device].bf16
        # The network is no faster than the links of a node, and they are slower than the memory.
        assert gpu.network_bytes_s <= gpu.link_bytes_s < gpu.memory_bytes_s
        assert 16 * 2**30 < gpu.memory_bytes < 192 * 2**30


def test_an_unknown_gpu_is_named_with_its_neighbour():
    with pytest.raises(UserError, match=r"--gpu=h100 is not known; did you mean 'h100-\w+'\? "):
        gpu_of("h100")


def options(**given) -> Asked:
    names = ("gpu", "count", "processes")
    return Asked.of(argparse.Namespace(**{name: given.get(name) for name in names}))


def test_count_is_the_number_of_processes():
    assert options(gpu="h100-80g", count=8).processes == 8
    with pytest.raises(UserError, match="--count=8 has no effect without --gpu"):
        options(count=8)
    with pytest.raises(UserError, match="--count=8 and --processes=4 differ"):
        options(gpu="h100-80g", count=8, processes=4)
