"""Pictures of class maps."""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from .detections import class_colours
from .figures import STYLE

_SHOWN = 12


def class_map_overlay(
    image: NDArray[Any],
    classes: NDArray[Any],
    class_names: Sequence[str],
    title: str = "",
) -> Figure:
    """An image beside itself under the colours of its classes, with the names of those that cover most.

    Args:
        image: (H, W, 3) in [0, 1].
        classes: Class of every pixel, (H, W).
        class_names: Names of the classes.
        title: Above the picture.
    """
    colours = np.array(list(class_colours(class_names).values()))
    found, counts = np.unique(classes, return_counts=True)
    most = found[np.argsort(-counts, kind="stable")][:_SHOWN]
    height, width = classes.shape
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.2 * height / width + 0.9), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.imshow(image)
        right.imshow(0.45 * image + 0.55 * colours[classes])
        for each in found if len(found) > 1 else ():
            right.contour(classes == each, levels=[0.5], colors="white", linewidths=0.5)
        for axes in (left, right):
            axes.axis("off")
        share = dict(zip(found.tolist(), (100 * counts / classes.size).tolist(), strict=True))
        figure.legend(
            handles=[Patch(color=colours[c], label=f"{class_names[c]}: {share[c]:.1f} %") for c in most.tolist()],
            loc="outside lower center",
            ncols=6,
            frameon=False,
        )
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure
