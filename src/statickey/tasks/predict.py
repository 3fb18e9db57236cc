"""``predict``: classes of image files, and where the network looked."""

import csv
import glob
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from .._checks import check_folder, check_positive
from .._files import write_atomic, write_text
from ..data import IMAGE_SUFFIXES, UNREADABLE, normalize, square, stream_transforms
from ..errors import OutputError, StaticKeyError
from ..layers import TokenMixer
from ..viz import attention_overlay, capture_attention
from .display import Display, counted
from .engine import new_trainer
from .recipe import Machine, Recipe
from .weights import ModelCard, load_model

_SHOWN = 20
_BATCH = 64


@dataclass(frozen=True)
class Predictions:
    """Classes of images, and the files that could not be read."""

    rows: list[dict[str, Any]]
    """One a file: ``file`` and ``classes``, a list of ``class`` and ``probability``, the likeliest first; and
    ``attention``, the path of its picture, where pictures were asked for."""
    skipped: list[str]
    """Why files were left out."""


def predict(
    source: str,
    files: Sequence[str],
    *,
    top_k: int = 5,
    img_size: int | None = None,
    ema: bool = False,
    out: str | None = None,
    attention: str | None = None,
    layer: str = "last",
    accelerator: str = "auto",
    console: Console | None = None,
) -> Predictions:
    """Classify images with a trained network.

    Args:
        source: Folder of a run (of ``train``, or one of a comparison's ``runs``), or one of its weights files.
        files: Image files, folders of them, wildcards, or ``-`` for names on standard input, one a line.
        top_k: Classes per image.
        img_size: Bring images and network to this size.
        ema: Use the averaged weights.
        out: A ``.csv`` or ``.json`` file for the results.
        attention: Folder for pictures of the attention, one PNG an image; the results name them.
        layer: Whose attention: the name of a mixer, such as ``blocks.3.attn``, or ``last``, the last one with more
            than one token.
        accelerator: Lightning's accelerator.
        console: Where to print; default the terminal.

    Returns:
        The predictions, and what was skipped.

    Raises:
        StaticKeyError: No such network or layer, or no readable image; the message says what to do.
    """
    check_positive(top_k=top_k)
    if out is not None and Path(out).suffix not in (".csv", ".json"):
        raise OutputError(f"out={out!r} must end in .csv or .json")
    if attention is not None:
        check_folder(attention=attention)
    display = Display(console)
    model, card = load_model(source, img_size=img_size, ema=ema)
    device = new_trainer(Recipe(), Machine(accelerator=accelerator)).strategy.root_device
    model.to(device)
    name = None if attention is None else _layer(model, layer)
    reader = _Reader(card, card.img_size if img_size is None else img_size)
    rows: list[dict[str, Any]] = []
    skipped: list[str] = []
    paths = list(dict.fromkeys(_paths(files, skipped)))
    if not paths:
        raise StaticKeyError(
            f"no image in {', '.join(map(str, files)) or 'nothing'}; give files, folders or wildcards"
        )
    names = _picture_names(paths)
    for batch in display.track(_batches(reader, paths, skipped), -(-len(paths) // _BATCH), "classifying"):
        kept, pixels = batch
        images = normalize(torch.stack(pixels).to(device), reader.mean.to(device), reader.std.to(device))
        batch_rows: list[dict[str, Any]] = [
            {"file": str(path), "classes": classes}
            for path, classes in zip(kept, _classes(model, images, card, top_k), strict=True)
        ]
        if attention is not None:
            for row, path in zip(batch_rows, kept, strict=True):
                row["attention"] = str(Path(attention) / names[path])
            _draw(model, str(name), images, pixels, batch_rows)
        rows += batch_rows
    if not rows and len(skipped) == 1:
        raise StaticKeyError(f"cannot read {skipped[0]}")
    for line in skipped:
        display.say(f"[yellow]skipped[/yellow] {escape(line)}")
    if not rows:
        raise StaticKeyError(f"none of {len(paths)} files could be read")
    if out is not None:
        write_text(Path(out), json.dumps(rows, indent=2) + "\n" if out.endswith(".json") else _csv(rows))
        display.say(f"results: {escape(out)}")
    if attention is not None:
        display.say(f"attention: {escape(attention)}")
    display.console.print(_table(rows))
    return Predictions(rows, skipped)


def _paths(files: Iterable[str], skipped: list[str]) -> Iterator[Path]:
    for word in files:
        found = list(_found(word))
        if not found:
            skipped.append(f"{word}: no image there")
        yield from found


def _found(word: str) -> Iterable[Path]:
    path = Path(word)
    if word == "-":
        return (Path(line.rstrip("\n")) for line in sys.stdin if line.strip())
    if path.is_dir():
        return sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if glob.has_magic(word) and not path.exists():
        return (Path(name) for name in sorted(glob.glob(word, recursive=True)) if Path(name).is_file())  # noqa: PTH207 (of any root)
    return [path]


class _Reader:
    """Files to pixels, as the network saw its training images."""

    def __init__(self, card: ModelCard, img_size: int) -> None:
        self.img_size, self.in_chans = img_size, card.in_chans
        self.transform = stream_transforms(img_size, train=False) if card.streamed else None
        self.mean, self.std = (torch.tensor(x).view(-1, 1, 1) for x in (card.mean, card.std))

    def __call__(self, path: Path) -> Tensor:
        """Pixels (C, H, W) in uint8; raises one of ``UNREADABLE``."""
        with Image.open(path) as file:
            image = file.convert("L" if self.in_chans == 1 else "RGB")
            if self.transform is not None:
                return torch.as_tensor(self.transform(image))
            pixels = torch.from_numpy(np.array(square(image, self.img_size)))
            return pixels.unsqueeze(0) if self.in_chans == 1 else pixels.permute(2, 0, 1)


def _batches(reader: _Reader, paths: Sequence[Path], skipped: list[str]) -> Iterator[tuple[list[Path], list[Tensor]]]:
    for start in range(0, len(paths), _BATCH):
        kept, pixels = [], []
        for path in paths[start : start + _BATCH]:
            try:
                pixels.append(reader(path))
            except UNREADABLE as error:
                skipped.append(f"{path}: {getattr(error, 'strerror', None) or error}")
            else:
                kept.append(path)
        if kept:
            yield kept, pixels


@torch.inference_mode()
def _classes(model: nn.Module, images: Tensor, card: ModelCard, top_k: int) -> list[list[dict[str, Any]]]:
    probabilities, indices = model(images).float().softmax(1).cpu().topk(min(top_k, len(card.class_names)))
    return [
        [{"class": card.class_names[i], "probability": p} for i, p in zip(own.tolist(), ps.tolist(), strict=True)]
        for own, ps in zip(indices, probabilities, strict=True)
    ]


def _layer(model: nn.Module, layer: str) -> str:
    """The name of a mixer that has an attention map of several tokens."""
    sizes: dict[str, tuple[int, int]] = {
        name: module.feat_size
        for name, module in model.named_modules()
        if isinstance(module, TokenMixer) and hasattr(module, "attention_weights")
    }
    if not sizes:
        raise StaticKeyError("this network has no mixer with an attention map; leave out --attention")
    names = [name for name, feat_size in sizes.items() if feat_size != (1, 1)]
    if not names:
        raise StaticKeyError(
            "all attention of this network is on a grid of one token, which is always 1; give a larger --img-size, "
            "or leave out --attention"
        )
    if layer == "last":
        return names[-1]
    if layer in sizes and layer not in names:
        raise StaticKeyError(
            f"layer={layer!r} attends on a grid of one token, which is always 1; choose 'last' or one of "
            f"{', '.join(names)}"
        )
    if layer not in names:
        raise StaticKeyError(f"layer={layer!r} has no attention map; choose 'last' or one of {', '.join(names)}")
    return layer


def _picture_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A file name for every picture, numbered where two images have one name."""
    taken: dict[str, int] = {}
    names = {}
    for path in paths:
        number = taken[path.stem] = taken.get(path.stem, 0) + 1
        names[path] = f"{path.stem}.png" if number == 1 else f"{path.stem}-{number}.png"
    return names


def _draw(
    model: nn.Module, layer: str, images: Tensor, pixels: Sequence[Tensor], rows: Sequence[dict[str, Any]]
) -> None:
    mixer: Any = model.get_submodule(layer)
    weights = capture_attention(model, images)[layer]
    if len(weights) != len(images):
        raise StaticKeyError(f"layer {layer} attends within windows of an image; choose another --layer")
    for image, maps, row in zip(pixels, weights, rows, strict=True):
        picture = image.permute(1, 2, 0).numpy() / 255
        best = row["classes"][0]
        title = f"{Path(row['file']).name}: {best['class']} ({100 * best['probability']:.0f} %)\n{layer}"
        figure = attention_overlay(picture, maps, mixer.feat_size, title)
        write_atomic(Path(row["attention"]), partial(figure.savefig, format="png", dpi=150))


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    pictures = ["attention"] if "attention" in rows[0] else []
    writer.writerow(["file", "rank", "class", "probability", *pictures])
    for row in rows:
        for rank, guess in enumerate(row["classes"], start=1):
            cells = [row["file"], rank, guess["class"], f"{guess['probability']:.6f}"]
            writer.writerow([*cells, *(row[name] for name in pictures)])
    return text.getvalue()


def _table(rows: list[dict[str, Any]]) -> Table:
    """The first images' classes, for the terminal."""
    title = counted(len(rows), "image") + (f", the first {_SHOWN}" if len(rows) > _SHOWN else "")
    table = Table(title=title, title_justify="left")
    table.add_column("file", overflow="fold")
    table.add_column("class", style="bold")
    table.add_column("%", justify="right")
    table.add_column("then", style="dim", overflow="fold")
    for row in rows[:_SHOWN]:
        best, *rest = row["classes"]
        then = ", ".join(f"{guess['class']} ({100 * guess['probability']:.0f} %)" for guess in rest)
        table.add_row(escape(row["file"]), escape(best["class"]), f"{100 * best['probability']:.1f}", escape(then))
    return table
