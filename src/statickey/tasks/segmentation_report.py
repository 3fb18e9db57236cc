"""What a segmenter got right, and what it says of images: numbers, tables and pictures."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from ..data import normalize, resized_image
from ..viz import class_colours, class_map_overlay, class_scores, confusion_matrix
from .dense import DensePredictor
from .display import counted
from .overlap import Overlap
from .task import Answer
from .weights import ModelCard

_SHOWN = 20


class SegmentationScores:
    """Pixels of labelled images by true class and by the one said, and what they are worth.

    Args:
        class_names: Names of the classes, in the order of the logits.
    """

    def __init__(self, class_names: tuple[str, ...]) -> None:
        self.class_names = class_names
        self._images = 0
        self._sum = torch.zeros(len(class_names), len(class_names), dtype=torch.int64)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch of counts (B, num_classes, num_classes)."""
        self._images += len(outputs)
        self._sum += outputs.sum(0)

    @cached_property
    def _counts(self) -> NDArray[np.int64]:
        """Pixels by true (rows) and predicted class; no batch is added after the first look."""
        return self._sum.numpy()

    def to_json(self) -> dict[str, Any]:
        """Overlap and accuracy in percent, per class too, and the confusion matrix (true, predicted)."""
        rows = self.per_class()
        known = [row["accuracy"] for row in rows if row["accuracy"] is not None]
        return {
            "images": self._images,
            "miou": self._overlap.value(),
            "pixel_accuracy": 100 * float(self._counts.trace() / max(self._counts.sum(), 1)),
            "mean_class_accuracy": float(np.mean(known)) if known else 0.0,
            "per_class": rows,
            "confusion": self._counts.tolist(),
        }

    @property
    def _overlap(self) -> Overlap:
        return Overlap.of(self._counts[None])

    def rows(self) -> dict[str, str]:
        """The numbers for the terminal."""
        found = self.to_json()
        known = [row for row in found["per_class"] if row["iou"] is not None]
        hardest = sorted(known, key=lambda row: row["iou"])[:3]
        return {
            "mIoU": f"{found['miou']:.2f} %",
            "pixel accuracy": f"{found['pixel_accuracy']:.2f} %",
            "mean class accuracy": f"{found['mean_class_accuracy']:.2f} %",
            "hardest classes": ", ".join(f"{row['class']} ({row['iou']:.0f} %)" for row in hardest),
        }

    def per_class(self) -> list[dict[str, Any]]:
        """Intersection over union of every class, its pixels, and the share of them that is found."""
        true, both = self._counts.sum(1).tolist(), self._counts.diagonal().tolist()
        return [
            {
                "class": name,
                "pixels": n,
                "iou": None if np.isnan(iou) else float(iou),
                "accuracy": 100 * right / n if n else None,
            }
            for name, n, right, iou in zip(self.class_names, true, both, self._overlap.per_class(), strict=True)
        ]

    def results(self, data: Any) -> None:
        """No other program reads these."""

    def figures(self) -> dict[str, Figure]:
        """Intersection over union per class, and the confusion matrix."""
        ious = [row["iou"] for row in self.per_class()]
        return {
            "iou": class_scores(self.class_names, {"IoU": ious}, "intersection over union in %"),
            "confusion": confusion_matrix(self._counts.tolist(), self.class_names),
        }


class SegmentationPredictor(DensePredictor):
    """A trained segmenter at work on image files.

    Args:
        model: The network.
        card: How its images were prepared.
        img_size: Shorter side of the images in pixels; default as stored.
        top_k: Classes per image in tables, those that cover most.
    """

    def __init__(self, model: nn.Module, card: ModelCard, *, img_size: int | None, top_k: int) -> None:
        super().__init__(model, card, top_k=top_k)
        self.img_size = img_size

    def read(self, path: Path) -> Tensor:
        """Pixels (3, H, W) in uint8, at the network's size."""
        return resized_image(super().read(path), self.img_size)

    def prepare(self, pixels: Sequence[Tensor]) -> Tensor:
        """One normalised image (1, 3, H, W)."""
        return normalize(torch.stack(list(pixels)).to(self.mean.device), self.mean, self.std)

    @torch.inference_mode()
    def predict(self, images: Tensor) -> list[Answer]:
        """``classes`` of each image, those that cover most first: a list of ``class`` and ``share``, in percent."""
        answers = []
        for image in images:
            classes = self.model.segment(image).cpu().numpy().astype(np.uint8)
            found, counts = np.unique(classes, return_counts=True)
            order = np.argsort(-counts, kind="stable")[: self.top_k]
            shares = [
                {"class": self.card.class_names[found[i]], "share": float(100 * counts[i] / classes.size)}
                for i in order
            ]
            answers.append(Answer({"classes": shares}, classes))
        return answers

    def picture(self, pixels: Tensor, answer: Answer, title: str) -> Figure:
        """The image under the colours of its classes."""
        image = pixels.permute(1, 2, 0).numpy() / 255
        return class_map_overlay(image, answer.detail, self.card.class_names, title)

    def mask(self, answer: Answer) -> Image.Image:
        """The class of every pixel, with the colours of pictures as its palette."""
        mask = Image.fromarray(answer.detail).convert("P")
        colours = class_colours(self.card.class_names).values()
        mask.putpalette([round(255 * value) for colour in colours for value in colour])
        return mask

    def title(self, row: Mapping[str, Any]) -> str:
        """The class that covers most."""
        best = row["classes"][0]
        return f"{best['class']} ({best['share']:.0f} %)"

    def csv(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Sequence[str], list[dict[str, Any]]]:
        """One row a class."""
        cells = [
            {"file": row["file"], "rank": rank, "class": found["class"], "share": f"{found['share']:.3f}"}
            | {name: row[name] for name in ("picture", "mask", "attention") if name in row}
            for row in rows
            for rank, found in enumerate(row["classes"], start=1)
        ]
        return list(cells[0]), cells

    def table(self, rows: Sequence[Mapping[str, Any]]) -> Table:
        """The first images' classes."""
        title = counted(len(rows), "image") + (f", the first {_SHOWN}" if len(rows) > _SHOWN else "")
        table = Table(title=title, title_justify="left")
        table.add_column("file", overflow="fold")
        table.add_column("covers most, % of the pixels", overflow="fold")
        for row in rows[:_SHOWN]:
            shown = ", ".join(f"{found['class']} ({found['share']:.0f} %)" for found in row["classes"])
            table.add_row(escape(row["file"]), escape(shown))
        return table
