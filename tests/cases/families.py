"""An independent reference for subnetworks: the unmodified library model, masked by hooks.

Every family is a row of `CASES`. The reference knows only where a family's output projections
are: what they read is multiplied by 0 or n / k, and a skipped layer hands on what it was given. A
layer through which some positions pass runs on these alone, under a mask made of their numbers.
Nothing of `est_ds.slicing` takes part. Weights are redrawn large, so that every head, column and
bias matters to the comparison.

Shapes: H heads, D head size; a projection reads [B, T, H * D] or [B, T, columns].
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, silu

from est_ds.plans.plan import Kept, LayerPlan, Plan
from est_ds.plans.shape import Attention, ModelShape, Part
from est_ds.slicing.build import build_model
from est_ds.slicing.families import family_of, hf_config
from est_ds.slicing.subnetwork import Subnetwork

torch.set_num_threads(1)  # products this small are slower on more


@dataclass(frozen=True)
class Case:
    """A small model of a family.

    Attributes:
        section: the `model` section of a run file.
        auto_class: the library's class that builds the unmodified model.
        layers: for every stack of layers, its path and the output projection of every part.
        head: path of the output head.
        norm_after: the parent of an output projection adds the residual, its second argument,
            and norms their sum.
        inner: projections of a layer that read units as the output projection does, on the way.
        norm: the gated norm of units in front of the output projection.
    """

    section: dict[str, Any]
    layers: tuple[tuple[str, tuple[str, ...]], ...]
    auto_class: str = "AutoModelForCausalLM"
    head: str = "lm_head"
    norm_after: bool = False
    inner: tuple[str, ...] = ()
    norm: str | None = None


LLAMA = (("model.layers", ("self_attn.o_proj", "mlp.down_proj")),)
SMALL = dict(hidden_size=24, num_hidden_layers=4, intermediate_size=37, vocab_size=61)
GQA = dict(num_attention_heads=12, num_key_value_heads=4, head_dim=4, max_position_embeddings=32)
MHA = {**GQA, "num_key_value_heads": 12}
GPT2 = dict(
    n_embd=24, n_layer=4, n_head=12, n_inner=37, n_positions=32, vocab_size=61,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)
GPT2_LAYERS = (("transformer.h", ("attn.c_proj", "mlp.c_proj")),)
BERT = dict(
    num_attention_heads=12, max_position_embeddings=32,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)
T5_SIZES = dict(
    d_model=24, d_kv=4, num_heads=12, d_ff=37, num_layers=4, num_decoder_layers=4, vocab_size=61,
    relative_attention_num_buckets=8, relative_attention_max_distance=6, dropout_rate=0.0,
)
T5_LAYERS = (
    ("encoder.block", ("layer.0.SelfAttention.o", "layer.1.DenseReluDense.wo")),
    (
        "decoder.block",
        ("layer.0.SelfAttention.o", "layer.1.EncDecAttention.o", "layer.2.DenseReluDense.wo"),
    ),
)

MIXER_LAYERS = (("backbone.layers", ("mixer.out_proj",)),)
MAMBA = dict(
    hidden_size=12, expand=4, state_size=5, time_step_rank=3, num_hidden_layers=4, vocab_size=61,
)
MAMBA2 = dict(
    hidden_size=24, expand=4, num_heads=48, head_dim=2, n_groups=1, state_size=5, chunk_size=4,
    num_hidden_layers=4, vocab_size=61,
)

CASES = {
    "llama": Case({"model_type": "llama", **SMALL, **GQA}, LLAMA),
    "llama_mha": Case({"model_type": "llama", **SMALL, **MHA}, LLAMA),
    "llama_biases_tied": Case(
        {
            "model_type": "llama", **SMALL, **GQA,
            "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True,
        },
        LLAMA,
    ),
    "mistral": Case({"model_type": "mistral", **SMALL, **GQA}, LLAMA),
    "mistral_window": Case({"model_type": "mistral", **SMALL, **GQA, "sliding_window": 4}, LLAMA),
    "qwen2": Case({"model_type": "qwen2", **SMALL, **GQA}, LLAMA),
    "qwen3": Case({"model_type": "qwen3", **SMALL, **GQA, "tie_word_embeddings": True}, LLAMA),
    "gpt2": Case({"model_type": "gpt2", **GPT2}, GPT2_LAYERS),
    "gpt2_untied": Case({"model_type": "gpt2", **GPT2, "tie_word_embeddings": False}, GPT2_LAYERS),
    "bert": Case(
        {"model_type": "bert", **SMALL, **BERT},
        (("bert.encoder.layer", ("attention.output.dense", "output.dense")),),
        "AutoModelForMaskedLM",
        head="cls",
        norm_after=True,
    ),
    "t5": Case({"model_type": "t5", **T5_SIZES}, T5_LAYERS, "AutoModelForSeq2SeqLM"),
    "t5_gated": Case(
        {
            "model_type": "t5", **T5_SIZES, "num_decoder_layers": 3,
            "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        },
        T5_LAYERS,
        "AutoModelForSeq2SeqLM",
    ),
    "mamba": Case({"model_type": "mamba", **MAMBA}, MIXER_LAYERS, inner=("mixer.x_proj",)),
    "mamba2": Case({"model_type": "mamba2", **MAMBA2}, MIXER_LAYERS, norm="mixer.norm"),
    "mamba2_groups": Case(
        {
            "model_type": "mamba2", **MAMBA2,
            "n_groups": 4, "chunk_size": 16, "use_bias": True, "tie_word_embeddings": True,
        },
        MIXER_LAYERS,
        norm="mixer.norm",
    ),
}
OBJECTIVES = {"bert": "{name: mlm, vocabulary: 61}", "t5": "{name: ul2, vocabulary: 61}"}
WITHOUT_ATTENTION = ("mamba", "mamba2")
SLOW = ("mamba2_groups",)
every_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow if name in SLOW else (), id=name)
        for name, case in CASES.items()
    ],
)


@dataclass(frozen=True)
class Step:
    """What a step gives: logits, loss, and a gradient for every parameter name."""

    logits: Tensor
    loss: Tensor
    grads: dict[str, Tensor]


def config_of(case: Case) -> Any:
    return hf_config(dict(case.section))


def shape_of(case: Case) -> ModelShape:
    """The shape, as methods see it in a run on sequences as long as those of `inputs_of`."""
    whole = family_of(case.section["model_type"]).shape(config_of(case))
    return replace(whole, sequence=inputs_of(case)["input_ids"].shape[1])


def training_of(section: dict[str, Any]) -> list[str]:
    """Overrides by which the synthetic run trains a model of the table, in batches of six."""
    text = yaml.safe_dump(section, default_flow_style=True, width=10_000).strip()
    return [
        f"model={text}",
        f"objective={OBJECTIVES.get(section['model_type'], '{name: causal}')}",
        "data.sequence=16",
        "batch={global: 12, micro: 2}",
        "schedule={name: cosine}",
        "optimizer={lr: 3.0e-3}",
    ]


_built: dict[int, tuple[nn.Module, nn.Module]] = {}


def _models(case: Case) -> tuple[nn.Module, nn.Module]:
    """Ours and the library's, with the same large weights; built once."""
    if id(case) not in _built:
        ours = build_model(config_of(case), seed=1)
        torch.manual_seed(2)
        with torch.no_grad():
            for p in ours.parameters():
                p.copy_(
                    0.15 * torch.randn_like(p) if p.ndim > 1 else p + 0.2 * torch.randn_like(p)
                )
            # A residual stream larger than what layers add keeps comparisons well conditioned.
            ours.get_input_embeddings().weight.mul_(8)
        _built[id(case)] = ours, library_model_of(case, config_of(case), ours.state_dict())
    return _built[id(case)]


def attention_of(case: Case) -> str:
    """The library's attention."""
    return "eager" if case.section["model_type"] in WITHOUT_ATTENTION else "sdpa"


def library_model_of(case: Case, config: Any, weights: dict[str, Tensor]) -> nn.Module:
    """The library's model, loaded as it loads checkpoints: it unties heads that differ."""
    kind = getattr(transformers, case.auto_class)._model_mapping[type(config)]
    own = {name: tensor.detach().clone() for name, tensor in weights.items()}
    return kind.from_pretrained(
        None, config=config, state_dict=own, attn_implementation=attention_of(case)
    ).train()


def our_model(case: Case) -> nn.Module:
    """The model that est_ds builds, with large weights."""
    return copy.deepcopy(_models(case)[0])


def library_model(case: Case) -> nn.Module:
    """The unmodified library model with the same weights."""
    return copy.deepcopy(_models(case)[1])


def installed(case: Case, model: nn.Module, masked: bool = False) -> Subnetwork:
    family = family_of(case.section["model_type"])
    return Subnetwork(family, shape_of(case), dict(enumerate(family.layers(model))), masked)


def inputs_of(case: Case, separate: bool = False) -> dict[str, Tensor]:
    """Token ids [2, 9], and for an encoder-decoder the decoder's [2, 6].

    Args:
        separate: with positions in documents of 9, and of 4 and 5 ids.
    """
    generator = torch.Generator().manual_seed(3)
    vocabulary = case.section["vocab_size"]
    ids = {"input_ids": torch.randint(2, vocabulary, (2, 9), generator=generator)}
    if case.auto_class == "AutoModelForSeq2SeqLM":
        ids["decoder_input_ids"] = torch.randint(2, vocabulary, (2, 6), generator=generator)
    if separate:
        ids["position_ids"] = torch.tensor([[*range(9)], [*range(4), *range(5)]])
    if separate and case.auto_class == "AutoModelForMaskedLM":
        ids["attention_mask"] = _seen(case, ids["position_ids"])
    return ids


def _seen(case: Case, positions_BT: Tensor) -> Tensor:
    """Which positions [B, T] see which, bool [B, 1, T, T], by their places in their documents."""
    document = (positions_BT == 0).cumsum(-1)
    seen = document[:, :, None] == document[:, None, :]
    if case.auto_class != "AutoModelForMaskedLM":
        back = positions_BT[:, :, None] - positions_BT[:, None, :]
        seen = seen & (back >= 0) & (back < case.section.get("sliding_window", 99))
    return seen[:, None]


def run_step(model: nn.Module, case: Case, separate: bool = False) -> Step:
    """Forward and backward of a cross-entropy against fixed labels."""
    model.zero_grad(set_to_none=True)
    model.train()
    cache = {} if case.auto_class == "AutoModelForMaskedLM" else {"use_cache": False}
    logits = model(**inputs_of(case, separate), **cache).logits
    labels = torch.arange(logits[..., 0].numel()) * 7 % logits.shape[-1]
    loss = cross_entropy(logits.flatten(0, 1), labels)
    loss.backward()
    grads = {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }
    return Step(logits.detach(), loss.detach(), grads)


def masked_step(case: Case, plan: Plan, separate: bool = False) -> Step:
    """The plan's step by masks in plain torch, on the unmodified library model."""
    model = library_model(case)
    layers = [
        (layer, projections)
        for path, projections in case.layers
        for layer in model.get_submodule(path)
    ]
    for (layer, projections), layer_plan, parts in zip(layers, plan.layers, shape_of(case).layers):
        if layer_plan is None:
            layer.register_forward_hook(_hand_on)
            continue
        if layer_plan.positions is not None:
            places = inputs_of(case, True)["position_ids"] if separate else torch.arange(9)[None]
            seen = _seen(case, places)
            layer.forward = _at_positions(layer.forward, layer_plan.positions.tolist(), seen)
        for path, kept, part in zip(projections, layer_plan.parts, parts):
            module = layer.get_submodule(path)
            if kept.count == 0:
                module.register_forward_hook(lambda _m, _x, out: out * 0)
                if case.norm_after:
                    parent = layer.get_submodule(path.rpartition(".")[0])
                    parent.register_forward_hook(lambda _m, args, _out: args[1])
                continue
            mask = _mask_of(kept, width_of(part))
            for read in (path, *case.inner):
                layer.get_submodule(read).register_forward_pre_hook(_masks(mask))
            if case.norm:
                norm = layer.get_submodule(case.norm)
                norm.forward = _norm_of_kept(norm, mask > 0, part.groups)
            module.register_forward_hook(lambda _m, _x, out, scale=layer_plan.scale: out * scale)
    return run_step(model, case, separate)


def _at_positions(forward: Callable[..., Tensor], at: list[int], seen: Tensor):
    """A layer's forward of the states at positions alone, and all states with these replaced."""

    def run(states: Tensor, *_others: Any, **named: Any) -> Tensor:
        angles = {
            name: tuple(part[:, at] for part in named[name])
            for name in ("position_embeddings",)
            if name in named
        }
        after = states.clone()
        after[:, at] = forward(states[:, at], attention_mask=seen[:, :, at][..., at], **angles)
        return after

    return run


def width_of(part: Part) -> int:
    """Rows or columns of a weight that a unit has."""
    return part.head_dim if isinstance(part, Attention) else getattr(part, "width", 1)


def _mask_of(kept: Kept, size: int) -> Tensor:
    """0 or n / k for what a projection reads."""
    mask = torch.ones(kept.total)
    if kept.units is not None:
        mask = torch.zeros(kept.total)
        mask[torch.from_numpy(kept.units)] = kept.total / len(kept.units)
    return mask.repeat_interleave(size)


def _masks(mask: Tensor):
    return lambda _module, args: (args[0] * mask,)


def _norm_of_kept(norm: nn.Module, kept: Tensor, groups: int):
    """The gated norm of a Mamba2 with the mean of squares over a group's kept channels."""
    if kept.all():
        return norm.forward

    def forward(x: Tensor, gate: Tensor) -> Tensor:
        x = (x * silu(gate) * kept).unflatten(-1, (groups, -1))
        count = kept.unflatten(-1, (groups, -1)).sum(-1)
        mean = x.square().sum(-1) / count
        return norm.weight * (x / (mean + norm.variance_epsilon).sqrt()[..., None]).flatten(-2)

    return forward


def _hand_on(_layer: nn.Module, args: tuple, out: Any) -> Any:
    """The layer's input in place of its output; what else it returns stays as it was."""
    return (args[0], *out[1:]) if isinstance(out, tuple) else args[0]


def draw_plan(
    shape: ModelShape,
    *,
    skipped: tuple[int, ...] = (),
    without: tuple[tuple[int, int], ...] = (),
    heads: int | None = None,
    columns: int | None = None,
    positions: int | None = None,
    rule: str = "within_groups",
    scale: float = 1.0,
    seed: int = 0,
) -> Plan:
    """A plan with the given counts, at random.

    Args:
        without: skipped parts, as pairs of a layer and a part of it.
        heads: kept heads of every key/value group (`within_groups`), or kept groups (`groups`,
            and always without grouped-query attention).
        columns: kept columns, of a part with groups of them as many in each.
        positions: positions that pass through a layer, every layer's own.
    """
    rng = np.random.default_rng(seed)

    def some(n: int, k: int) -> np.ndarray:
        return np.sort(rng.permutation(n)[:k])

    def keep(part: Any) -> Kept:
        if not isinstance(part, Attention):
            groups = getattr(part, "groups", 1)
            n = part.columns // groups
            of_group = None if columns is None else max(1, columns // groups)
            if of_group in (None, n):
                return Kept(None, part.columns)
            units = [some(n, of_group) + g * n for g in range(groups)]
            return Kept(np.concatenate(units), part.columns)
        if heads is None:
            return Kept(None, part.heads)
        per_group = part.heads // part.key_value_groups
        if rule == "groups" or per_group == 1:
            groups = some(part.key_value_groups, heads)
            units = (groups[:, None] * per_group + np.arange(per_group)).reshape(-1)
            return Kept(units, part.heads, groups)
        units = [some(per_group, heads) + g * per_group for g in range(part.key_value_groups)]
        return Kept(np.concatenate(units), part.heads)

    def keep_or_skip(i: int, p: int, part: Any) -> Kept:
        kept, nothing = keep(part), np.arange(0)
        return Kept(nothing, part.units, nothing) if (i, p) in without else kept

    layers = [
        None
        if i in skipped
        else LayerPlan(
            tuple(keep_or_skip(i, p, x) for p, x in enumerate(parts)),
            scale,
            None if positions is None else some(shape.sequence, positions),
        )
        for i, parts in enumerate(shape.layers)
    ]
    return Plan(0, 0, tuple(layers))


def assert_close(ours: Step, theirs: Step) -> None:
    """Equal within 1e-5 of the largest entry, or of 1."""
    pairs = [("logits", ours.logits, theirs.logits), ("loss", ours.loss, theirs.loss)]
    assert list(ours.grads) == list(theirs.grads)
    pairs += [(name, ours.grads[name], theirs.grads[name]) for name in theirs.grads]
    for name, a, b in pairs:
        error = (a - b).abs().max().item()
        assert error <= 1e-5 * max(1.0, b.abs().max().item()), f"{name}: {error:.2e}"


def assert_equal(ours: Step, theirs: Step) -> None:
    assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)
    assert list(ours.grads) == list(theirs.grads)
    for name in theirs.grads:
        assert torch.equal(ours.grads[name], theirs.grads[name]), name
