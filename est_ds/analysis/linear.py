"""`analyse linear`: how far one layer moves a deep linear network, with and without norms.

The toy of RaPTr's section 5 (arXiv 2402.05913, figures 3 and 4): layer l has the matrix
W_l = sqrt(tau) A + sqrt(1 - tau) G_l, with A shared by all layers and G_l its own, both of entries
N(0, 1/d), so that |W_l u| is about |u|. With u = y / |y| the layers are

    residual and norm   y + W_l u      as a Transformer with norms before its parts
    residual alone      y + W_l y
    norm alone          W_l u

Where residual connections and norms are both there, |y| grows with depth while a layer adds about
1, so that each matters less the deeper the network is. For large d:

- tau = 0: |y_l| = sqrt(l + 1), and what layer l adds grows as the rest does, by sqrt((L + 1) /
  (l + 1)): Psi_l / |F| = 1 / sqrt(l + 1), whose mean falls as L^-1/2.
- tau = 1: without any one of its equal layers the network is that of depth L - 1: Psi_l is what one
  layer adds, about 1, and |F| grows as L: L^-1.
- Without norms what a layer adds is as large as what it reads, and both grow alike: at tau = 0
  Psi_l / |F| = sqrt(1/2). Without residual connections F_-l has nothing of F: sqrt(2).

Shapes: S samples, d width, L depth; `without` [l, S, d] are the networks that skip a layer so far.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from est_ds.errors import UserError

Layer = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _unit(y: np.ndarray) -> np.ndarray:
    return y / np.linalg.norm(y, axis=-1, keepdims=True)


LAYERS: dict[str, Layer] = {
    "residual and norm": lambda matrix, y: y + _unit(y) @ matrix.T,
    "residual alone": lambda matrix, y: y + y @ matrix.T,
    "norm alone": lambda matrix, y: _unit(y) @ matrix.T,
}
# Powers of L by which mean Psi / |F| falls in the limit of many layers.
LIMITS = {("residual and norm", 0.0): -0.5, ("residual and norm", 1.0): -1.0}


def expected(name: str, tau: float, depth: int) -> float | None:
    """Returns the mean of Psi_l / |F| in the limit of a large width; None where it is not known."""
    if tau:
        return None
    if name == "residual and norm":
        return float((1 / np.sqrt(np.arange(depth) + 2)).mean())
    return math.sqrt(0.5) if name == "residual alone" else math.sqrt(2)


@dataclass(frozen=True)
class Network:
    """A linear network at some inputs.

    Attributes:
        norms: |y_l| behind every layer, 0 before the first; mean over the inputs, float64 [L + 1].
        psi: |F - F_-l|, mean over the inputs, float64 [L].
        relative: |F - F_-l| / |F|, mean over the inputs, float64 [L].
    """

    norms: np.ndarray
    psi: np.ndarray
    relative: np.ndarray


@dataclass(frozen=True)
class Settings:
    depths: tuple[int, ...] = (8, 16, 32, 64, 128)
    taus: tuple[float, ...] = (0.0, 0.5, 1.0)
    width: int = 100
    samples: int = 100
    seed: int = 0

    def check(self) -> None:
        """Raises UserError if a value is not allowed."""
        if len(set(self.depths)) < 2 or min(self.depths) < 2:
            raise UserError(
                f"--depths={','.join(map(str, self.depths))} is not allowed: a rate needs two "
                f"depths of at least 2; use for instance --depths 8,16,32."
            )
        if not all(0 <= tau <= 1 for tau in self.taus):
            raise UserError(
                f"--taus={','.join(f'{t:g}' for t in self.taus)} is not allowed; use shares of 0 "
                f"to 1."
            )


def run_network(matrices: Sequence[np.ndarray], inputs: np.ndarray, layer: Layer) -> Network:
    """Runs a network, and with it all that skip one layer.

    Args:
        matrices: [d, d] of every layer.
        inputs: float64 [S, d].
    """
    y, norms = inputs, [np.linalg.norm(inputs, axis=-1).mean()]
    without = np.empty((0, *inputs.shape))
    for matrix in matrices:
        # Each goes through the layer, and a new one skips it.
        without = np.concatenate([layer(matrix, without), y[None]])
        y = layer(matrix, y)
        norms.append(np.linalg.norm(y, axis=-1).mean())
    psi = np.linalg.norm(without - y, axis=-1)
    relative = psi / np.linalg.norm(y, axis=-1)
    return Network(np.array(norms), psi.mean(1), relative.mean(1))


def drawn(settings: Settings, tau: float, depth: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns the matrices of a depth, and inputs from the unit sphere: a function of the seed."""
    # The same first layers and inputs at every depth, and for every tau.
    shared, own, inputs = (
        np.random.Generator(np.random.Philox(key=settings.seed, counter=[0, 0, 0, kind]))
        for kind in range(3)
    )
    d = settings.width
    common = shared.standard_normal((d, d)) / np.sqrt(d)
    matrices = [
        np.sqrt(tau) * common + np.sqrt(1 - tau) * own.standard_normal((d, d)) / np.sqrt(d)
        for _ in range(depth)
    ]
    return matrices, _unit(inputs.standard_normal((settings.samples, d)))


def measure_linear(settings: Settings) -> dict[str, Any]:
    """Returns norms, Psi and rates of all networks, as they stand in the file of numbers.

    Raises:
        UserError: see `Settings.check`.
    """
    settings.check()
    began, depths = time.monotonic(), sorted(set(settings.depths))
    found = []
    for tau in settings.taus:
        for name, layer in LAYERS.items():
            networks = [run_network(*drawn(settings, tau, depth), layer) for depth in depths]
            means = [float(n.relative.mean()) for n in networks]
            deepest = networks[-1]
            found.append(
                {
                    "tau": tau,
                    "layers": name,
                    "norms": deepest.norms.tolist(),
                    "psi": deepest.psi.tolist(),
                    "psi_over_first": (deepest.psi / deepest.psi[0]).tolist(),
                    "mean_psi_over_norm": means,
                    "rate": rate(depths, means),
                    "limit_rate": LIMITS.get((name, tau)) if name == "residual and norm" else 0.0,
                    "expected": [expected(name, tau, depth) for depth in depths],
                }
            )
    return {
        "width": settings.width,
        "samples": settings.samples,
        "seed": settings.seed,
        "depths": depths,
        "networks": found,
        "seconds": time.monotonic() - began,
    }


def rate(depths: Sequence[int], values: Sequence[float]) -> float:
    """Returns the power of the depth by which values go: the slope between their logarithms."""
    return float(np.polyfit(np.log(depths), np.log(values), 1)[0])
