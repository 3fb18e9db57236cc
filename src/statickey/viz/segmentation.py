"""Pictures of class maps: over their image, and as bars."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from .figures import FAINT, STYLE

Colour = tuple[int, int, int]
_SHOWN = 12


def class_colours(num_classes: int) -> list[Colour]:
    """Colours for classes, far from each other however many: hues a golden angle apart, at two brightnesses."""
    colours: list[Colour] = []
    for i in range(num_classes):
        hue = (0.58 + i * 0.381966) % 1
        red, green, blue = mpl.colors.hsv_to_rgb((hue, (0.75, 0.5)[i % 2], (0.95, 0.72)[i // 2 % 2]))
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colours


def class_map_overlay(
    image: NDArray[Any],
    classes: NDArray[Any],
    class_names: Sequence[str],
    title: str = "",
    palette: Sequence[Colour] | None = None,
) -> Figure:
    """An image beside itself under the colours of its classes, with the names of those that cover most.

    Args:
        image: (H, W, 3) in [0, 1].
        classes: Class of every pixel, (H, W).
        class_names: Names of the classes.
        title: Above the picture.
        palette: A colour per class; default ``class_colours``.
    """
    colours = np.asarray(class_colours(len(class_names)) if palette is None else palette) / 255
    found, counts = np.unique(classes, return_counts=True)
    most = found[np.argsort(-counts, kind="stable")][:_SHOWN]
    height, width = classes.shape
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.2 * height / width + 0.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.imshow(image)
        right.imshow(0.45 * image + 0.55 * colours[classes])
        if len(found) > 1:
            right.contour(classes, levels=np.arange(len(class_names)) + 0.5, colors="white", linewidths=0.5)
        for axes in (left, right):
            axes.axis("off")
        share = dict(zip(found.tolist(), (100 * counts / classes.size).tolist(), strict=True))
        figure.legend(
            handles=[Patch(color=colours[c], label=f"{class_names[c]} {share[c]:.0f} %") for c in most.tolist()],
            loc="outside lower center",
            ncols=6,
            frameon=False,
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure


def class_bars(rows: Sequence[Mapping[str, Any]], key: str, label: str) -> Figure:
    """One bar a class, the best first.

    Args:
        rows: One a class, with ``class`` and a number, or None, under ``key``.
        key: Which number.
        label: What it is.
    """
    known = sorted((row for row in rows if row[key] is not None), key=lambda row: row[key])
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6, 0.8 + 0.26 * max(len(known), 1)), layout="constrained")
        axes = figure.subplots()
        axes.barh([row["class"] for row in known], [row[key] for row in known], color="#2f4b7c", height=0.7)
        for place, row in enumerate(known):
            axes.text(row[key] + 1, place, f"{row[key]:.1f}", va="center", fontsize=8)
        axes.set_xlim(0, 108)
        axes.set_title(label)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.spines["bottom"].set_color(FAINT)
    return figure
