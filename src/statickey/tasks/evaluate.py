"""``evaluate``: how well a trained network does, and where it errs."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from .._checks import check_arguments, check_choice, check_folder
from .._environment import environment
from .._files import check_writable, write_csv, write_json
from ..errors import DataError, OutputError, StaticKeyError
from ..viz import save_png
from .display import Display, counted, facts_table
from .engine import new_trainer
from .loading import load_model
from .recipe import Machine
from .registry import task_named
from .run import read_result
from .scoring import explained_workers, outputs_on
from .start import RESULT_FILE
from .task import Task
from .weights import WEIGHTS_FILES, ModelCard


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
        split: The test images, or the training images held out by the run, from the data it saw alone.
        img_size: Bring images and network to this size; keys and position embeddings are resampled.
        ema: Score the averaged weights.
        out: Folder of the results; default ``evaluation`` in the run's folder, with what differs from the run.
        accelerator: Lightning's accelerator.
        precision: Lightning's precision; auto is bf16-mixed on GPUs that have it, else 32-true.
        num_workers: Loader processes, for streamed images.
        console: Where to print; default the terminal.

    Returns:
        What is in ``evaluation.json``: the scores, per class too.

    Raises:
        StaticKeyError: There is no such network, or the data do not fit it; the message says what to do.
    """
    check_arguments(evaluate, locals())
    check_choice(split=(split, ("test", "holdout")))
    if out is not None:
        check_folder(out=out)
        check_writable(out=Path(out) / "evaluation.json")
    machine = Machine(accelerator=accelerator, num_workers=num_workers)
    display = Display(console)
    ema = ema or Path(source).name == WEIGHTS_FILES["ema"]
    model, card = load_model(source, img_size=img_size, ema=ema)
    task = task_named(card.task)
    place = Path(source) if Path(source).is_dir() else Path(source).parent
    result = read_result(place) if (place / RESULT_FILE).is_file() else None
    recipe = recipe_of(task, source, card, result, data, data_dir, split)
    size = card.img_size if img_size is None and task.fixed_size else img_size
    sized = size is not None and "img_size" in task.recipe_class.defaults()
    recipe_here = replace(recipe, precision=precision, **({"img_size": size} if sized else {}))
    trainer = new_trainer(recipe_here, machine)
    with display.busy("reading images"):
        images = None if split == "test" else _with_holdout(task, recipe, source, result, data or data_dir)
        if images is None or size not in (None, card.img_size):
            images = task.read_data(recipe_here)
    display.skipped(images.skipped)
    check_classes(card, images.class_names, recipe.data)
    module = task.data_module(recipe_here, images, 0, num_workers)
    loader = module.scoring_dataloader(split)
    found = task.evaluation(card.class_names)
    start = time.perf_counter()
    with display.busy("scoring"), explained_workers():
        model.to(trainer.strategy.root_device)
        for outputs, targets in outputs_on(task, model, module, loader, str(trainer.precision)):
            found.update(outputs, targets)
    seconds = time.perf_counter() - start
    numbers = found.to_json()
    report = {
        "source": source,
        "task": task.name,
        "data": recipe.data,
        "split": split,
        "img_size": size,
        "ema": ema,
        **numbers,
        "images_per_second": numbers["images"] / seconds,
        "environment": environment(trainer.strategy.root_device.type) | {"precision": str(trainer.precision)},
    }
    marks = ["holdout"] * (split == "holdout") + ["ema"] * ema + [f"{img_size}px"] * (img_size is not None)
    marks += [Path(data).name] if data is not None else []
    folder = place / "-".join(["evaluation", *marks]) if out is None else Path(out)
    write_json(folder / "evaluation.json", report)
    rows = found.per_class()
    write_csv(folder / "per_class.csv", list(rows[0]), rows)
    results = found.results(images)
    if results is not None:
        write_json(folder / "results.json", results)
    for stem, figure in found.figures().items():
        save_png(figure, folder / f"{stem}.png")
    shown = [counted(numbers["images"], split + " image") + f" of {Path(recipe.data).name}"]
    title = ", ".join(shown if size is None else [*shown, f"{size} px"])
    throughput = {"throughput": f"{report['images_per_second']:,.0f} img/s"}
    display.console.print(facts_table(title, found.rows() | throughput))
    display.say(f"results: {escape(str(folder))}")
    return report


def recipe_of(
    task: Task,
    source: str,
    card: ModelCard,
    result: dict[str, Any] | None,
    data: str | None,
    data_dir: str | None,
    split: str,
) -> Any:
    """The recipe of the run, for its data or those asked for, with the card's normalisation."""
    options = task.recipe_class.defaults()
    known: dict[str, Any] = {"img_size": card.img_size} if task.fixed_size and "img_size" in options else {}
    if result is not None:
        known |= {"data": result["data"], "data_dir": result["data_dir"]} | result["config"]
    elif data is None:
        raise DataError(f"{source} does not say what it was trained on; give --data")
    unknown = sorted(known.keys() - options.keys())
    if unknown:
        raise OutputError(
            f"{source} was made with {', '.join(unknown)}, which this version does not know; use the version that "
            "made it"
        )
    if data is not None:
        known |= {"data": data} | ({"limit": None} if split == "test" else {})
    if data_dir is not None:
        known["data_dir"] = data_dir
    prepared = {"stream": card.streamed, "mean": card.mean, "std": card.std}
    try:
        return task.recipe_class(**known | {k: v for k, v in prepared.items() if k in options} | {"weights": None})
    except StaticKeyError as error:
        raise OutputError(f"{source} and the options make no recipe: {error}") from error


def _with_holdout(task: Task, recipe: Any, source: str, result: dict[str, Any] | None, elsewhere: str | None) -> Any:
    """The data of the run; of others another part would be held out, training images among them.

    Raises:
        DataError: The data asked for are not the run's, or nothing tells.
    """
    if result is None:
        raise DataError(f"{source} does not say which images its run held out; give the folder of a run")
    images = task.read_data(recipe)
    if "data_fingerprint" not in result:  # version 0.1 did not note it
        if elsewhere is not None:
            raise DataError(f"{source} does not say which data it saw; leave {elsewhere!r} out, or use --split test")
    elif images.fingerprint() != result["data_fingerprint"]:
        raise DataError(
            f"{recipe.data} is not the data that {source} saw, so its held-out images are not known there; give that "
            "data, or use --split test"
        )
    return images


def check_classes(card: ModelCard, names: tuple[str, ...], data: str) -> None:
    """Refuse to score a network on data of other classes than its own.

    Raises:
        DataError: Their number or names differ.
    """
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
