"""The figures of comparisons, evaluations and predictions, as matplotlib figures."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

INK, FAINT = "#1f2933", "#9aa5b1"
_COLOURS = (
    "#2f4b7c",
    "#e4572e",
    "#17a398",
    "#c879ff",
    "#f2a541",
    "#5b8e7d",
    "#8f2d56",
    "#7b8794",
    "#3fa7d6",
    "#b5651d",
)
_SPOTLIGHT = LinearSegmentedColormap.from_list(
    "spotlight", ["#101828c0", "#10182860", "#ffb00000", "#ff8a0090", "#e8210cc0"]
)
"""Dark, transparent in the middle, amber to red."""
STYLE: Any = {
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": "#e4e7eb",
}


def colours(names: Sequence[str]) -> dict[str, str]:
    """A colour for each mixer, by its place in the table."""
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}


def learning_curves(
    curves: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], shown: Mapping[str, str]
) -> list[Figure]:
    """What training recorded against epochs, a figure each; after one epoch, a point a mixer.

    Args:
        curves: For each mixer, one curve a seed, one row an epoch.
        shown: For each figure, the key in the rows and the title.
    """
    shades = colours(list(curves))
    with mpl.rc_context(STYLE):
        figures = []
        for key, title in shown.items():
            figure = Figure(figsize=(4.5, 3.2), layout="constrained")
            figures.append(figure)
            axes: Any = figure.subplots()
            for place, (name, runs) in enumerate(curves.items()):
                values = np.array([[row[key] for row in run] for run in runs])
                mean, low, high = values.mean(axis=0), values.min(axis=0), values.max(axis=0)
                if len(mean) == 1:
                    seeds = None if len(runs) == 1 else (mean - low, high - mean)
                    axes.errorbar([place], mean, yerr=seeds, fmt="o", color=shades[name], label=name, capsize=3)
                    continue
                epochs = [row["epoch"] for row in runs[0]]
                axes.plot(epochs, mean, color=shades[name], label=name, linewidth=1.8)
                if len(runs) > 1:
                    axes.fill_between(epochs, low, high, color=shades[name], alpha=0.15, linewidth=0)
            axes.set_title(title)
            axes.grid(axis="y")
            if all(len(runs[0]) == 1 for runs in curves.values()):
                axes.set_xticks(range(len(curves)), list(curves))
                axes.set_xlabel("after one epoch")
                axes.margins(x=0.2)
            else:
                axes.set_xlabel("epoch")
                axes.xaxis.get_major_locator().set_params(integer=True)
        figures[0].axes[0].legend(frameon=False, ncols=2)
    return figures


def differences(rows: Sequence[Mapping[str, Any]], per_seed: Mapping[str, Sequence[float]], label: str) -> Figure:
    """Paired differences to the baseline: joint interval, that over images with seeds fixed, and the seeds.

    Args:
        rows: The rows of the summary.
        per_seed: For each mixer, its difference at each common seed.
        label: What the differences are of, and their unit.
    """
    shades = colours([row["mixer"] for row in rows])
    shown = [row for row in rows if row["difference"] is not None]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 0.9 + 0.45 * len(shown)), layout="constrained")
        axes = figure.subplots()
        axes.axvline(0, color=INK, linewidth=1)
        for y, row in enumerate(reversed(shown)):
            name, difference = row["mixer"], row["difference"]
            low, high = difference["image_interval"]
            axes.plot([low, high], [y, y], color=shades[name], linewidth=9, alpha=0.25, solid_capstyle="butt")
            if difference["interval"] is not None:
                axes.plot(difference["interval"], [y, y], color=shades[name], linewidth=2)
            seeds = per_seed.get(name, [])
            axes.plot(seeds, [y] * len(seeds), "|", color=INK, markersize=9, markeredgewidth=1)
            axes.plot(difference["mean"], y, "o", color=shades[name], markersize=7)
        axes.set_yticks(range(len(shown)), [row["mixer"] for row in reversed(shown)])
        axes.set_ylim(-0.6, len(shown) - 0.4)
        axes.set_xlabel(label)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
    return figure


def attention_overlay(image: NDArray[Any], weights: Tensor, feat_size: tuple[int, int], title: str) -> Figure:
    """Where a layer looks: the image, the mean over heads, and every head, laid over the image.

    Of a network with a class token the map is what that token attends to; else what all tokens do on average.
    Uniform attention, 1/N for each of N tokens, leaves the image grey; less darkens it, more colours it, on one
    scale for all heads, logarithmic above 1/N.

    Args:
        image: (H, W, C) in [0, 1].
        weights: The layer's map of this image, (heads, tokens, tokens), prefix tokens first.
        feat_size: The token grid (H, W).
        title: What stands above the pictures.
    """
    num_tokens = weights.shape[-1]
    prefix = num_tokens - feat_size[0] * feat_size[1]
    rows = weights[:, 0] if prefix else weights.mean(dim=1)
    maps = num_tokens * rows[:, prefix:].reshape(-1, *feat_size).float().cpu().numpy()  # 1 is uniform
    peak = max(2.0, float(maps.max()))
    panels = {"mean of heads": maps.mean(axis=0)} | {f"head {i}": m for i, m in enumerate(maps, start=1)}
    columns = min(len(panels) + 1, 6)
    lines = -(-(len(panels) + 1) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.7 * columns, 1.85 * lines + 1), layout="constrained")
        figure.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=10, parse_math=False)
        panels_of_figure = figure.subplots(lines, columns, squeeze=False)
        grid = panels_of_figure.flat
        first, *others = grid
        first.imshow(image.squeeze(), cmap="gray")
        first.set_title("image", fontweight="normal", fontsize=8, loc="center")
        height, width = image.shape[:2]
        for axes, (name, seen) in zip(others, panels.items(), strict=False):
            axes.imshow(image.mean(axis=-1), cmap="gray", vmin=-0.3, vmax=1)  # black would hide the shade
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            level = np.where(seen > 1, np.log(np.maximum(seen, 1)) / np.log(peak), seen - 1)
            drawn = axes.imshow(level, cmap=_SPOTLIGHT, vmin=-1, vmax=1, extent=extent, interpolation="bilinear")
            axes.set_title(name, fontweight="normal", fontsize=8, loc="center")
        for axes in (first, *others):
            _blank(axes)
        for axes in others[len(panels) :]:
            axes.set_visible(False)
        bar = figure.colorbar(drawn, ax=panels_of_figure, location="bottom", shrink=min(0.6, 2 / columns), aspect=30)
        bar.set_ticks([-1, 0, 1], labels=["0", "1/N (uniform)", f"{peak:.3g}/N"])
    return figure


def labelled_image(image: NDArray[Any], title: str) -> Figure:
    """An image, (H, W, 3) or (H, W, 1) in [0, 1], under a title."""
    height, width = image.shape[:2]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4, 4 * height / width + 0.4), layout="constrained")
        axes = figure.subplots()
        axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axes.set_title(title)
        _blank(axes)
    return figure


def confusion_matrix(counts: Sequence[Sequence[int]], class_names: Sequence[str]) -> Figure:
    """Which classes are taken for which, in percent of the true class.

    Args:
        counts: Images by true (rows) and predicted class.
        class_names: Names of the classes.
    """
    table = np.asarray(counts, dtype=float)
    share = 100 * table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    many = len(class_names) > 30  # neither names nor numbers would be readable
    side = 6.5 if many else 1.6 + 0.46 * len(class_names)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(side + 0.6, side), layout="constrained")
        axes = figure.subplots()
        picture = axes.imshow(share, cmap="Blues", vmin=0, vmax=100)
        axes.set(xlabel="predicted", ylabel="true class", title="% of the true class")
        if not many:
            ticks = range(len(class_names))
            axes.set_xticks(ticks, class_names, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(ticks, class_names)
            for i, line in enumerate(share):
                for j, value in enumerate(line):
                    if value >= 0.5:
                        colour = "white" if value > 60 else INK
                        axes.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
        figure.colorbar(picture, ax=axes, shrink=0.8)
    return figure


def heads_by_layers(layers: Mapping[str, NDArray[Any]], title: str, *, signed: bool = False) -> Figure:
    """A picture for each head of each layer, a row a layer, a column a head.

    Args:
        layers: By name, colours (heads, H, W, 3) in [0, 1], or numbers (heads, H, W), each map on its own scale.
        title: What stands above.
        signed: Numbers are in [-1, 1], and on that scale.
    """
    columns = max(len(pictures) for pictures in layers.values())
    names = 0.07 * max(map(len, layers))
    shape = next(iter(layers.values())).shape
    high = 0.6 * min(max(shape[1] / shape[2], 0.5), 2.0)
    with mpl.rc_context(STYLE):
        size = (max(0.6 * columns + names + 0.2, 0.09 * len(title)), high * len(layers) + 0.6)
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title, x=0.02, ha="left", fontweight="bold", fontsize=10, parse_math=False)
        axes = figure.subplots()  # one for all: each costs more time than all of its pictures
        for row, pictures in enumerate(layers.values()):
            for column, picture in enumerate(pictures):
                lowest = min(0.0, float(picture.min()))  # below zero only where heads are mixed after the softmax
                low, high, cmap = (-1.0, 1.0, "RdBu_r") if signed else (lowest, None, "inferno")  # none of colours
                place = (column + 0.04, column + 0.96, row + 0.96, row + 0.04)
                axes.imshow(picture, extent=place, aspect="auto", vmin=low, vmax=high, cmap=cmap)
        axes.set(xlim=(0, columns), ylim=(len(layers), 0))
        axes.set_xticks(
            [column + 0.5 for column in range(columns)], [str(head) for head in range(1, columns + 1)], fontsize=8
        )
        axes.set_yticks([row + 0.5 for row in range(len(layers))], list(layers), fontsize=8, parse_math=False)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return figure


def distances_by_layer(values: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """How far heads look, layer by layer: a point a head, a line through the means of the layers.

    Args:
        values: For each model, for each layer, a distance a head, as shares of the image's diagonal.
    """
    shades = colours(list(values))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.5, 3.2), layout="constrained")
        axes: Any = figure.subplots()
        for place, (name, layers) in enumerate(values.items()):
            shift = 0.12 * (place - (len(values) - 1) / 2)
            spots = [(number + shift, 100 * one) for number, heads in enumerate(layers, start=1) for one in heads]
            axes.plot(*zip(*spots, strict=True), ".", color=shades[name], markersize=6, alpha=0.55)
            means = [100 * sum(heads) / len(heads) for heads in layers]
            numbers = [number + shift for number in range(1, len(layers) + 1)]
            axes.plot(numbers, means, "-", color=shades[name], linewidth=1.6, label=name)
        axes.xaxis.get_major_locator().set_params(integer=True)
        furthest = max(100 * one for layers in values.values() for heads in layers for one in heads)
        axes.set(xlabel="layer", ylim=(0, 1.08 * furthest))
        axes.set_title("mean distance of query and key, % of the diagonal")
        axes.grid(axis="y")
        figure.legend(loc="outside right center", frameon=False)
    return figure


def _blank(axes: Any) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
