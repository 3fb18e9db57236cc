"""``predict``: what a trained network says of image files, and where it looked."""

import glob
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from .._checks import check_arguments, check_folder
from .._files import check_writable, write_atomic, write_csv, write_text
from ..data import UNREADABLE, image_files
from ..errors import OutputError, StaticKeyError
from ..layers import TokenMixer
from ..viz import attention_overlay, capture_attention, save_png
from .display import Display
from .engine import new_trainer
from .loading import load_model
from .recipe import Machine, Recipe
from .registry import task_named
from .task import Predictor


@dataclass(frozen=True)
class Predictions:
    """What a network says of images, and the files that could not be read."""

    rows: list[dict[str, Any]]
    """One a file: ``file``, what the task says of it (for a classifier ``classes``, a list of ``class`` and
    ``probability``, the likeliest first; for a segmenter of ``class`` and ``share`` of the pixels), and the paths of
    its ``picture``, ``mask`` and ``attention``, where they were asked for."""
    skipped: list[str]
    """Why files were left out."""


def predict(
    source: str,
    files: str | Sequence[str],
    *,
    top_k: int = 5,
    img_size: int | None = None,
    ema: bool = False,
    out: str | None = None,
    pictures: str | None = None,
    masks: str | None = None,
    attention: str | None = None,
    layer: str = "last",
    accelerator: str = "auto",
    console: Console | None = None,
) -> Predictions:
    """Ask a trained network about images.

    Args:
        source: Folder of a run (of ``train``, or one of a comparison's ``runs``), or one of its weights files.
        files: An image file or several, folders of them, wildcards, or ``-`` for names on standard input, one a line.
        top_k: Answers per image, such as classes.
        img_size: Bring images to this many pixels, their shorter side where the network takes any size.
        ema: Use the averaged weights.
        out: A ``.csv`` or ``.json`` file for the results.
        pictures: Folder for pictures of what was found, one PNG an image; the results name them.
        masks: Folder for the class of every pixel, one PNG with a palette an image, from a network that segments.
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
    check_arguments(predict, locals())
    files = [str(files)] if isinstance(files, str | Path) else list(map(str, files))
    if out is not None and Path(out).suffix not in (".csv", ".json"):
        raise OutputError(f"out={out!r} must end in .csv or .json")
    options = {"pictures": pictures, "masks": masks, "attention": attention}
    check_folder(**{option: folder for option, folder in options.items() if folder is not None})
    kinds = zip(("picture", "mask", "attention"), options.values(), strict=True)
    asked = {kind: Path(folder) for kind, folder in kinds if folder is not None}
    check_writable(out=out, **{kind: folder / "picture.png" for kind, folder in asked.items()})
    display = Display(console)
    model, card = load_model(source, img_size=img_size, ema=ema)
    model.to(new_trainer(Recipe(), Machine(accelerator=accelerator)).strategy.root_device)
    predictor = task_named(card.task).predictor(model, card, img_size=img_size, top_k=top_k)
    layer = "" if attention is None else _layer(model, layer)
    skipped: list[str] = []
    paths = list(dict.fromkeys(image_paths(files, skipped)))
    if not paths:
        raise StaticKeyError(f"no image in {', '.join(files) or 'nothing'}; give files, folders or wildcards")
    names = _picture_names(paths)
    rows: list[dict[str, Any]] = []
    batches = _batches(predictor, paths, skipped)
    for kept, pixels in display.track(batches, -(-len(paths) // predictor.batch_size), "predicting"):
        images = predictor.prepare(pixels)
        answers = predictor.predict(images)
        found = [
            {"file": str(path)} | answer.row | {kind: str(folder / names[path]) for kind, folder in asked.items()}
            for path, answer in zip(kept, answers, strict=True)
        ]
        for row, image, answer in zip(found, pixels, answers, strict=True):
            if "picture" in asked:
                save_png(predictor.picture(image, answer, Path(row["file"]).name), Path(row["picture"]))
            if "mask" in asked:
                write_atomic(Path(row["mask"]), partial(predictor.mask(answer).save, format="PNG"))
        if "attention" in asked:
            _draw(model, layer, images, pixels, found, predictor)
        rows += found
    if not rows and len(skipped) == 1:
        raise StaticKeyError(f"cannot read {skipped[0]}")
    for line in skipped:
        display.say(f"[yellow]skipped[/yellow] {escape(line)}")
    if not rows:
        raise StaticKeyError(f"none of {len(paths)} files could be read")
    if out is not None:
        if out.endswith(".json"):
            write_text(Path(out), json.dumps(rows, indent=2) + "\n")
        else:
            write_csv(Path(out), *predictor.csv(rows))
        display.say(f"results: {escape(out)}")
    for kind, folder in asked.items():
        display.say(f"{kind if kind == 'attention' else kind + 's'}: {escape(str(folder))}")
    display.console.print(predictor.table(rows))
    return Predictions(rows, skipped)


def image_paths(files: Iterable[str], skipped: list[str]) -> Iterator[Path]:
    """The files that words mean: files, folders of them, wildcards, or ``-`` for names on standard input.

    Args:
        files: The words.
        skipped: Takes a line for each word that means none.
    """
    for word in files:
        found = list(_found(word))
        if not found:
            skipped.append(f"{word!r}: no image there")
        yield from found


def _found(word: str) -> Iterable[Path]:
    path = Path(word)
    if word == "-":
        return (Path(line.rstrip("\n")) for line in sys.stdin if line.strip())
    if path.is_dir():
        return image_files(path)
    if glob.has_magic(word) and not path.exists():
        return (Path(name) for name in sorted(glob.glob(word, recursive=True)) if Path(name).is_file())  # noqa: PTH207 (of any root)
    return [path]


def _batches(
    predictor: Predictor, paths: Sequence[Path], skipped: list[str]
) -> Iterator[tuple[list[Path], list[Tensor]]]:
    size = predictor.batch_size
    for start in range(0, len(paths), size):
        kept, pixels = [], []
        for path in paths[start : start + size]:
            try:
                pixels.append(predictor.read(path))
            except UNREADABLE as error:
                skipped.append(f"{str(path)!r}: {getattr(error, 'strerror', None) or error}")
            else:
                kept.append(path)
        if kept:
            yield kept, pixels


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
    model: nn.Module,
    layer: str,
    images: Tensor,
    pixels: Sequence[Tensor],
    rows: Sequence[dict[str, Any]],
    predictor: Predictor,
) -> None:
    mixer: Any = model.get_submodule(layer)
    weights = capture_attention(model, images, layers=[layer])[layer]
    if len(weights) != len(images):
        raise StaticKeyError(f"layer {layer} attends within windows of an image; choose another --layer")
    for image, maps, row in zip(pixels, weights, rows, strict=True):
        picture = image.permute(1, 2, 0).numpy() / 255
        title = f"{Path(row['file']).name}: {predictor.title(row)}\n{layer}"
        save_png(attention_overlay(picture, maps, mixer.feat_size, title), Path(row["attention"]))
