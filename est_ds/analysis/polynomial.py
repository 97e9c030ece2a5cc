"""`analyse polynomial`: which degrees of a polynomial a deep network learns first.

RaPTr's paper (arXiv 2402.05913, section 4 and figure 2) trains a residual network of 20 layers on
labels that are sums of basis polynomials of degrees 1 to 10, and finds that random paths learn the
low degrees first, as dense training does, while progressive layer dropping (PLD) is worse at the
high ones. Sizes and details are ours. An input is x of {-1, 1}^n; with sets S of d inputs each,

    f(x) = sum over degrees d and sets S of c_S prod_(i in S) x_i,   sum over S of c_S^2 = 1/10 at
                                                                    every degree.

The products are orthogonal, and all inputs are few: the error of a degree, sum of (c_S - c'_S)^2
over 1/10 with c' of the network, is exact.

Shapes: N inputs, n their signs, H hidden.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import relu, rms_norm

from est_ds.errors import UserError
from est_ds.plans.methods import build_method
from est_ds.plans.methods.base import Method
from est_ds.plans.plan import Plan
from est_ds.plans.shape import Mlp, ModelShape

DEGREES, TERMS, SIGNS, LAYERS = 10, 8, 12, 20
SAVED = 0.2  # of the FLOPs, by RaPTr and PLD alike
LEARNED = 0.5  # error of a degree below which it counts as learned
EVALUATIONS = 25


@dataclass(frozen=True)
class Settings:
    """Sizes of the toy."""

    steps: int = 2000
    width: int = 64
    batch: int = 256
    rate: float = 2e-3
    seeds: tuple[int, ...] = (0,)

    def check(self) -> None:
        """Raises UserError if a value is not allowed."""
        if self.steps < 4 * EVALUATIONS:
            raise UserError(
                f"--steps={self.steps} is not allowed: use at least {4 * EVALUATIONS}, so that "
                f"every phase is evaluated."
            )


class Polynomial:
    """A target, and every input there is.

    Attributes:
        inputs: float32 [N, n].
        labels: float32 [N].
    """

    def __init__(self, seed: int) -> None:
        draw = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, 1]))
        bits = np.arange(2**SIGNS)[:, None] >> np.arange(SIGNS) & 1
        signs = (1 - 2 * bits).astype(np.float32)
        terms = [
            [np.sort(draw.permutation(SIGNS)[:degree]) for _ in range(TERMS)]
            for degree in range(1, DEGREES + 1)
        ]
        # One column a term; a set that comes twice is one term with the sum of both.
        self._products = np.stack([[signs[:, s].prod(1) for s in some] for some in terms])
        factors = draw.standard_normal((DEGREES, TERMS))
        parts = np.einsum("dtn,dt->dn", self._products, factors)
        scale = np.sqrt((parts**2).mean(1, keepdims=True) * DEGREES)
        self._parts = parts / scale
        self.inputs = torch.from_numpy(signs)
        self.labels = torch.from_numpy(self._parts.sum(0).astype(np.float32))

    def errors(self, outputs: Tensor) -> np.ndarray:
        """Returns the error of every degree, 1 where nothing is learned, float64 [degrees]."""
        missing = self.labels.double().numpy() - outputs.double().numpy()
        found = []
        for products in self._products:
            basis = np.unique(products, axis=0)
            coefficients = basis @ missing / len(missing)
            found.append((coefficients**2).sum() * DEGREES)
        return np.array(found)


class Network(nn.Module):
    """A residual network with norms before its layers, of which a plan keeps some."""

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)

        def weight(*shape: int, scale: float = 1.0) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=draw) * scale / shape[-1] ** 0.5)

        self.first = weight(width, SIGNS)
        # Each one tensor of all layers: what a plan leaves out gets a zero gradient.
        self.into = weight(LAYERS, width, width, scale=2**0.5)
        self.out = weight(LAYERS, width, width, scale=0.3)
        self.biases = nn.Parameter(torch.zeros(LAYERS, width))
        self.last = weight(width)

    def forward(self, x: Tensor, plan: Plan | None = None) -> Tensor:
        y_NH = x @ self.first.T
        into, out, biases = (part.unbind() for part in (self.into, self.out, self.biases))
        for i in range(LAYERS) if plan is None else plan.kept_layers:
            scale = 1.0 if plan is None else plan.layers[i].scale
            hidden = relu(rms_norm(y_NH, y_NH.shape[-1:]) @ into[i].T + biases[i])
            y_NH = y_NH + scale * (hidden @ out[i].T)
        return rms_norm(y_NH, y_NH.shape[-1:]) @ self.last


def methods(steps: int, width: int, seed: int) -> dict[str, Method]:
    """Returns the arms: RaPTr's path grows 12, 15, 17, 20 layers, PLD's rate saves as much."""
    shape = ModelShape("toy", ((Mlp(width, width, 2),),) * LAYERS, width, 1, None)
    counts = zip((0.25, 0.5, 0.75, 1.0), (12, 15, 17, 20))
    raptr = {"name": "raptr", "phases": [{"until": u, "layers": n} for u, n in counts]}
    # Mean over layers of i / L is (L + 1) / 2L, and theta is near theta_bar but for a hundredth.
    theta_bar = round(1 - SAVED / ((LAYERS + 1) / (2 * LAYERS)) / 0.99, 6)
    sections = {
        "dense": {"name": "full"},
        "RaPTr": raptr,
        "PLD": {"name": "pld", "theta_bar": theta_bar},
    }
    return {
        arm: build_method(section, seed=seed, steps=steps, shape=shape)
        for arm, section in sections.items()
    }


def train(method: Method, target: Polynomial, settings: Settings, seed: int) -> dict[str, Any]:
    """Trains one network, and evaluates the full one along the way.

    Returns:
        `done`, `loss` (mean squared error over all inputs) and `errors` (by degree) of every
        evaluation, and the share of layers that ran.
    """
    network = Network(settings.width, seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.rate, weight_decay=0.0)
    rows = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, 2]))
    kept, found = 0, {"done": [], "loss": [], "errors": []}
    every = settings.steps // EVALUATIONS
    for step in range(settings.steps):
        plan = method.plan(step)
        kept += len(plan.kept_layers)
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / (0.02 * settings.steps))
            group["lr"] = settings.rate * warm * (1 - step / settings.steps)
        some = torch.from_numpy(rows.integers(0, 2**SIGNS, settings.batch))
        loss = (network(target.inputs[some], plan) - target.labels[some]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == settings.steps:
            with torch.no_grad():
                outputs = network(target.inputs)
            found["done"].append(step + 1)
            found["loss"].append((outputs - target.labels).square().mean().item())
            found["errors"].append(target.errors(outputs).tolist())
    return {**found, "layers": kept / (LAYERS * settings.steps)}


def measure_polynomial(settings: Settings) -> dict[str, Any]:
    """Returns losses and errors of all arms and seeds, as they stand in the file of numbers.

    Raises:
        UserError: see `Settings.check`.
    """
    settings.check()
    began = time.monotonic()
    arms: dict[str, list[dict[str, Any]]] = {}
    for seed in settings.seeds:
        target = Polynomial(seed)
        for arm, method in methods(settings.steps, settings.width, seed).items():
            arms.setdefault(arm, []).append(train(method, target, settings, seed))
    return {
        "steps": settings.steps,
        "width": settings.width,
        "layers": LAYERS,
        "degrees": DEGREES,
        "seeds": list(settings.seeds),
        "arms": {
            arm: {
                "runs": runs,
                "layers_run": float(np.mean([run["layers"] for run in runs])),
                "loss": float(np.mean([run["loss"][-1] for run in runs])),
                "errors": np.mean([run["errors"][-1] for run in runs], axis=0).tolist(),
                "learned_after": learned_after(runs),
            }
            for arm, runs in arms.items()
        },
        "seconds": time.monotonic() - began,
    }


def learned_after(runs: Sequence[dict[str, Any]]) -> list[int | None]:
    """Returns after how many steps the mean error of each degree fell below a half, for good."""
    done = runs[0]["done"]
    errors = np.mean([run["errors"] for run in runs], axis=0)
    found: list[int | None] = []
    for of_degree in errors.T:
        above = np.flatnonzero(of_degree >= LEARNED)
        first = above[-1] + 1 if len(above) else 0
        found.append(done[first] if first < len(done) else None)
    return found
