"""``evaluate``: what a trained network gets right, how sure it is, and what it mixes up."""

import csv
import io
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_calibration_error,
    multiclass_confusion_matrix,
)

from .._checks import check_folder
from .._environment import environment
from .._files import write_atomic, write_json, write_text
from ..errors import DataError, OutputError, StaticKeyError
from ..viz import confusion_matrix
from .display import Display, counted
from .engine import RESULT_FILE, data_module, explained_workers, new_trainer, read_data, score
from .recipe import Machine, Recipe
from .weights import WEIGHTS_FILES, ModelCard, load_model

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Scores:
    """Logits of a network for labelled images."""

    logits: Tensor
    """(N, num_classes)."""
    labels: Tensor
    """(N,)."""

    def metrics(self) -> dict[str, Any]:
        """Accuracies and calibration error in percent, per class too, and the confusion matrix (true, predicted)."""
        classes = self.logits.shape[1]
        counts = multiclass_confusion_matrix(self.logits, self.labels, classes)
        right, total = counts.diag(), counts.sum(dim=1)
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
            "cross_entropy": torch.nn.functional.cross_entropy(self.logits, self.labels).item(),
            "per_class": [
                {"right": int(r), "images": int(n), "accuracy": 100 * int(r) / int(n) if n else None}
                for r, n in zip(right, total, strict=True)
            ],
            "confusion": counts.tolist(),
        }


def evaluate(
    source: str,
    *,
    data: str | None = None,
    data_dir: str | None = None,
    split: Literal["test", "holdout"] = "test",
    img_size: int | None = None,
    ema: bool = False,
    out: str | None = None,
    accelerator: str = "auto",
    precision: str = "auto",
    num_workers: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """Score a trained network.

    Args:
        source: Folder of a run (of ``train``, or one of a comparison's ``runs``), or one of its weights files.
        data: Images to score, as ``train`` takes them; default those of the run.
        data_dir: Where torchvision keeps its downloads.
        split: The test images, or the training images held out by the run.
        img_size: Bring images and network to this size; keys and position embeddings are resampled.
        ema: Score the averaged weights.
        out: Folder of the results; default ``evaluation`` in the run's folder, with what differs from the run.
        accelerator: Lightning's accelerator.
        precision: Lightning's precision; auto is bf16-mixed on GPUs that have it, else 32-true.
        num_workers: Loader processes, for streamed images.
        console: Where to print; default the terminal.

    Returns:
        What is in ``evaluation.json``: accuracies and calibration error in percent, per class too.

    Raises:
        StaticKeyError: There is no such network, or the data do not fit it; the message says what to do.
    """
    if split not in ("test", "holdout"):
        raise StaticKeyError(f"split={split!r} must be 'test' or 'holdout'")
    if out is not None:
        check_folder(out=out)
    display = Display(console)
    ema = ema or Path(source).name == WEIGHTS_FILES["ema"]
    model, card = load_model(source, img_size=img_size, ema=ema)
    recipe = _recipe(Path(source), card, data, data_dir, img_size, precision)
    trainer = new_trainer(recipe, Machine(accelerator=accelerator))
    with display.busy("reading images"):
        images = read_data(recipe)
    display.skipped(images.skipped)
    _check_classes(card, images.class_names, recipe.data)
    module = data_module(recipe, images, 0, num_workers)
    loader = module.test_dataloader() if split == "test" else module.holdout_dataloader()
    start = time.perf_counter()
    with display.busy("scoring"), explained_workers():
        logits, labels = score(model.to(trainer.strategy.root_device), module, loader, str(trainer.precision))
    seconds = time.perf_counter() - start
    found = Scores(logits, labels).metrics()
    for row, name in zip(found["per_class"], card.class_names, strict=True):
        row["class"] = name
    result = {
        "source": source,
        "data": recipe.data,
        "split": split,
        "img_size": images.img_size,
        "ema": ema,
        **found,
        "images_per_second": len(labels) / seconds,
        "environment": environment(trainer.strategy.root_device.type) | {"precision": str(trainer.precision)},
    }
    marks = ["holdout"] * (split == "holdout") + ["ema"] * ema + [f"{img_size}px"] * (img_size is not None)
    marks += [Path(data).name] if data is not None else []
    folder = _folder(source) / "-".join(["evaluation", *marks]) if out is None else Path(out)
    write_json(folder / "evaluation.json", result)
    write_text(folder / "per_class.csv", _per_class(found["per_class"]))
    figure = confusion_matrix(found["confusion"], card.class_names)
    write_atomic(folder / "confusion.png", partial(figure.savefig, format="png", dpi=150))
    display.console.print(_table(result))
    display.say(f"results: {escape(str(folder))}")
    return result


def _folder(source: str) -> Path:
    path = Path(source)
    return path if path.is_dir() else path.parent


def _recipe(
    source: Path, card: ModelCard, data: str | None, data_dir: str | None, img_size: int | None, precision: str
) -> Recipe:
    """The recipe of the run, with what is asked for here."""
    path = _folder(str(source)) / RESULT_FILE
    known: dict[str, Any] = {}
    if path.is_file():
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            known = {"data": result["data"], "data_dir": result["data_dir"]} | result["config"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path} is broken ({error!r}); give --data and a copy of the weights") from error
    if data is None and not known:
        raise DataError(f"{source} does not say what it was trained on; give --data")
    asked = {"data": data, "data_dir": data_dir}
    fixed = {
        "img_size": card.img_size if img_size is None else img_size,
        "precision": precision,
        "stream": card.streamed,
    }
    known = {"img_size": card.img_size} | known | {k: v for k, v in asked.items() if v is not None} | fixed
    if data is not None:
        known["limit"] = None
    return Recipe(**known | {"mean": card.mean, "std": card.std})


def _check_classes(card: ModelCard, names: tuple[str, ...], data: str) -> None:
    if len(names) != len(card.class_names):
        raise DataError(
            f"{data} has {len(names)} classes, the network knows {len(card.class_names)}; give the data it is for"
        )
    pairs = zip(card.class_names, names, strict=True)
    differing = next(((known, name) for known, name in pairs if known != name), None)
    if differing is not None:
        raise DataError(
            f"class {differing[0]!r} of the network is {differing[1]!r} in {data}; name the classes alike, "
            "in the same order"
        )


def _per_class(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, ("class", "images", "right", "accuracy"), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _table(result: dict[str, Any]) -> Table:
    """The scores, for the terminal."""
    name = Path(result["data"]).name
    title = f"{counted(result['images'], result['split'] + ' image')} of {name}, {result['img_size']} px"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    known = [row for row in result["per_class"] if row["accuracy"] is not None]
    worst = sorted(known, key=lambda row: row["accuracy"])[:3]
    rows = {
        "top-1": f"{result['top1']:.2f} %",
        "top-5": f"{result['top5']:.2f} %",
        "mean per class": f"{result['mean_per_class']:.2f} %",
        "calibration error": f"{result['calibration_error']:.2f} %",
        "cross-entropy": f"{result['cross_entropy']:.3f}",
        "hardest classes": ", ".join(f"{escape(row['class'])} ({row['accuracy']:.0f} %)" for row in worst),
        "throughput": f"{result['images_per_second']:,.0f} img/s",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
