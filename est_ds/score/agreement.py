"""How well predictions agree with labels: GLUE's metrics."""

from __future__ import annotations

import numpy as np


def class_metrics(predicted: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, float]:
    """Returns accuracy, and of two classes F1 of the second and Matthews' correlation.

    Args:
        predicted, labels: numbers of classes, int [n].
    """
    found = {"accuracy": float((predicted == labels).mean())}
    if classes == 2:
        both, either = predicted & labels, predicted | labels
        found["f1"] = 2.0 * both.sum() / max(1, both.sum() + either.sum())
        found["matthews"] = _correlation(predicted, labels)
    return {name: float(value) for name, value in found.items()}


def value_metrics(predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Returns Pearson's and Spearman's correlation."""
    from scipy import stats  # starts threads, which no process that forks may have

    ranks = (stats.rankdata(values) for values in (predicted, labels))
    return {"pearson": _correlation(predicted, labels), "spearman": _correlation(*ranks)}


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's correlation, which of two classes is Matthews'; 0 where one does not vary."""
    a, b = a - a.mean(), b - b.mean()
    scale = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / scale) if scale > 0 else 0.0
