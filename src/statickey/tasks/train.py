"""``train``: one network by one recipe."""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import lightning as L
import yaml
from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from rich.console import Console
from rich.markup import escape

from .._checks import check_arguments, check_choice, check_folder, check_seed
from .._files import read_yaml, write_csv, write_text
from .._plugins import loaded_plugins
from ..data import StreamedImages
from ..errors import OutputError, StaticKeyError
from ..models import Swap, start_from
from .board import Board, quiet_writers
from .checkpoint import SUFFIX
from .classification import ClassificationRecipe
from .display import Display, counted, facts_table
from .engine import new_trainer, train_run
from .folder import locked
from .pictures import HeldOutPictures
from .recipe import Machine, Recipe, difference, identities
from .registry import task_of
from .run import Run
from .start import start_file
from .task import ScoreOn
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
    score_on: ScoreOn = "test",
    machine: Machine | None = None,
    console: Console | None = None,
) -> dict[str, Any] | None:
    """Train one network, score it, and save its weights.

    After each epoch the whole state is saved; however the process ends, the same call goes on from there and, on
    a CPU, ends in the weights of an uninterrupted run. The test images are read once, after the last epoch.
    TensorBoard shows what a detector or segmenter says of four held-out images, ten times a run.

    Args:
        recipe: What is learned and how; default a ``ClassificationRecipe``, 14 epochs of the built-in digits.
        mixer: Token mixer in place of the network's attention, with its arguments and layers if need be, as
            ``cska:kernel_size=5`` or ``ska@-3,-2,-1``; default the network's own.
        seed: Seed of weights, order and augmentation.
        out: Folder of the run.
        resume: Go on with what is in ``out``, or refuse a folder that holds a run.
        logger: Where curves go besides ``curve.csv`` and TensorBoard.
        score_on: Score the test images, or the held-out ones while tuning.
        machine: What to run on; default one device.
        console: Where to print; default the terminal.

    Returns:
        What is in ``out/run.json``; None on all processes but the first, unless the run was finished already.

    Raises:
        StaticKeyError: An argument, the data or the folder is not usable; the message says what to do.
        KeyboardInterrupt: Ctrl-C; the same call continues.
    """
    out = str(out) if isinstance(out, Path) else out
    check_folder(out=out)
    check_choice(
        resume=(resume, ("auto", "never")),
        score_on=(score_on, ("test", "holdout")),
        logger=(logger, ("tensorboard", "wandb", "mlflow")),
    )
    check_seed(seed)
    check_arguments(train, locals())
    machine = Machine() if machine is None else machine
    recipe = (ClassificationRecipe() if recipe is None else recipe).on(machine)
    task = task_of(recipe)
    mixer = None if mixer is None else str(Swap.parse(mixer))
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
        data = task.read_data(recipe)
    display.skipped(data.skipped)
    task.settled(recipe, data)  # refuses what does not fit the data
    others = {"mixer": mixer, "seed": seed, "score_on": score_on}
    run = Run(
        task=task,
        recipe=recipe,
        machine=machine,
        data=data,
        mixer=mixer,
        seed=seed,
        path=Path(out),
        ids=identities(
            recipe,
            task.name,
            data.fingerprint(),
            others,
            data.fingerprint_of_0_1() if isinstance(data, StreamedImages) else None,
        ),
        score_on=score_on,
    )
    run.data_module().plan(0, trainer.world_size)
    _check_model(run, display)
    config = _config(run, out, resume, logger)
    with locked(run.path) if first else nullcontext():
        if first:  # the other processes come when the first has begun
            _check_folder(run, config, resume)
        if run.finished:
            finished = run.read_result()
            display.say(f"{escape(str(run.result))} is finished already; choose another --out to train anew")
            return finished
        if first:
            write_text(run.path / CONFIG_FILE, yaml.safe_dump(config, sort_keys=False))
        if machine.num_nodes > 1:
            place = f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', '(any port)')}"
            display.say(f"waiting at {place} for the processes of all {machine.num_nodes} machines")
        with display.runs(1) as bars, _loggers(run.path, logger, run.ids[0]) as loggers:
            progress = bars.start(f"{_network(run)}, seed {seed}", recipe.total_epochs, task.metric)
            curve = CurveFile(run, display)
            pictures = [HeldOutPictures(run)] if task.pictured else []
            result = train_run(run, [progress, curve, *pictures], loggers)
            progress.close()
    if result is not None:
        title = f"{_network(run)} on {Path(recipe.data).name}"
        display.console.print(facts_table(title, _facts(run, result)))
        display.say(f"weights: {escape(str(run.path / WEIGHTS_FILES['last']))}")
    return result


def _check_model(run: Run, display: Display) -> None:
    """Build the network once before anything is written, and say what of the weights it starts from fits."""
    model = run.task.build(run.recipe, run.data, run.mixer, run.seed)
    if run.recipe.weights is not None:
        path = start_file(run.recipe.weights, run.mixer, run.seed)
        report = start_from(model, path)
        display.say(
            f"{escape(str(path))}: {len(report.taken)} tensors taken, {len(report.fresh)} start fresh, "
            f"{len(report.unused)} not used"
        )


def _config(run: Run, out: str, resume: str, logger: str) -> dict[str, Any]:
    """All options as ``--config`` reads them."""
    options = {"task": run.task.name, "mixer": run.mixer, "seed": run.seed, "score_on": run.score_on}
    places = {"out": out, "resume": resume, "logger": logger}
    plugins = {"plugin": list(loaded_plugins())} if loaded_plugins() else {}
    return plugins | options | run.recipe.to_dict() | asdict(run.machine) | places


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
    differs = difference(
        read_yaml(path, "choose another --out"), config, {"task": "classify"} | run.recipe.defaults(), _MAY_DIFFER
    )
    if differs:
        raise OutputError(
            f"{root} holds a run of another configuration ({differs}); choose another --out, or repeat the earlier "
            "options"
        )


_MAY_DIFFER = ("data", "data_dir", "weights", "out", "resume", "logger", "plugin", *Machine.__dataclass_fields__)
"""Options that may differ when a run is taken up again."""


@contextmanager
def _loggers(root: Path, logger: str, run_id: str) -> Iterator[list[Any]]:
    """TensorBoard, and another logger by request."""
    loggers: list[Any] = [Board(root, name="", version="tensorboard")]
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
    with quiet_writers():
        try:
            yield loggers
        finally:
            for each in loggers:
                each.finalize("finished")


class CurveFile(L.Callback):
    """Writes the whole curve as CSV before each epoch's end is saved, and a line where there is no bar."""

    def __init__(self, run: Run, display: Display) -> None:
        self._path, self._metric, self._display = run.path / CURVE_FILE, run.task.metric, display

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write what the checkpoint holds."""
        curve = getattr(pl_module, "curve", [])
        if not curve or not trainer.is_global_zero:
            return
        write_csv(self._path, list(curve[-1]), curve)
        if not self._display.console.is_terminal:
            row = curve[-1]
            self._display.say(
                f"epoch {row['epoch']:.0f}/{trainer.max_epochs}  loss {row['train_loss']:.3f}  held-out "
                f"{self._metric.text(row[f'holdout_{self._metric.name}'])}  {row['images_per_second']:,.0f} img/s"
            )


def _network(run: Run) -> str:
    return run.recipe.model if run.mixer is None else f"{run.recipe.model} with {run.mixer}"


def _facts(run: Run, result: dict[str, Any]) -> dict[str, str]:
    """What came out."""
    metric = run.task.metric
    return {
        f"{metric.label}, {counted(result['scored_images'], run.score_on + ' image')}": metric.text(
            result[metric.name]
        ),
        f"{metric.label}, averaged weights": metric.text(result[f"ema_{metric.name}"]),
        "parameters": f"{result['params'] / 1e6:.3f} M",
        "MACs": f"{result['macs'] / 1e6:.1f} M",
        "training": f"{result['train_seconds']:,.0f} s, {result['images_per_second']:,.0f} img/s",
        "loader": f"{result['loader_images_per_second']:,.0f} img/s",
    }
