"""Evolving subnetwork training of a two-layer perceptron: the whole method in one short file.

A step trains a random part of the hidden units, and scales what they give by n / k. Phase by phase
the part grows to the whole. Run it: python -m est_ds.analysis.toys
"""

import numpy as np
import torch

INPUTS, WIDTH, BATCH, RATE = 10, 64, 64, 3e-3
# until which share of the run, and the fraction of the hidden units that every step keeps
EST = ((0.3, 0.5), (0.65, 0.75), (1.0, 1.0))
DENSE = ((1.0, 1.0),)


def kept_units(seed: int, step: int, fraction: float) -> np.ndarray:
    """The hidden units of a step: a function of seed and step, so that every process draws the same
    and a resumed run goes on with them. These are est_ds' own draws of a layer's MLP."""
    words = np.random.Philox(key=seed, counter=[0, 16, 0, step]).random_raw(WIDTH // 2)
    keys = words.astype("<u8").view("<u4")  # one for every unit; those of the smallest are kept
    return np.sort(np.argsort(keys, kind="stable")[: round(fraction * WIDTH)])


def fraction_at(phases: tuple, done: float) -> float:
    return next(fraction for until, fraction in phases if done < until)


def predict(weights: list, x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Only rows and columns of the kept units are multiplied by; the others get a zero gradient."""
    into, bias, out, last = weights
    hidden = torch.relu(x @ into[kept].T + bias[kept])
    return hidden @ out[kept] * (WIDTH / len(kept)) + last


def task(seed: int, count: int, noise: float) -> tuple:
    """A target that no small network has: products of neighbouring inputs."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(count, INPUTS, generator=draw)
    y = (x[:, :-1] * x[:, 1:]).sum(1) / 3
    return x, y + noise * torch.randn(count, generator=draw)


def train(phases: tuple, steps: int, seed: int) -> list:
    """Returns the held-out error of the full network after every tenth of the run."""
    draw = torch.Generator().manual_seed(seed)
    sizes = ((WIDTH, INPUTS), (WIDTH,), (WIDTH,), ())
    weights = [torch.randn(s, generator=draw) / (s[-1] if s else 1) ** 0.5 for s in sizes]
    weights = [w.requires_grad_() for w in weights]
    optimizer = torch.optim.AdamW(weights, lr=RATE)
    (x, y), (x_held, y_held), everything = task(0, 4096, 0.3), task(1, 2048, 0.0), range(WIDTH)
    errors = []
    for step in range(steps):
        kept = torch.from_numpy(kept_units(seed, step, fraction_at(phases, step / steps)))
        rows = torch.randint(len(x), (BATCH,), generator=draw)
        loss = (predict(weights, x[rows], kept) - y[rows]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
        optimizer.step()
        if (step + 1) * 10 // steps > step * 10 // steps:
            with torch.no_grad():
                held = predict(weights, x_held, torch.tensor(everything))
            errors.append((held - y_held).square().mean().item())
    return errors


def cost(phases: tuple, steps: int) -> float:
    """FLOPs of a run over those of a dense step: all products go by the kept units."""
    return sum(fraction_at(phases, step / steps) for step in range(steps))


if __name__ == "__main__":
    for name, phases in (("dense", DENSE), ("EST", EST)):
        print(name, "held-out error", *(f"{e:.3f}" for e in train(phases, 2000, seed=0)))
