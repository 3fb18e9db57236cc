"""The figures of measurements of speed."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from .figures import STYLE, colours


def scaling(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Time and peak memory against tokens, a line per mixer.

    Args:
        rows: With contender (``NAME SIZE``), tokens, milliseconds and peak_megabytes.
    """
    names = list(dict.fromkeys(str(row["contender"]).rpartition(" ")[0] for row in rows))
    shades = colours(names)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        shown = {"milliseconds": "time, ms", "peak_megabytes": "peak memory, MB"}
        shown = {key: title for key, title in shown.items() if any(row[key] for row in rows)}
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        for axes, (key, title) in zip(panels, shown.items(), strict=True):
            for name in names:
                points = [
                    (row["tokens"], row[key])
                    for row in rows
                    if str(row["contender"]).rpartition(" ")[0] == name and row[key]
                ]
                axes.plot(*zip(*sorted(points), strict=True), "o-", color=shades[name], label=name, linewidth=1.8)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(title)
            axes.set_xlabel("tokens")
            axes.grid(axis="y")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def accuracy_against_cost(
    points: Mapping[str, tuple[float, float, float | None]], title: str = "accuracy, %"
) -> Figure:
    """A metric against the measured time of a training step.

    Args:
        points: For each mixer, milliseconds per image, the metric's mean and its standard deviation.
        title: The metric and its unit.
    """
    shades = colours(list(points))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        for name, (cost, mean, spread) in points.items():
            axes.errorbar(cost, mean, yerr=spread, fmt="o", color=shades[name], markersize=8, capsize=3)
            axes.annotate(name, (cost, mean), xytext=(8, 5), textcoords="offset points")
        axes.set_xlabel("training step, ms per image")
        axes.set_title(title)
        axes.set_xlim(0, 1.2 * max(cost for cost, _, _ in points.values()))
        axes.margins(y=0.15)
        axes.grid()
        axes.set_axisbelow(True)
    return figure
