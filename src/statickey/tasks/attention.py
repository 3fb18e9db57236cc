"""``attention``: where trained networks look, as a page to move over and as pictures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from .._checks import check_arguments, check_folder, check_positive
from .._files import check_writable, read_yaml, write_csv
from ..data import UNREADABLE
from ..errors import DataError, OutputError, StaticKeyError
from ..viz import Look, ShownModel, as_stored, attention_explorer, distances_by_layer, look, on_a_page, page, save_png
from .display import Display, counted
from .engine import new_trainer
from .evaluate import recipe_of
from .loading import load_model
from .predict import image_paths
from .published import published_model
from .recipe import Machine, Recipe
from .registry import task_named
from .run import read_result
from .start import RESULT_FILE, RUNS
from .task import Task
from .weights import ModelCard

PAGE_FILE = "attention.html"
_PAGE_ALONE = 100_000
"""Bytes of the page beside maps and photos, about."""
_FAR = (
    "A point a head, a line through the means: the distance between a place and the places it looks at, weighted by "
    "attention, over all places and images. Uniform attention comes to about 37 % of a square's diagonal."
)


@dataclass(frozen=True)
class _Source:
    """A network to look at."""

    name: str
    place: str
    """Its folder or its published name."""
    model: nn.Module
    card: ModelCard
    result: dict[str, Any] | None
    """What its run wrote, where it is one."""

    @property
    def task(self) -> Task:
        return task_named(self.card.task)


def show_attention(
    sources: Sequence[str],
    *,
    out: str,
    images: Sequence[str] | None = None,
    data: str | None = None,
    data_dir: str | None = None,
    num_images: int = 4,
    layers: str | None = None,
    img_size: int | None = None,
    ema: bool = False,
    max_mb: float = 5.0,
    accelerator: str = "auto",
    console: Console | None = None,
) -> list[Path]:
    """Show where networks look: a page to move over, which needs nothing else, and pictures.

    Args:
        sources: Folders of runs or converted networks, of comparisons (their first seed, all mixers), or names of
            pretrained models, as timm has them; they stand side by side.
        out: Folder of the results.
        images: Image files, folders of them or wildcards; default test images of the data.
        data: Whose test images, as ``train`` takes it; default the data of the first source that is a run.
        data_dir: Where torchvision keeps its downloads.
        num_images: The first so many.
        layers: Whose maps the page holds: all, or indices or names with commas between them, as -2,-1 or blocks.1*.
            Default as many as find room, evenly spread.
        img_size: Bring images and networks to this size.
        ema: The averaged weights.
        max_mb: The page's size, at most.
        accelerator: Lightning's accelerator.
        console: Where to print; default the terminal.

    Returns:
        What was written, the page first.

    Raises:
        StaticKeyError: No such network, image or layer, no map of whole images, or no room.
    """
    check_arguments(show_attention, locals())
    check_folder(out=out)
    check_positive(num_images=num_images)
    if max_mb <= 0:
        raise StaticKeyError(f"max_mb={max_mb} must be a positive number")
    folder = Path(out)
    if (folder / PAGE_FILE).exists():
        raise OutputError(f"{out} holds an {PAGE_FILE} already; choose another --out")
    check_writable(out=folder / PAGE_FILE)
    display = Display(console)
    device = new_trainer(Recipe(), Machine(accelerator=accelerator)).strategy.root_device
    with display.busy("reading networks"):
        networks = _read(sources, img_size, ema)
        for each in networks:
            each.model.to(device)
    if images is not None:
        captions, taken = _from_files(networks, images, num_images)
    else:
        captions, taken = _from_data(networks, data, data_dir, num_images)
    looks = []
    with display.busy("reading attention"):
        for each, (pixels, batches) in zip(networks, taken, strict=True):
            looks.append(look(each.name, each.model, batches, pixels))
    with display.busy("packing the maps"):
        asked = None if layers is None else [_chosen(seen, layers) for seen in looks]
        models = on_a_page(looks, int(1e6 * max_mb) - _PAGE_ALONE, asked)
    values = {seen.name: [each.tolist() for each in seen.distances().values()] for seen in looks}
    distances = distances_by_layer(values)
    with display.busy("drawing"):
        pictures = _draw(folder, looks, distances)
    sections = [
        page.section("", attention_explorer(models, captions)),
        page.section("How far heads look", page.svg(distances), page.note(_FAR)),
        page.section("What is stored", page.text(as_stored(models)), page.points(map(_stored, models, looks))),
    ]
    title = f"Where {', '.join(seen.name for seen in looks)} look{'s' * (len(looks) == 1)}"
    page.write_page(folder / PAGE_FILE, title, sections)  # last: where it is, all is
    size = (folder / PAGE_FILE).stat().st_size / 1e6
    display.say(f"page: {escape(str(folder / PAGE_FILE))} ({size:.1f} MB, {counted(len(captions), 'image')})")
    for model, seen in zip(models, looks, strict=True):
        display.say(f"{escape(model.name)}: {_stored(model, seen)[1]}")
    return [folder / PAGE_FILE, *pictures]


def _read(sources: Sequence[str], img_size: int | None, ema: bool) -> list[_Source]:
    """All networks, under names that differ."""
    found: list[tuple[str, str]] = [pair for source in sources for pair in _places(source)]
    if not found:
        raise StaticKeyError("no network is given; name folders of runs, or pretrained models")
    names = [name for name, _ in found]
    networks = []
    for number, (name, place) in enumerate(found):
        path = Path(place)
        model, card = (
            load_model(place, img_size=img_size, ema=ema) if path.exists() else published_model(place, img_size)
        )
        card = card if img_size is None else replace(card, img_size=img_size)
        if card.task == "detect":
            raise StaticKeyError(f"{place} is a detector, which brings images to sizes of its own; not shown, as yet")
        result = read_result(path) if (path / RESULT_FILE).is_file() else None
        earlier = names[:number].count(name)
        networks.append(_Source(name if not earlier else f"{name} ({earlier + 1})", place, model, card, result))
    return networks


def _places(source: str) -> list[tuple[str, str]]:
    """Name and folder of a source; of a comparison those of each mixer's first seed, in its order."""
    path = Path(source)
    runs = sorted(path.glob(f"{RUNS}/*/{RESULT_FILE}"))
    if (path / RESULT_FILE).is_file() or not runs:
        return [(path.absolute().name if path.exists() else source, source)]
    firsts: dict[str, tuple[int, str]] = {}
    for run in runs:
        result = read_result(run.parent)
        own = (result["seed"], str(run.parent))
        firsts[str(result["mixer"])] = min(own, firsts.get(str(result["mixer"]), own))
    config = path / "config.yaml"
    order = read_yaml(config, "give the runs' folders").get("mixers", []) if config.is_file() else []
    return [(mixer, firsts[mixer][1]) for mixer in sorted(firsts, key=[*order, *firsts].index)]


Taken = list[tuple[list[Tensor], list[Any]]]
"""For each network the pixels of the images, (C, H, W) in uint8, and what it takes, batch by batch."""


def _from_files(networks: Sequence[_Source], images: Sequence[str], number: int) -> tuple[list[str], Taken]:
    skipped: list[str] = []
    paths = list(dict.fromkeys(image_paths(images, skipped)))[:number]
    if skipped or not paths:
        raise StaticKeyError(f"{skipped[0] if skipped else 'no image is given'}; give files, folders or wildcards")
    taken: Taken = []
    for each in networks:
        predictor = each.task.predictor(each.model, each.card, img_size=None, top_k=1)
        pixels = []
        for path in paths:
            try:
                pixels.append(predictor.read(path))
            except UNREADABLE as error:
                raise DataError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
        alike = len({tuple(image.shape) for image in pixels}) == 1
        batches = [predictor.prepare(pixels)] if alike else [predictor.prepare([image]) for image in pixels]
        taken.append((pixels, batches))
    return [path.name for path in paths], taken


def _from_data(
    networks: Sequence[_Source], data: str | None, data_dir: str | None, number: int
) -> tuple[list[str], Taken]:
    """Test images of the data asked for, or of the first run; for each network at its size."""
    run = next((each for each in networks if each.result is not None), networks[0])
    if run.result is None and data is None:
        raise DataError(f"{run.place} does not say what it was trained on; give --images or --data")
    others = {each.result["data"] for each in networks if each.result is not None} if data is None else set()
    if len(others) > 1:
        raise DataError(f"these networks learned from {', '.join(sorted(others))}; give --images or --data")
    captions: list[str] = []
    taken: Taken = []
    for each in networks:
        if each.card.task != run.card.task:
            raise DataError(f"{each.place} and {run.place} are of different tasks; give --images")
        if each.result is not None and each.card.streamed:
            raise DataError(f"{each.place} streamed its images; give --images")
        in_memory = replace(each.card, streamed=False)
        recipe = recipe_of(run.task, run.place, in_memory, run.result, data, data_dir, "test")
        read = run.task.read_data(recipe)
        if read.in_chans != each.card.in_chans:
            raise DataError(
                f"images of {recipe.data} have {read.in_chans} channels, {each.place} takes {each.card.in_chans}; "
                "give --images or --data"
            )
        module = run.task.data_module(recipe, read, 0)
        pixels, images, captions = run.task.examples(read, module, "test", number)
        device = next(each.model.parameters()).device
        taken.append((pixels, [images.to(device)]))
    return captions, taken


def _chosen(seen: Look, layers: str) -> list[str]:
    """The layers that ``layers`` means, in their order."""
    if layers == "all":
        return seen.layers
    wanted: set[str] = set()
    for item in layers.split(","):
        if re.fullmatch(r"-?\d+", item):
            if not -len(seen.layers) <= int(item) < len(seen.layers):
                raise StaticKeyError(
                    f"layers has index {item}, but {seen.name} has {counted(len(seen.layers), 'layer')} with a map"
                )
            wanted.add(seen.layers[int(item)])
            continue
        found = [name for name in seen.layers if fnmatchcase(name, item) or fnmatchcase(name, f"{item}.*")]
        if not found:
            raise StaticKeyError(f"layers={item!r} matches none of {', '.join(seen.layers)} of {seen.name}")
        wanted.update(found)
    return [name for name in seen.layers if name in wanted]


def _draw(folder: Path, looks: Sequence[Look], distances: Figure) -> list[Path]:
    """Write the distances as numbers, and all pictures."""
    rows = [
        {"model": seen.name, "layer": layer, "head": head, "distance": f"{value:.6f}"}
        for seen in looks
        for layer, own in seen.distances().items()
        for head, value in enumerate(own.tolist(), start=1)
    ]
    written = [folder / "distances.csv", folder / "distances.png"]
    write_csv(written[0], list(rows[0]), rows)
    save_png(distances, written[1])
    for seen in looks:
        for stem, figure in seen.figures():
            written.append(folder / f"{_file_name(seen.name)}-{stem}.png")
            save_png(figure, written[-1])
    return written


def _stored(model: ShownModel, seen: Look) -> tuple[str, str]:
    """A model's name, and what of it is on the page."""
    names = [view.layer for view in model.views["attention"]]
    heads = sorted({view.maps[0].heads for view in model.views["attention"]})
    words = f"{len(names)} of {counted(len(seen.layers), 'layer')} with {', '.join(map(str, heads))} heads each"
    listed = f": {', '.join(names)}" if len(names) < len(seen.layers) else ""
    return model.name, f"{words}{listed}{f'; {seen.left_out}' if seen.left_out else ''}"


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.@,=+-]+", "_", name)
