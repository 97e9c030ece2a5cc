"""Families: initialisation by address, pieces for pipelines, and configs, for every family.

The table of families is in `test_slicing_reference.py`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import transformers

from cases.families import (
    CASES,
    attention_of,
    config_of,
    draw_plan,
    every_case,
    inputs_of,
    installed,
    our_model,
    run_step,
    shape_of,
)
from est_ds.config.run_file import read_sections
from est_ds.errors import UserError
from est_ds.slicing.build import build_model, count_parameters, empty_model, initialise
from est_ds.slicing.families import FAMILIES, family_of, hf_config


def pieces_of(case):
    return family_of(case.section["model_type"]).pieces(config_of(case))


def everything(model):
    """Weights and buffers by name, also those that a state dict leaves out."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def through(model, pieces, x):
    for piece in pieces:
        x = piece.forward(*(model.get_submodule(path) for path in piece.modules), x)
    return x


def first_input(case):
    ids = inputs_of(case)
    return tuple(ids.values()) if len(ids) > 1 else ids["input_ids"]


def is_given(name: str) -> bool:
    """Whether a tensor of many values is not drawn."""
    return "freq" in name or "A_log" in name


def test_the_table_of_cases_holds_every_supported_family():
    supported = {model_type for family in FAMILIES for model_type in family.model_types}
    assert {case.section["model_type"] for case in CASES.values()} == supported


@every_case
def test_empty_model_has_the_parameters_and_no_memory(case):
    model = empty_model(config_of(case))
    assert all(tensor.is_meta for tensor in everything(model).values())
    assert count_parameters(model) == count_parameters(build_model(config_of(case), 0))


@every_case
def test_pieces_drawn_one_by_one_are_the_whole_model(case):
    """In any order, each by a process of its own or all in one."""
    whole = build_model(config_of(case), seed=5)
    together = empty_model(config_of(case))
    for piece in reversed(pieces_of(case)):
        initialise(together, piece.modules, seed=5)
        alone = empty_model(config_of(case))
        initialise(alone, piece.modules, seed=5)
        for path in piece.modules:
            drawn = everything(alone.get_submodule(path))
            for name, tensor in everything(whole.get_submodule(path)).items():
                assert torch.equal(drawn[name], tensor), f"{path}.{name}"
    drawn = everything(together)
    for name, tensor in everything(whole).items():
        assert torch.equal(drawn[name], tensor), name
    assert count_parameters(together) == count_parameters(whole), "a tie was lost"


@every_case
def test_weights_are_distributed_as_the_library_draws_them(case):
    wide = config_of(replace(case, section={**case.section, "vocab_size": 997}))
    ours = everything(build_model(wide, seed=5))
    torch.manual_seed(0)
    auto = getattr(transformers, case.auto_class)
    theirs = everything(auto.from_config(wide, attn_implementation=attention_of(case)))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if tensor.dtype == torch.int64 or tensor.unique().numel() <= 2 or is_given(name):
            assert torch.equal(ours[name], tensor), name
            continue
        if name == "lm_head.weight" and case is CASES["t5_gated"]:
            tensor = tensor * wide.d_model**-0.5  # t5x's: variance 1 / fan-in
        # Five standard errors of the ratio of two deviations and of the mean.
        n = tensor.numel()
        assert abs((ours[name].std() / tensor.std()).item() - 1) < 5 / n**0.5, name
        if name.endswith(("dt_bias", "dt_proj.bias")):  # not around zero
            apart = ours[name].mean() - tensor.mean()
            assert abs(apart.item()) < 5 * (2 / n) ** 0.5 * tensor.std().item(), name
        else:
            assert abs(ours[name].mean().item()) < 5 * tensor.std().item() / n**0.5, name


@every_case
def test_draws_differ_between_layers_and_seeds_and_leave_the_global_generator_alone(case):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    model, other = (build_model(config_of(case), seed) for seed in (5, 6))
    assert torch.equal(torch.get_rng_state(), state)
    drawn = [
        (name, tensor)
        for name, tensor in model.state_dict().items()
        if tensor.dim() > 1 and tensor.unique().numel() > 2 and not is_given(name)
    ]
    for name, tensor in drawn:
        assert not torch.equal(other.state_dict()[name], tensor), name
    unique = {tensor.data_ptr(): tensor for _, tensor in drawn}.values()
    assert len({tensor.flatten()[:8].sum().item() for tensor in unique}) == len(unique)


@every_case
@pytest.mark.parametrize("counts", [None, dict(heads=2, columns=13, skipped=(0, 2))])
def test_pieces_in_a_row_are_the_model_bit_for_bit(case, counts):
    """Logits and gradients, of the full model and under a plan."""
    model, shape = our_model(case), shape_of(case)
    plan = draw_plan(shape, **(counts or {}))
    with installed(case, model).active(plan):
        whole = run_step(model, case)
        model.zero_grad()
        logits = through(model, pieces_of(case), first_input(case))
        assert torch.equal(logits, whole.logits)
        labels = torch.arange(logits[..., 0].numel()) * 7 % logits.shape[-1]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels).backward()
    for name, p in model.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        assert torch.equal(grad, whole.grads[name]), name


@every_case
def test_what_pieces_pass_on_can_be_sent_and_gets_a_gradient(case):
    """A pipeline sends contiguous tensors, and a gradient back for each; any stage may be idle."""
    model, shape = our_model(case), shape_of(case)
    subnetwork, pieces = installed(case, model), pieces_of(case)
    for skipped in ((0,), tuple(range(1, shape.num_layers)), tuple(range(shape.num_layers))):
        with subnetwork.active(draw_plan(shape, heads=2, columns=13, skipped=skipped)):
            whole = run_step(model, case)
            model.zero_grad()
            sent, x = [], first_input(case)
            for piece in pieces:
                y = piece.forward(*(model.get_submodule(path) for path in piece.modules), x)
                outputs = y if isinstance(y, tuple) else (y,)
                assert all(t.is_contiguous() for t in outputs)
                received = [t.detach().requires_grad_(t.is_floating_point()) for t in outputs]
                sent.append((outputs, received))
                x = tuple(received) if isinstance(y, tuple) else received[0]
            labels = torch.arange(x[..., 0].numel()) * 7 % x.shape[-1]
            torch.nn.functional.cross_entropy(x.flatten(0, 1), labels).backward()
            for outputs, received in reversed(sent):
                pairs = [(t, r.grad) for t, r in zip(outputs, received) if t.is_floating_point()]
                assert all(grad is not None and grad.is_contiguous() for _, grad in pairs)
                torch.autograd.backward([t for t, _ in pairs], [grad for _, grad in pairs])
        for name, p in model.named_parameters():
            grad = torch.zeros_like(p) if p.grad is None else p.grad
            assert torch.allclose(grad, whole.grads[name], rtol=1e-4, atol=1e-6), name


@every_case
def test_pieces_hold_every_parameter_once_and_every_layer_in_order(case):
    model = build_model(config_of(case), seed=5)
    pieces, shape = pieces_of(case), shape_of(case)
    assert [p.layer for p in pieces if p.layer is not None] == list(range(shape.num_layers))
    layers = family_of(case.section["model_type"]).layers(model)
    for piece in pieces:
        if piece.layer is not None:
            assert model.get_submodule(piece.modules[0]) is layers[piece.layer]
    common, holders = [], {}
    for piece in pieces:
        for path in piece.modules:
            for name, p in model.get_submodule(path).named_parameters():
                common.append(piece.tied.get(f"{path}.{name}", f"{path}.{name}"))
                holders.setdefault(id(p), set()).add(common[-1])
        for name, source in piece.tied.items():
            assert model.get_parameter(name) is model.get_parameter(source)
            assert name.startswith(piece.modules)
    assert set(holders) == {id(p) for p in model.parameters()}
    assert all(len(names) == 1 for names in holders.values()), "a tie is not told"
    tied = {source for piece in pieces for source in piece.tied.values()}
    assert all(common.count(name) > 1 for name in tied), "tied to nothing"
    assert len(common) - sum(common.count(s) - 1 for s in tied) == len(set(common))


def test_unknown_family_names_the_known_ones():
    with pytest.raises(UserError, match="'gtp2' is not supported; supported are llama"):
        family_of("gtp2")


def test_unknown_key_names_the_nearest():
    with pytest.raises(UserError, match="'model.hiden_size'.*did you mean 'hidden_size'"):
        hf_config({**CASES["llama"].section, "hiden_size": 3})


def test_groups_that_do_not_divide_the_heads_are_refused():
    with pytest.raises(UserError, match="num_key_value_heads=5 does not divide"):
        hf_config({**CASES["llama"].section, "num_key_value_heads": 5})


def test_sequence_beyond_the_model_is_refused():
    with pytest.raises(UserError, match="data.sequence=33 is longer"):
        hf_config(CASES["llama"].section, sequence=33)


@pytest.mark.parametrize(
    "case, change, message",
    [
        ("gpt2", dict(n_head=5), "num_attention_heads=5 does not divide model.hidden_size=24"),
        ("gpt2", dict(add_cross_attention=True), "add_cross_attention=True is not supported"),
        ("gpt2", dict(head_dim=4), "unknown key 'model.head_dim'"),
        ("bert", dict(num_attention_heads=5), "5 does not divide model.hidden_size=24"),
        ("bert", dict(is_decoder=True), "is_decoder=True is not supported"),
        ("qwen2", dict(sliding_window=8), "sliding_window=8 cannot take effect"),
        ("llama", dict(head_dim=3), "a head has width 3"),
        ("llama", dict(output_attentions=True), "output_attentions=True is not supported"),
        ("bert", dict(position_embedding_type="relative_key"), "position_embedding_type"),
        ("llama", dict(attn_implementation="eager"), "attn_implementation is set by est_ds"),
        ("llama", dict(rope_theta=5e5, rope_parameters=dict(rope_theta=1e4)), "rope_theta=5000"),
        ("llama", dict(rope_parameters=dict(theta=5e5)), "theta has no effect"),
        ("llama", dict(rms_norm_eps=float("nan")), "rms_norm_eps=nan"),
        ("gpt2", dict(eos_token_id=[1, 61]), "eos_token_id=.1, 61. is outside"),
        ("t5", dict(feed_forward_proj="gated-gelu-x"), "feed_forward_proj"),
        ("t5_gated", dict(scale_decoder_outputs=True), "contradict each other"),
        ("mamba", dict(use_mambapy=True), "use_mambapy=True is not supported"),
        ("mamba", dict(expand=0), "expand=0: there must be at least 1"),
        ("mamba", dict(intermediate_size=0), "intermediate_size=0: there must be at least 1"),
        ("mamba", dict(time_step_init_scheme="zero"), "time_step_init_scheme='zero' is not known"),
        ("mamba2", dict(n_groups=5), "n_groups=5 does not divide model.num_heads=48"),
        ("mamba2", dict(num_heads=40), "must equal num_heads . head_dim"),
    ],
)
def test_what_a_family_does_not_support_is_refused(case, change, message):
    with pytest.raises(UserError, match=message):
        hf_config({**CASES[case].section, **change})


def test_mamba_is_refused_beside_kernels_that_pass_by_what_is_sliced(tmp_path, monkeypatch):
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="model.model_type='mamba2'.*mamba_ssm is installed"):
        hf_config(CASES["mamba2"].section)


def test_t5_with_a_head_of_its_own_begins_at_the_loss_of_a_uniform_guess():
    """It was trained tied, and began at more than 30 nats."""
    config = hf_config({**CASES["t5_gated"].section, "vocab_size": 997, "d_model": 128})
    model = build_model(config, seed=0)
    assert "lm_head.weight" in dict(model.named_parameters())  # tied ones have one name only
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        logits = model(input_ids=ids, decoder_input_ids=ids).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
    assert abs(loss - math.log(997)) < 1.0


def test_older_names_of_rope_mean_what_they_meant():
    section = CASES["llama"].section
    scaling = {"type": "linear", "factor": 2}
    found = hf_config({**section, "rope_theta": 5e5, "rope_scaling": scaling}).rope_parameters
    assert found == {"rope_type": "linear", "factor": 2, "rope_theta": 5e5}
    assert scaling == {"type": "linear", "factor": 2}


@every_case
def test_a_published_config_of_every_family_is_taken(case, tmp_path):
    config = config_of(case)
    config.architectures, config.dtype = [case.auto_class], "bfloat16"
    config.save_pretrained(tmp_path)
    tree = {"model": str(tmp_path)}
    read_sections(tree, tmp_path)
    assert hf_config(tree["model"]).to_dict() == config_of(case).to_dict()


@pytest.mark.parametrize("case", ["llama", "bert"])
def test_the_row_of_the_padding_token_is_drawn_and_trains_like_any_other(case):
    """The library would set it to zero and keep it there: no sample is padded here."""
    models = [
        build_model(hf_config({**CASES[case].section, "pad_token_id": pad}), seed=1)
        for pad in (None, 3)
    ]
    for model in models:
        words = model.get_input_embeddings()
        words(torch.tensor([[3, 4]])).sum().backward()
        assert words.weight.grad[3].eq(1).all()
    one, other = (model.get_input_embeddings().weight for model in models)
    assert torch.equal(one, other) and one[3].any()


def test_t5_takes_any_sequence_length():
    hf_config(CASES["t5"].section, sequence=100_000)
