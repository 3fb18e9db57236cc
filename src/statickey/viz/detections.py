"""Objects drawn on their image, and what classes score."""

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from .figures import INK, STYLE

_GOLDEN = 0.618034
_WIDTH = 7.0
"""Inches of a picture's longer side."""
_MOST_BARS = 40
Colour = tuple[float, float, float]


def class_colours(class_names: Sequence[str]) -> dict[str, Colour]:
    """A vivid colour for each class, neighbours far apart."""
    return {
        name: colorsys.hsv_to_rgb((0.58 + i * _GOLDEN) % 1, (0.85, 0.65)[i // 8 % 2], (0.95, 0.75)[i // 4 % 2])
        for i, name in enumerate(class_names)
    }


def draw_detections(
    image: NDArray[Any],
    objects: Sequence[Mapping[str, Any]],
    *,
    masks: NDArray[np.bool_] | None = None,
    colours: Mapping[str, Colour] | None = None,
    title: str = "",
) -> Figure:
    """Boxes, translucent masks, class names and scores on an image.

    The labels of small boxes stand outside them, and a label that would cover another one moves aside or is left out.

    Args:
        image: Pixels (H, W, 3) in [0, 1].
        objects: Of each ``class``, ``box`` (corners in pixels), and ``score`` unless it is a true mark.
        masks: Of each object, (n, H, W).
        colours: Of each class; default those of ``class_colours`` for the classes shown.
        title: Stands above.
    """
    names = sorted({own["class"] for own in objects})
    palette = class_colours(names) if colours is None else colours
    height, width = image.shape[:2]
    unit = _WIDTH / max(height, width)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(max(width * unit, 2.0), height * unit + (0.35 if title else 0.0)))
        axes = figure.add_axes((0, 0, 1, height * unit / figure.get_figheight()))
        axes.imshow(np.clip(image, 0, 1), interpolation="nearest" if max(height, width) < 200 else "antialiased")
        axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        axes.set_axis_off()
        if title:
            figure.text(
                0.01, 1 - 0.1 / figure.get_figheight(), title, va="top", fontsize=10, weight="bold", color=INK
            )
        # large objects first, so that small ones lie on top
        order = sorted(range(len(objects)), key=lambda i: -_area(objects[i]["box"]))
        if masks is not None:
            layer = np.zeros((height, width, 4))
            for i in order:
                layer[masks[i]] = (*palette[objects[i]["class"]], 0.45)
            axes.imshow(layer, interpolation="nearest")
        taken: list[tuple[float, float, float, float]] = []
        for i in order:
            x1, y1, x2, y2 = (float(x) - 0.5 for x in objects[i]["box"])  # pixel centres are whole numbers here
            colour = palette[objects[i]["class"]]
            for edge, thick in (("white", 2.6), (colour, 1.6)):
                axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=edge, linewidth=thick))
        for i in sorted(order, key=lambda i: -objects[i].get("score", 1.0)):
            _label(axes, objects[i], palette[objects[i]["class"]], (width, height), 1 / (72 * unit), taken)
    return figure


def class_scores(class_names: Sequence[str], values: Mapping[str, Sequence[float | None]], label: str) -> Figure:
    """Bars of what every class scores, the best above; of many classes the best and the worst.

    Args:
        class_names: Names of the classes.
        values: One number a class by what it is of, such as boxes and masks; the first decides the order.
        label: What the numbers are.
    """
    first = next(iter(values.values()))
    order = sorted((i for i, value in enumerate(first) if value is not None), key=lambda i: -(first[i] or 0.0))
    if len(order) > _MOST_BARS:
        order = order[: _MOST_BARS // 2] + order[-_MOST_BARS // 2 :]
    thick = 0.8 / len(values)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.5, 1.0 + 0.24 * max(len(order), 1)), layout="constrained")
        axes = figure.subplots()
        for n, (kind, own) in enumerate(values.items()):
            places = [row + (n - (len(values) - 1) / 2) * thick for row in range(len(order))]
            axes.barh(places, [own[i] or 0.0 for i in order], thick, label=kind, color=("#2f4b7c", "#f2a541")[n % 2])
        axes.set_yticks(range(len(order)), [class_names[i] for i in order])
        axes.set(xlim=(0, 100), ylim=(max(len(order), 1) - 0.4, -0.6), xlabel=label)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        if len(values) > 1:
            axes.legend(frameon=False, loc="lower right")
    return figure


def _label(
    axes: Any,
    own: Mapping[str, Any],
    colour: Colour,
    extent: tuple[int, int],
    point: float,
    taken: list[tuple[float, float, float, float]],
) -> None:
    """Write a class and score at the first free place at its box; sizes are in pixels, ``point`` of them a point."""
    text = own["class"] + (f" {100 * own['score']:.0f} %" if "score" in own else "")
    size = 7.5
    wide, high = (0.62 * size * len(text) + 5) * point, (size + 5) * point
    x1, y1, x2, y2 = own["box"]
    inside = [(x1, y1), (x1, y2 - high)] if y2 - y1 > 2.5 * high and x2 - x1 > wide else []
    for left, top in [(x1, y1 - high), *inside, (x1, y2), (x2 - wide, y1 - high), (x2 - wide, y2), (x2, y1)]:
        left = min(max(left, 0.0), max(extent[0] - wide, 0.0))
        place = (left, top, left + wide, top + high)
        outside = top < -0.1 * high or top + high > extent[1]
        if outside or any(_overlap(place, other) for other in taken):
            continue
        taken.append(place)
        dark = sum(c * w for c, w in zip(colour, (0.3, 0.59, 0.11), strict=True)) < 0.6
        axes.add_patch(Rectangle((left - 0.5, top - 0.5), wide, high, color=colour, linewidth=0))
        axes.text(
            left - 0.5 + wide / 2,
            top - 0.5 + high / 2,
            text,
            ha="center",
            va="center_baseline",
            fontsize=size,
            color="white" if dark else INK,
        )
        return


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _area(box: Sequence[float]) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
