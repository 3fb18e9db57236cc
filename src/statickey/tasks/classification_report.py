"""What a classifier got right, and what it says of images: numbers, tables and pictures."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)
from torchvision.transforms.v2.functional import pil_to_tensor

from .._checks import check_positive
from ..data import normalize, open_image, square, stream_transforms, to_mode
from ..errors import StaticKeyError
from ..viz import confusion_matrix, labelled_image
from .display import counted
from .task import Answer
from .weights import ModelCard

CALIBRATION_BINS = 15
_SHOWN = 20


class ClassificationScores:
    """Logits of a network for labelled images, and what they are worth.

    Args:
        class_names: Names of the classes, in the order of the logits.
    """

    def __init__(self, class_names: tuple[str, ...]) -> None:
        self.class_names = class_names
        self._logits: list[Tensor] = []
        self._labels: list[Tensor] = []

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch of logits (B, num_classes) and labels (B,)."""
        self._logits.append(outputs)
        self._labels.append(targets)

    @cached_property
    def logits(self) -> Tensor:
        """Of all images, (N, num_classes); no batch is added after the first look."""
        return torch.cat(self._logits)

    @cached_property
    def labels(self) -> Tensor:
        """Of all images, (N,)."""
        return torch.cat(self._labels)

    @cached_property
    def counts(self) -> Tensor:
        """Images by true (rows) and predicted class."""
        return multiclass_confusion_matrix(self.logits, self.labels, len(self.class_names))

    def to_json(self) -> dict[str, Any]:
        """Accuracies and calibration error in percent, per class too, and the confusion matrix (true, predicted)."""
        classes = len(self.class_names)
        right, total = self.counts.diag(), self.counts.sum(dim=1)
        top5 = multiclass_accuracy(self.logits, self.labels, classes, top_k=min(5, classes), average="micro")
        calibration = multiclass_calibration_error(
            self.logits.softmax(1), self.labels, classes, n_bins=CALIBRATION_BINS
        )
        return {
            "images": len(self.labels),
            "top1": 100 * right.sum().item() / len(self.labels),
            "top5": 100 * top5.item(),
            "mean_per_class": (100 * right[total > 0] / total[total > 0]).mean().item(),
            "calibration_error": 100 * calibration.item(),
            "cross_entropy": F.cross_entropy(self.logits, self.labels).item(),
            "per_class": self.per_class(),
            "confusion": self.counts.tolist(),
        }

    def rows(self) -> dict[str, str]:
        """The numbers for the terminal."""
        found = self.to_json()
        known = [row for row in found["per_class"] if row["accuracy"] is not None]
        hardest = sorted(known, key=lambda row: row["accuracy"])[:3]
        return {
            "top-1": f"{found['top1']:.2f} %",
            "top-5": f"{found['top5']:.2f} %",
            "mean per class": f"{found['mean_per_class']:.2f} %",
            "calibration error": f"{found['calibration_error']:.2f} %",
            "cross-entropy": f"{found['cross_entropy']:.3f}",
            "hardest classes": ", ".join(f"{row['class']} ({row['accuracy']:.0f} %)" for row in hardest),
        }

    def per_class(self) -> list[dict[str, Any]]:
        """Images and those right of every class."""
        right, total = self.counts.diag().tolist(), self.counts.sum(dim=1).tolist()
        return [
            {"class": name, "images": n, "right": r, "accuracy": 100 * r / n if n else None}
            for name, r, n in zip(self.class_names, right, total, strict=True)
        ]

    def results(self, data: Any) -> None:
        """No other program reads these."""

    def figures(self) -> dict[str, Figure]:
        """The confusion matrix."""
        return {"confusion": confusion_matrix(self.counts.tolist(), self.class_names)}


class Classifier:
    """A trained classifier at work on image files.

    Args:
        model: The network.
        card: How its images were prepared.
        img_size: Side of the images in pixels; default that of the card.
        top_k: Classes per image.
    """

    batch_size: ClassVar[int] = 64

    def __init__(self, model: nn.Module, card: ModelCard, *, img_size: int | None, top_k: int) -> None:
        check_positive(top_k=top_k)
        self.model, self.card = model, card
        self.top_k = min(top_k, len(card.class_names))
        self.img_size = card.img_size if img_size is None else img_size
        self.transform = stream_transforms(self.img_size, train=False) if card.streamed else None
        device = next(model.parameters()).device
        self.mean, self.std = (torch.tensor(x, device=device).view(-1, 1, 1) for x in (card.mean, card.std))

    def read(self, path: Path) -> Tensor:
        """Pixels (C, H, W) in uint8, prepared as the training images were."""
        with open_image(path) as file:
            image = to_mode(file, "L" if self.card.in_chans == 1 else "RGB")
        if self.transform is not None:
            return torch.as_tensor(self.transform(image))
        pixels: Tensor = pil_to_tensor(square(image, self.img_size))
        return pixels

    def prepare(self, pixels: Sequence[Tensor]) -> Tensor:
        """Normalised images (B, C, H, W)."""
        return normalize(torch.stack(list(pixels)).to(self.mean.device), self.mean, self.std)

    @torch.inference_mode()
    def predict(self, images: Tensor) -> list[Answer]:
        """``classes`` of each image: a list of ``class`` and ``probability``, the likeliest first."""
        probabilities, indices = self.model(images).float().softmax(1).cpu().topk(self.top_k)
        names = self.card.class_names
        return [
            Answer({"classes": [{"class": names[i], "probability": p} for i, p in zip(own, ps, strict=True)]})
            for own, ps in zip(indices.tolist(), probabilities.tolist(), strict=True)
        ]

    def picture(self, pixels: Tensor, answer: Answer, title: str) -> Figure:
        """The image under its likeliest class."""
        return labelled_image(pixels.permute(1, 2, 0).numpy() / 255, f"{title}: {self.title(answer.row)}")

    def mask(self, answer: Answer) -> Image.Image:
        """A classifier has none; raises StaticKeyError."""
        raise StaticKeyError("a classifier has no class for every pixel; leave out --masks")

    def title(self, row: Mapping[str, Any]) -> str:
        """The likeliest class."""
        best = row["classes"][0]
        return f"{best['class']} ({100 * best['probability']:.0f} %)"

    def csv(self, rows: Sequence[Mapping[str, Any]]) -> tuple[Sequence[str], list[dict[str, Any]]]:
        """One row a class."""
        cells = [
            {"file": row["file"], "rank": rank, "class": guess["class"], "probability": f"{guess['probability']:.6f}"}
            | {name: row[name] for name in ("picture", "attention") if name in row}
            for row in rows
            for rank, guess in enumerate(row["classes"], start=1)
        ]
        return list(cells[0]), cells

    def table(self, rows: Sequence[Mapping[str, Any]]) -> Table:
        """The first images' classes."""
        title = counted(len(rows), "image") + (f", the first {_SHOWN}" if len(rows) > _SHOWN else "")
        table = Table(title=title, title_justify="left")
        table.add_column("file", overflow="fold")
        table.add_column("class", style="bold")
        table.add_column("%", justify="right")
        table.add_column("then", style="dim", overflow="fold")
        for row in rows[:_SHOWN]:
            best, *rest = row["classes"]
            then = ", ".join(f"{guess['class']} ({100 * guess['probability']:.0f} %)" for guess in rest)
            table.add_row(
                escape(row["file"]), escape(best["class"]), f"{100 * best['probability']:.1f}", escape(then)
            )
        return table
