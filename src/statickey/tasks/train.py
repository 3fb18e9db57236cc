"""``train``: one network by one recipe."""

import csv
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning as L
import yaml
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .._checks import check_folder, check_name
from .._files import write_text
from ..errors import OutputError, StaticKeyError
from ..layers import MIXERS
from ..models import start_from
from .checkpoint import SUFFIX
from .display import Display, counted
from .engine import Run, new_model, new_trainer, read_data, train_run
from .folder import locked
from .recipe import Machine, Recipe, difference
from .weights import WEIGHTS_FILES

CONFIG_FILE, CURVE_FILE = "config.yaml", "curve.csv"


def train(
    recipe: Recipe | None = None,
    *,
    mixer: str | None = None,
    seed: int = 0,
    out: str = "statickey-train",
    resume: Literal["auto", "never"] = "auto",
    logger: Literal["tensorboard", "wandb", "mlflow"] = "tensorboard",
    score_on: Literal["test", "holdout"] = "test",
    machine: Machine | None = None,
    console: Console | None = None,
) -> dict[str, Any] | None:
    """Train one network, score it, and save its weights.

    After each epoch the whole state is saved; however the process ends, the same call goes on from there and, on
    a CPU, ends in the weights of an uninterrupted run. The test images are read once, after the last epoch.

    Args:
        recipe: Data, network, optimisation and augmentation; default 14 epochs of the built-in digits.
        mixer: Token mixer in place of the network's attention; default the network's own.
        seed: Seed of weights, order and augmentation.
        out: Folder of the run.
        resume: Go on with what is in ``out``, or refuse a folder that holds a run.
        logger: Where curves go besides ``curve.csv`` and TensorBoard.
        score_on: Score the test images, or the held-out ones while tuning.
        machine: What to run on; default one device.
        console: Where to print; default the terminal.

    Returns:
        What is in ``out/run.json``; None on all processes but the first.

    Raises:
        StaticKeyError: An argument, the data or the folder is not usable; the message says what to do.
        KeyboardInterrupt: Ctrl-C; the same call continues.
    """
    check_folder(out=out)
    recipe = Recipe() if recipe is None else recipe
    machine = Machine() if machine is None else machine
    recipe = recipe.on(machine)
    for name, value, known in (
        ("resume", resume, ("auto", "never")),
        ("score_on", score_on, ("test", "holdout")),
        ("logger", logger, ("tensorboard", "wandb", "mlflow")),
    ):
        if value not in known:
            raise StaticKeyError(f"{name}={value!r} must be one of {', '.join(known)}")
    if mixer is not None:
        check_name("mixer", mixer, MIXERS)
    if seed < 0:
        raise StaticKeyError(f"seed={seed} must not be negative")
    trainer = new_trainer(recipe, machine)
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started > trainer.world_size:
        raise StaticKeyError(
            f"the launcher started {started} processes, devices={machine.devices} and num_nodes={machine.num_nodes} "
            f"make {trainer.world_size}; pass --devices and --num-nodes to match"
        )
    first = trainer.is_global_zero
    display = Display(console if first else Console(file=io.StringIO()))
    with display.busy("reading images"):
        data = read_data(recipe)
    display.skipped(data.skipped)
    root = Path(out)
    run_id = recipe.hash(data.fingerprint(), mixer=mixer, seed=seed, score_on=score_on)
    run = Run(recipe, machine, data, mixer, seed, root, run_id, score_on)
    run.data_module().plan(0, trainer.world_size)
    model = new_model(recipe, data, mixer, seed)
    if recipe.weights is not None:
        report = start_from(model, recipe.weights)
        display.say(
            f"{escape(recipe.weights)}: {len(report.taken)} tensors taken, {len(report.fresh)} start fresh, "
            f"{len(report.unused)} not used"
        )
    config = _config(run, out, resume, logger)
    with locked(root) if first else nullcontext():
        if first:  # the other processes come when the first has begun
            _check_folder(run, config, resume)
        if run.finished:
            display.say(f"{escape(str(run.result))} is finished already; choose another --out to train anew")
            return run.read_result()
        if first:
            write_text(root / CONFIG_FILE, yaml.safe_dump(config, sort_keys=False))
        label = f"{_network(run)}, seed {seed}"
        with display.runs(1) as bars, _loggers(root, logger, run_id) as loggers:
            progress = bars.start(label, recipe.total_epochs)
            result = train_run(run, [progress, CurveFile(root / CURVE_FILE, display)], loggers)
            progress.close()
    if result is not None:
        display.console.print(_table(run, result))
        display.say(f"weights: {escape(str(root / WEIGHTS_FILES['last']))}")
    return result


def _config(run: Run, out: str, resume: str, logger: str) -> dict[str, Any]:
    """All options as ``--config`` reads them."""
    options = {"mixer": run.mixer, "seed": run.seed, "score_on": run.score_on}
    places = {"out": out, "resume": resume, "logger": logger}
    return run.recipe.to_dict() | options | asdict(run.machine) | places


def _check_folder(run: Run, config: dict[str, Any], resume: str) -> None:
    """Refuse a folder that holds another run.

    Raises:
        OutputError: It does; the message says what differs.
    """
    root, path = run.path, run.path / CONFIG_FILE
    begun = run.finished or any(root.glob(f"*{SUFFIX}"))
    if not path.is_file() or not begun:
        return
    if resume == "never":
        raise OutputError(f"{root} holds a run and resume is 'never'; choose another --out, or leave out --resume")
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
        there, here = ({k: v for k, v in c.items() if k not in _FREE} for c in (before, config))
    except (yaml.YAMLError, AttributeError, UnicodeDecodeError) as error:
        raise OutputError(f"{path} is not a run's configuration; choose another --out") from error
    if there != here:
        raise OutputError(
            f"{root} holds a run of another configuration ({difference(there, here)}); choose another --out, or "
            "repeat the earlier options"
        )
    if run.finished and run.read_result().get("config_hash") != run.run_id:
        raise OutputError(f"{root} holds a finished run on other data; choose another --out")


_FREE = ("data", "data_dir", "out", "resume", "logger", *Machine.__dataclass_fields__)
"""Options that may differ when a run is taken up again."""


@contextmanager
def _loggers(root: Path, logger: str, run_id: str) -> Iterator[list[Any]]:
    """TensorBoard, and another logger by request."""
    loggers: list[Any] = [TensorBoardLogger(root, name="", version="tensorboard")]
    try:
        if logger == "wandb":
            loggers.append(WandbLogger(save_dir=root, name=root.name, resume="allow", id=run_id))
        elif logger == "mlflow":
            loggers.append(
                MLFlowLogger(
                    run_name=root.name, tags={"run_id": run_id}, tracking_uri=os.environ.get("MLFLOW_TRACKING_URI")
                )
            )
    except ModuleNotFoundError as error:
        raise StaticKeyError(f"logger={logger!r} needs a package: pip install {logger}") from error
    try:
        yield loggers
    finally:
        for each in loggers:
            each.finalize("finished")


class CurveFile(L.Callback):
    """Writes the whole curve as CSV before each epoch's end is saved, and a line where there is no bar."""

    def __init__(self, path: Path, display: Display) -> None:
        self._path, self._display = path, display

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write what the checkpoint holds."""
        curve = getattr(pl_module, "curve", [])
        if not curve or not trainer.is_global_zero:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, list(curve[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(curve)
        write_text(self._path, text.getvalue())
        if not self._display.console.is_terminal:
            row = curve[-1]
            self._display.say(
                f"epoch {row['epoch']:.0f}/{trainer.max_epochs}  loss {row['train_loss']:.3f}  "
                f"held-out {row['holdout_accuracy']:.2f} %  {row['images_per_second']:,.0f} img/s"
            )


def _network(run: Run) -> str:
    return run.recipe.model if run.mixer is None else f"{run.recipe.model} with {run.mixer}"


def _table(run: Run, result: dict[str, Any]) -> Table:
    """What came out, for the terminal."""
    table = Table(title=f"{_network(run)} on {Path(run.recipe.data).name}", title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    rows = {
        f"accuracy, {counted(result['scored_images'], run.score_on + ' image')}": f"{result['accuracy']:.2f} %",
        "accuracy, averaged weights": f"{result['ema_accuracy']:.2f} %",
        "parameters": f"{result['params'] / 1e6:.3f} M",
        "MACs": f"{result['macs'] / 1e6:.1f} M",
        "training": f"{result['train_seconds']:,.0f} s, {result['images_per_second']:,.0f} img/s",
        "loader": f"{result['loader_images_per_second']:,.0f} img/s",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    return table
