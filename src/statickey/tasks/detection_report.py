"""What a detector found on images: numbers, tables and pictures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from ..data import DetectionData, normalize, run_length_tools
from ..errors import StaticKeyError
from ..viz import class_colours, class_scores, draw_detections
from .average_precision import AREAS, AveragePrecision, match_boxes, match_masks
from .dense import DensePredictor
from .display import counted
from .task import Answer

LEAST_SCORE = 0.3
"""Under it a detection is not shown."""
_SHOWN = 20


class DetectionScores:
    """Detections on marked images, and what they are worth.

    Args:
        class_names: Names of the classes, in the order of the labels.
    """

    def __init__(self, class_names: tuple[str, ...]) -> None:
        self.class_names = class_names
        self._found: list[dict[str, Any]] = []
        self._targets: list[dict[str, Any]] = []

    def update(self, outputs: Sequence[dict[str, Any]], targets: Sequence[dict[str, Any]]) -> None:
        """Add a batch of detections and marks."""
        self._found += outputs
        self._targets += targets

    @cached_property
    def scores(self) -> dict[str, AveragePrecision]:
        """By ``box``, and ``mask`` where there are masks; no batch is added after the first look."""
        areas = tuple(AREAS)
        found = {"box": match_boxes(self._found, self._targets, areas=areas)}
        if all("masks" in own for own in (*self._found, *self._targets)):
            found["mask"] = match_masks(self._found, self._targets, areas=areas)
        return found

    def to_json(self) -> dict[str, Any]:
        """AP in percent, at overlaps of 0.5 and 0.75, and by the objects' size; None without objects."""
        found: dict[str, Any] = {"images": len(self._targets)}
        for kind, scores in self.scores.items():
            found[f"{kind}_ap"] = _mean(scores.by_class())
            for name, t in (("50", 0), ("75", 5)):
                found[f"{kind}_ap{name}"] = _mean(scores.by_class(thresholds=slice(t, t + 1)))
            for area in ("small", "medium", "large"):
                found[f"{kind}_ap_{area}"] = _mean(scores.by_class(area=list(AREAS).index(area)))
        return found | {"per_class": self.per_class()}

    def rows(self) -> dict[str, str]:
        """The numbers for the terminal."""
        found = self.to_json()
        rows = {}
        for kind in self.scores:
            rows[f"{kind} AP"] = _percent(found[f"{kind}_ap"])
            rows[f"{kind} AP50, AP75"] = ", ".join(_percent(found[f"{kind}_ap{t}"]) for t in (50, 75))
            by_size = (f"{_percent(found[f'{kind}_ap_{size}'])} {size}" for size in ("small", "medium", "large"))
            rows[f"{kind} AP by size"] = ", ".join(by_size)
        return rows

    def per_class(self) -> list[dict[str, Any]]:
        """Objects and AP of every class; None where it has no object."""
        box = self.scores["box"]
        counts = Counter(box.object_labels[~box.object_ignored[:, 0]].tolist())
        columns = {f"{kind}_ap": scores.by_class() for kind, scores in self.scores.items()}
        columns["box_ap50"] = box.by_class(thresholds=slice(0, 1))
        return [
            {"class": name, "objects": counts[k]}
            | {column: 100 * by_class[k] if k in by_class else None for column, by_class in columns.items()}
            for k, name in enumerate(self.class_names)
        ]

    def figures(self) -> dict[str, Figure]:
        """AP of every class."""
        rows = self.per_class()
        values = {kind: [row[f"{kind}_ap"] for row in rows] for kind in self.scores}
        return {"per_class": class_scores(self.class_names, values, "AP in %")}

    def results(self, data: DetectionData) -> list[dict[str, Any]]:
        """All detections in COCO's form, which its tools and servers read."""
        rows = []
        for own, target in zip(self._found, self._targets, strict=True):
            for n, (box, label, score) in enumerate(
                zip(own["boxes"].tolist(), own["labels"].tolist(), own["scores"].tolist(), strict=True)
            ):
                x1, y1, x2, y2 = box
                row = {"image_id": target["image_id"], "category_id": data.category_ids[label], "score": score}
                row["bbox"] = [x1, y1, x2 - x1, y2 - y1]
                rows.append(row | ({"segmentation": _plain(own["masks"][n])} if "masks" in own else {}))
        return rows


class DetectionPredictor(DensePredictor):
    """A trained detector at work on image files, which it brings to its size itself; ``top_k`` objects an image."""

    def prepare(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Normalised images, each of its own size."""
        return [normalize(image.to(self.mean.device), self.mean, self.std) for image in pixels]

    @torch.inference_mode()
    def predict(self, images: Sequence[Tensor]) -> list[Answer]:
        """``objects`` of each image: a list of ``class``, ``score``, ``box`` (corners in pixels), and ``mask``.

        Masks are COCO's run lengths as text.
        """
        rows = []
        for image in images:  # one by one: a photograph may be of any size
            (found,) = self.model([image])
            kept = (found["scores"] >= LEAST_SCORE).nonzero().flatten()[: self.top_k]
            objects = [
                {
                    "class": self.card.class_names[int(found["labels"][i])],
                    "score": float(found["scores"][i]),
                    "box": found["boxes"][i].tolist(),
                }
                for i in kept
            ]
            if "masks" in found:
                for i, own in zip(kept, objects, strict=True):
                    pixels = found["masks"][i].cpu().numpy().astype(np.uint8)
                    own["mask"] = _plain(run_length_tools().encode(np.asfortranarray(pixels)))
            rows.append(Answer({"objects": objects}))
        return rows

    def picture(self, pixels: Tensor, answer: Answer, title: str) -> Figure:
        """The objects on their image."""
        objects = answer.row["objects"]
        image, colours = pixels.permute(1, 2, 0).numpy() / 255, class_colours(self.card.class_names)
        return draw_detections(image, objects, masks=mask_pixels(objects), colours=colours, title=title)

    def mask(self, answer: Answer) -> Image.Image:
        """A detector has none; raises StaticKeyError."""
        raise StaticKeyError("a detector has no class for every pixel; leave out --masks, or give --pictures")

    def title(self, row: Mapping[str, Any]) -> str:
        """How many of which class."""
        counts = Counter(own["class"] for own in row["objects"])
        return ", ".join(f"{number} {name}" for name, number in counts.most_common()) or "nothing found"

    def csv(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Sequence[str], list[dict[str, Any]]]:
        """One row an object."""
        cells = [
            {"file": row["file"], "class": own["class"], "score": f"{own['score']:.6f}"}
            | {name: f"{x:.2f}" for name, x in zip(("x1", "y1", "x2", "y2"), own["box"], strict=True)}
            | {name: row[name] for name in ("picture", "attention") if name in row}
            for row in rows
            for own in row["objects"]
        ]
        return list(cells[0]) if cells else ["file", "class", "score", "x1", "y1", "x2", "y2"], cells

    def table(self, rows: Sequence[Mapping[str, Any]]) -> Table:
        """What is on the first images."""
        title = counted(len(rows), "image") + (f", the first {_SHOWN}" if len(rows) > _SHOWN else "")
        table = Table(title=title, title_justify="left")
        table.add_column("file", overflow="fold")
        table.add_column("objects", style="bold", overflow="fold")
        table.add_column("surest", justify="right")
        for row in rows[:_SHOWN]:
            best = f"{100 * row['objects'][0]['score']:.0f} %" if row["objects"] else ""
            table.add_row(escape(row["file"]), escape(self.title(row)), best)
        return table


def mask_pixels(objects: Sequence[Mapping[str, Any]]) -> NDArray[np.bool_] | None:
    """The masks (n, H, W) of an image's predicted objects; None where they have none."""
    if not objects or "mask" not in objects[0]:
        return None
    return np.stack([run_length_tools().decode(own["mask"]) for own in objects]).astype(bool)


def _plain(mask: Mapping[str, Any]) -> dict[str, Any]:
    """Run lengths as JSON takes them."""
    return {"size": list(mask["size"]), "counts": mask["counts"].decode()}


def _mean(by_class: Mapping[int, float]) -> float | None:
    return 100 * float(np.mean(list(by_class.values()))) if by_class else None


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} %"
