"""What every layout must equal: one process of plain torch with torch's AdamW."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from est_ds.config.run_config import RunConfig
from est_ds.data.loader import Inputs, Portion
from est_ds.data.objectives.loss import Labels
from est_ds.plans.lr import learning_rate
from est_ds.run.prepare import Run, prepare
from est_ds.slicing.build import build_model
from est_ds.slicing.subnetwork import Subnetwork


@dataclass
class Reference:
    """Losses and gradient norms by step, held-out losses by step, and the trained model."""

    losses: list[float]
    norms: list[float]
    held_out: dict[int, float]
    model: nn.Module


def loss_of(run: Run, model: nn.Module, inputs: Inputs, labels: Labels) -> Tensor:
    """Cross-entropy over the tokens that count, nats per token, in fp32 at least."""
    ids = inputs if isinstance(inputs, tuple) else (inputs,)
    labels, divisor = labels if isinstance(labels, tuple) else (labels, labels.numel())
    # With a cache, which the library makes by itself, it finds no documents in positions.
    logits = model(**run.family.named_inputs(ids), use_cache=False).logits
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / divisor


def plain_adamw(
    config: RunConfig, left_out: Collection[int] = (), double: bool = False
) -> Reference:
    """Trains a run without DeepSpeed; inactive parameters have zero gradients.

    Under precision bf16 the model computes in bf16 with the same fp32 buffers, gradients of the
    micro-batches are added in fp32, and AdamW steps fp32 weights, from which bf16 ones are taken.

    Args:
        left_out: steps that are not trained.
        double: everything in float64, from the same weights, which are rounded to bf16 under that
            precision at the start: what is apart from it by rounding alone.
    """
    torch.set_num_threads(1)
    run = prepare(config, 1)
    if folder := config.model.get("from"):
        auto = getattr(transformers, run.family.auto_class)
        model = auto.from_pretrained(folder, attn_implementation=run.family.attention)
    else:
        model = build_model(run.hf_config, config.seed)
    if double:
        _make_double(model)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    wide = torch.float64 if double else torch.float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).to(wide if double else dtype)
    parameters = list(model.parameters())
    masters = [nn.Parameter(p.detach().to(wide)) for p in parameters]
    subnetwork = Subnetwork(run.family, run.method.shape, dict(enumerate(run.family.layers(model))))
    if run.dropout:
        own = config.seed_of("method")
        seed_masks(model, own, lambda: (subnetwork.turn.step, subnetwork.turn.micro_batch))
    decay = config.optimizer.weight_decay
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in masters if p.ndim >= 2], "weight_decay": decay},
            {"params": [p for p in masters if p.ndim < 2], "weight_decay": 0.0},
        ],
        betas=config.optimizer.betas,
    )
    found = Reference([], [], {}, model)
    for step in range(config.steps):
        if step in left_out:
            continue
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.schedule, config.optimizer.lr, step, config.steps)
        for master in masters:
            master.grad = torch.zeros_like(master)
        micro_batches = list(run.train.micro_batches(step, Portion(0, 1, micro=config.batch.micro)))
        total = 0.0
        with subnetwork.active(run.plans(step)):
            for i, batch in enumerate(micro_batches):
                subnetwork.turn_to(i)
                loss = loss_of(run, model, *batch) / len(micro_batches)
                loss.backward()
                total += loss.item()
                for parameter, master in zip(parameters, masters):
                    if parameter.grad is not None:
                        master.grad += parameter.grad.to(wide)
                        parameter.grad = None
        norm = nn.utils.get_total_norm([master.grad.double() for master in masters])
        nn.utils.clip_grads_with_norm_(masters, config.optimizer.clip, norm.to(wide))
        found.norms.append(norm.item())
        if config.optimizer.inactive == "freeze":
            step_active(optimizer)
        else:
            optimizer.step()
        with torch.no_grad():
            for parameter, master in zip(parameters, masters):
                parameter.copy_(master)
        found.losses.append(total)
        if (step + 1) % config.evaluate.every == 0:
            count = config.evaluate.sequences
            [batch] = run.valid["valid"].held_out(count, Portion(0, 1, micro=count))
            with torch.no_grad():
                found.held_out[step] = loss_of(run, model.eval(), *batch).item()
            model.train()
    return found


def seed_masks(model: nn.Module, seed: int, turn: Callable[[], tuple[int, int]]) -> None:
    """Has a plain library model draw its dropout by address: torch's own generator is seeded before
    every module that draws from it.

    Args:
        turn: step and micro-batch of the forward that runs.
    """
    drawing = re.compile(r"\.(self_attn|attn|attention\.self|SelfAttention|EncDecAttention)$")
    for path, module in model.named_modules():
        if drawing.search(path) or isinstance(module, nn.Dropout):
            # T5 drops a stack's embedding and its last norm by one module.
            before = ("embed_tokens", "final_layer_norm")
            stack = re.fullmatch(r"(encoder|decoder)\.dropout", path)
            names = [f"{path} behind {stack[1]}.{b}" for b in before] if stack else [path]
            module.register_forward_pre_hook(_seeding(seed, turn, cycle(names)))


def _seeding(seed: int, turn: Callable[[], tuple[int, int]], names: Iterator[str]):
    def hook(module: nn.Module, _) -> None:
        name = next(names)
        if module.training:
            step, micro_batch = turn()
            address = f"{seed}/{step}/{micro_batch}/{name}".encode()
            first = hashlib.blake2b(address, digest_size=8).digest()
            torch.manual_seed(int.from_bytes(first, "little") // 2)

    return hook


@torch.no_grad()
def step_active(optimizer: torch.optim.AdamW) -> None:
    """AdamW (arXiv 1711.05101, algorithm 2) of each element alone, in float64: one without a
    gradient does nothing, and n counts the steps of the others."""
    for group in optimizer.param_groups:
        (beta1, beta2), rate, decay = group["betas"], group["lr"], group["weight_decay"]
        for p in group["params"]:
            state, now = optimizer.state[p], p.grad != 0
            g, w = p.grad[now].double(), p[now].double()
            zeros = torch.zeros_like(p, dtype=torch.float64)
            m, v, n = (state.setdefault(key, zeros.clone()) for key in ("m", "v", "n"))
            n[now] += 1
            m[now] = beta1 * m[now] + (1 - beta1) * g
            v[now] = beta2 * v[now] + (1 - beta2) * g * g
            mean, square = m[now] / (1 - beta1 ** n[now]), v[now] / (1 - beta2 ** n[now])
            p[now] = (w - rate * (mean / (square.sqrt() + group["eps"]) + decay * w)).to(p.dtype)


def _make_double(model: nn.Module) -> None:
    """Makes a model compute in float64, its norms too, which the library computes in float32."""

    def norm(module: nn.Module, x: Tensor) -> Tensor:
        mean = x.pow(2).mean(-1, keepdim=True)
        return module.weight * x * torch.rsqrt(mean + module.variance_epsilon)

    for module in model.double().modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = partial(norm, module)


def largest_difference(found: list[float], expected: list[float]) -> float:
    """Relative to what is expected."""
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def assert_close(found: list[float], expected: list[float], within: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for step, (a, b) in enumerate(zip(found, expected)):
        assert abs(a - b) <= within * abs(b), f"step {step}: {a} against {b}"
