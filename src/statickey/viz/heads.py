"""What a calibration found of every head, as a picture."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from ..convert import HeadFigures
from ..errors import StaticKeyError
from .figures import INK, STYLE

_PANELS = {
    "explained": ("logit variance explained", "Blues"),
    "kl": ("KL of the static map, nats", "Oranges"),
    "output_error": ("error of the head's output", "Oranges"),
    "spread": ("spread of the map over images", "Oranges"),
    "change": ("output change, converted alone", "Oranges"),
}
_MARK = "#17a398"


def head_map(heads: Sequence[HeadFigures]) -> Figure:
    """A panel for each figure: a row a layer, a column a head; framed are the heads that became static.

    Args:
        heads: Of a ``CalibrationReport``.

    Raises:
        StaticKeyError: There is none.
    """
    if not heads:
        raise StaticKeyError("no head to draw; give the heads of a CalibrationReport")
    layers = list(dict.fromkeys(head.layer for head in heads))
    columns = 1 + max(head.head for head in heads)
    panels = {name: shown for name, shown in _PANELS.items() if getattr(heads[0], name) is not None}
    with mpl.rc_context(STYLE):
        width = max(0.34 * columns, 1.9) + 0.9
        figure = Figure(figsize=(width * len(panels) + 1.2, 0.3 * len(layers) + 1.3), layout="constrained")
        row: Any = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (name, (title, colours)) in zip(row, panels.items(), strict=True):
            values = np.full((len(layers), columns), np.nan)
            for head in heads:
                values[layers.index(head.layer), head.head] = getattr(head, name)
            low = 0.0 if name != "explained" else min(0.0, float(np.nanmin(values)))
            picture = axes.imshow(values, cmap=colours, vmin=low, aspect="auto", interpolation="nearest")
            for head in heads:
                if head.static:
                    place = (head.head - 0.42, layers.index(head.layer) - 0.42)
                    axes.add_patch(Rectangle(place, 0.84, 0.84, fill=False, edgecolor=_MARK, linewidth=1.6))
            axes.set_title(title, fontsize=8.5)
            axes.set_xlabel("head")
            axes.set_xticks(range(0, columns, max(columns // 8, 1)))
            axes.set_yticks(range(len(layers)), layers)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            figure.colorbar(picture, ax=axes, shrink=0.9, aspect=18)
        static = sum(head.static for head in heads)
        figure.suptitle(f"{static} of {len(heads)} heads static (framed)", x=0.01, ha="left", fontsize=10, color=INK)
    return figure
