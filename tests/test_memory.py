"""Memory of a process: model states and activations, by hand and as torch keeps them."""

from __future__ import annotations

import pytest
import torch

from cases.families import CASES, inputs_of, our_model, run_step, shape_of
from cases.tiny import make_config
from est_ds.config.sections import Optimizer
from est_ds.cost.flops import StepSize
from est_ds.cost.memory import activations_by_layer, activations_of_stages, memory_per_process
from est_ds.plans.shape import Attention, Mlp, ModelShape


@pytest.mark.parametrize(
    ("precision", "zero", "expected"),
    [
        ("fp32", 0, (400, 400, 800)),
        ("fp32", 1, (400, 400, 300)),
        ("bf16", 1, (200, 400, 300)),
        ("bf16", 2, (200, 100, 300)),
        ("bf16", 3, (50, 100, 300)),
        ("fp32", 3, (100, 100, 200)),
    ],
)
def test_memory_of_100_parameters_on_4_replicas(precision, zero, expected):
    config = make_config(precision=precision, parallel={"zero": zero})
    memory = memory_per_process(100, config, 4)
    found = (memory.weights_bytes, memory.gradients_bytes, memory.optimizer_bytes)
    assert found == expected
    assert memory.total_bytes == sum(expected)
    frozen = config.model_copy(update={"optimizer": Optimizer(lr=1e-3, inactive="freeze")})
    counts = memory_per_process(100, frozen, 4).optimizer_bytes - memory.optimizer_bytes
    assert counts == (100 if zero else 400)  # a count of every element's steps, 4 bytes


# Two heads of width 3 with one key and value head over hidden 4, a gated MLP of 5 columns.
SMALL = ModelShape("llama", ((Attention(2, 1, 3, 4), Mlp(5, 4, 3)),), 4, 11, 16)


def test_activations_of_a_layer_by_hand():
    # A token in bf16: norms 2 * 4 twice, q and result 2 * 6, k and v 2 * 3, four times 5 columns:
    # 54 values; 4 bytes for each of 2 heads. The head: 8 values and 4 bytes * 11.
    layers, head = activations_by_layer(SMALL, StepSize(tokens=10, sequence=5), value_bytes=2)
    assert layers == [10 * (54 * 2 + 8)] and head == 10 * (16 + 44)


def test_keys_of_a_cross_attention_are_of_the_source():
    cross = (Attention(2, 2, 3, 4, cross=True),)
    shape = ModelShape("t5", ((Mlp(5, 4, 2),), cross), 4, 11, None, encoder_layers=1)
    size = StepSize(tokens=10, sequence=5, target_tokens=3, target_sequence=3)
    layers, head = activations_by_layer(shape, size, value_bytes=4)
    assert layers[0] == 10 * (8 + 2 * 5) * 4
    assert layers[1] == 3 * (8 + 2 * 6) * 4 + 3 * 4 * 2 + 10 * 2 * 6 * 4
    assert head == 3 * (8 * 4 + 44)


def test_early_stages_hold_more_micro_batches():
    layers = [100.0, 200.0, 300.0, 400.0]
    stages = activations_of_stages(layers, 50.0, cuts=[2, 4], accumulation=8)
    assert stages == [2 * 300, 700 + 50]
    assert activations_of_stages(layers, 50.0, cuts=[2, 4], accumulation=1)[0] == 300
    kept = activations_of_stages(layers, 50.0, cuts=[2, 4], accumulation=8, input_bytes=10.0)
    assert kept == [2 * 20 + 200, 20 + 50 + 400]


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert", "t5", "mamba", "mamba2"])
def test_torch_keeps_as_much_and_up_to_half_more(case):
    case = CASES[case]
    model = our_model(case)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def seen(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(seen, lambda tensor: tensor):
        run_step(model, case)
    source, *target = inputs_of(case).values()
    size = dict(tokens=source.numel(), sequence=source.shape[1])
    for ids in target:
        size.update(target_tokens=ids.numel(), target_sequence=ids.shape[1])
    layers, head = activations_by_layer(shape_of(case), StepSize(**size), value_bytes=4)
    # Most of what is more are GPT-2's GELU (three times the columns) and T5's positions.
    assert 1.0 <= sum(kept.values()) / (sum(layers) + head) <= 1.5
