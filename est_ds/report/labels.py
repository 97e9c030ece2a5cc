"""Names beside points of a plot, moved up and down until none lies on another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

ASIDE = 6.0  # pixels between a point and its name
HALF = 4.0  # pixels from the middle of a point to its edge
NEAR = 3.0  # pixels up or down from which on a thin line leads to the name
# Pixels up or down of the places that are tried, the nearest first.
UPS = sorted(range(-300, 301, 2), key=abs)


@dataclass(frozen=True)
class Label:
    """A name at a point, in the units of the axes."""

    text: str
    x: float
    y: float
    colour: str


def place_labels(
    figure: Figure, axes: Axes, labels: Sequence[Label], curve: np.ndarray, size: float = 6
) -> None:
    """Writes names right or left of their points, each as near as it has room.

    It keeps them off each other, off all points, the curve and the legend. Call it last, once the
    axes have their limits.

    Args:
        curve: points of a line, [n, 2].
        size: of the letters, in points.
    """
    texts = [_write(axes, label, size) for label in labels]
    figure.draw_without_rendering()  # now the size of everything is known
    frame, to_pixels = axes.get_window_extent(), axes.transData.transform
    points = [to_pixels((label.x, label.y)) for label in labels]
    taken = [_around(point) for point in points]
    taken += [_around(point, 1.0) for point in _along(to_pixels(curve) if len(curve) else curve)]
    if legend := axes.get_legend():
        taken.append(legend.get_window_extent())
    for i in sorted(range(len(labels)), key=lambda i: (-points[i][1], points[i][0])):
        extent = texts[i].get_window_extent()
        place = _place(points[i], extent.width, extent.height, taken, frame)
        taken.append(place)
        right = place.x0 > points[i][0]
        at = np.array([place.x0 if right else place.x1, (place.y0 + place.y1) / 2])
        offset = (at - points[i]) * 72 / figure.dpi
        texts[i].set_position(offset)
        texts[i].set_horizontalalignment("left" if right else "right")
        if abs(at[1] - points[i][1]) > NEAR:
            _lead(axes, labels[i], offset)


def _write(axes: Axes, label: Label, size: float) -> Annotation:
    text = axes.annotate(
        label.text,
        (label.x, label.y),
        (0, 0),
        textcoords="offset points",
        fontsize=size,
        color=label.colour,
        va="center",
        parse_math=False,
    )
    text.set_in_layout(False)
    return text


def _lead(axes: Axes, label: Label, offset: np.ndarray) -> None:
    """A thin line from a point to its name, which is so many points of the page away."""
    line = axes.annotate(
        "",
        (label.x, label.y),
        tuple(offset),
        textcoords="offset points",
        arrowprops={"arrowstyle": "-", "color": label.colour, "lw": 0.5, "shrinkA": 0},
    )
    line.set_in_layout(False)


def _around(point: np.ndarray, half: float = HALF) -> Bbox:
    return Bbox([point - half, point + half])


def _along(line: np.ndarray) -> Iterable[np.ndarray]:
    """Points of a line, none further than a few pixels from the next."""
    for one, other in zip(line, line[1:]):
        parts = max(2, int(np.hypot(*(other - one)) / 4))
        yield from (one + part * (other - one) for part in np.linspace(0, 1, parts))


def _place(
    point: np.ndarray, width: float, height: float, taken: Sequence[Bbox], frame: Bbox
) -> Bbox:
    """The free place nearest to a point; beside it where there is none."""
    sides = (point[0] + ASIDE, point[0] - ASIDE - width)
    for up, left in product(UPS, sides):
        place = Bbox.from_bounds(left, point[1] + up - height / 2, width, height)
        inside = frame.contains(*place.min) and frame.contains(*place.max)
        if inside and not any(place.overlaps(other) for other in taken):
            return place
    return Bbox.from_bounds(sides[0], point[1] - height / 2, width, height)
