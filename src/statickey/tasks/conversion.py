"""``convert``: static keys for a trained classifier, fitted on images, in a folder like a run's."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from .._checks import check_arguments, check_folder
from .._files import check_writable, write_csv, write_json
from ..convert import Calibration, CalibrationReport, convert
from ..errors import OutputError
from ..layers import LogitBias
from ..models import WEIGHTS_FILE, Swap
from ..viz import head_map, save_png
from .classification import Classification
from .display import Display
from .engine import new_trainer
from .loading import network_of
from .recipe import Machine, Recipe
from .samples import images_for
from .weights import write_model

REPORT_FILE = "calibration.json"


def convert_run(
    source: str,
    *,
    out: str,
    data: str | None = None,
    data_dir: str | None = None,
    img_size: int | None = None,
    layers: str = "all",
    fit: Literal["kl", "lstsq", "mean", "constant"] = "kl",
    bias: LogitBias | None = None,
    fraction: float | None = None,
    max_drop: float | None = None,
    criterion: Literal["change", "kl", "output"] = "change",
    num_images: int = 512,
    ema: bool = False,
    seed: int = 0,
    accelerator: str = "auto",
    console: Console | None = None,
) -> CalibrationReport:
    """Give a trained classifier static keys, without training.

    Args:
        source: Folder of a run, of ``statickey convert`` or of a repair, of which further heads are converted, or a
            pretrained model's name, as timm has it.
        out: Folder of the converted network, which all commands that take a run's take too.
        data: Images to fit on, a folder or what ``train`` takes; default the training images of the run.
        data_dir: Where torchvision keeps its downloads.
        img_size: Bring images and network to this size.
        layers: Which layers: all, or indices or names with commas between them, as 6,7 or blocks.1*.
        fit: What a head's static map is made near to: its distribution (kl), its logits (lstsq) or keys (mean);
            constant is the control, a map that does not see the input.
        bias: Add a number to logits, for each key, or for each pair of places (map).
        fraction: Share of the heads that are static in the end; default all.
        max_drop: As many heads as cost no more than this: points of the task's score on the images the run held out,
            or without them this share of the output's size.
        criterion: Which heads are first: by change of the output when a head is converted alone, or by an error of
            its own.
        num_images: Images to take, a quarter of which is kept back to measure on.
        ema: Convert the averaged weights.
        seed: Of which images are taken, and of the controls.
        accelerator: Lightning's accelerator.
        console: Where to print; default the terminal.

    Returns:
        What was found and done, which is in ``calibration.json`` too.

    Raises:
        StaticKeyError: There is no such network, its attention cannot be converted, or the images do not fit.
    """
    check_arguments(convert_run, locals())
    check_folder(out=out)
    folder = Path(out)
    if (folder / WEIGHTS_FILE).exists():
        raise OutputError(f"{out} holds a network already; choose another --out")
    check_writable(out=folder / WEIGHTS_FILE)
    places = Swap.parse(f"ska@{layers}").layers
    display = Display(console)
    model, card, task = network_of(
        source,
        img_size=img_size,
        ema=ema,
        tasks=(Classification,),
        otherwise="the command converts classifiers, from Python convert the backbone",
    )
    model.to(new_trainer(Recipe(), Machine(accelerator=accelerator)).strategy.root_device)
    where: dict[str, Any] = {"data": data, "data_dir": data_dir, "num_images": num_images, "seed": seed}
    with display.busy("reading images"):
        images, scored = images_for(task, model, card, source, **where)
    asked = Calibration(
        [images],
        num_images=num_images,
        fit=fit,
        bias=bias,
        fraction=fraction,
        max_drop=max_drop,
        metric=None if scored is None else lambda model: scored(model).value(),
        criterion=criterion,
        seed=seed,
    )
    with display.busy("converting"):
        report = convert(model, "ska", layers=places, calibration=asked)
    texts = [str(Swap(**step)) for step in report.steps]
    own: Any = getattr(model, "mixer_text", None)
    model.mixer_text = ";".join([*([] if own is None else [own]), *texts])  # type: ignore[assignment]
    write_json(folder / REPORT_FILE, report.to_json())
    rows = [asdict(head) for head in report.heads]
    write_csv(folder / "heads.csv", list(rows[0]), rows)
    save_png(head_map(report.heads), folder / "heads.png")
    write_model(folder, "last", model.cpu(), replace(card, task=Classification.name))  # of a repair, too
    display.console.print(str(report), markup=False, highlight=False)
    display.say(f"results: {escape(str(folder))}")
    return report
