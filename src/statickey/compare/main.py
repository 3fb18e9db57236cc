"""The main job: train one network with different token mixers, and say how sure the difference is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape

from .._checks import check_folder
from .._files import write_text
from ..data import ImageData
from ..errors import StaticKeyError
from ..tasks import Display, Machine, Recipe, Run, locked, new_trainer, read_data, train_run
from .config import CompareConfig
from .report import write_report
from .results import read_runs, summarize, write_results
from .table import results_table

README = """Results of `statickey compare`.
config.yaml   reruns or continues it: statickey compare --config config.yaml
report.html   the results as a page
results.csv, summary.json   the results as numbers
runs/         one folder a run: run.json, predictions.npz, weights for statickey evaluate and predict
"""


def compare(
    recipe: Recipe | None = None,
    *,
    mixers: Sequence[str] = ("mhsa", "ska", "cska", "fcska"),
    seeds: Sequence[int] = (0, 1, 2),
    out: str = "statickey-compare",
    score_on: Literal["test", "holdout"] = "test",
    machine: Machine | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train one network with several token mixers and seeds under one recipe, and compare test accuracies.

    At one seed all mixers get bit-identical shared weights, batches and augmentations. Finished runs in
    ``out`` are reused, an interrupted run continues at its last finished epoch, and more mixers or seeds may
    be added later. The test images are read once per run, after its last epoch.

    Args:
        recipe: Data, network, optimisation and augmentation; default 14 epochs of the built-in digits.
        mixers: Names of token mixers; the differences are to ``mhsa`` if it is among them, else to the first.
        seeds: One run per mixer and seed.
        out: Folder of the results.
        score_on: Score the test images, or the held-out ones while tuning.
        machine: What to run on; default one device.
        console: Where to print; default the terminal.

    Returns:
        What is in ``out/summary.json``.

    Raises:
        StaticKeyError: An argument, the data or the folder is not usable; the message says what to do.
        KeyboardInterrupt: Ctrl-C; the same call continues.
    """
    check_folder(out=str(out))
    machine = Machine() if machine is None else machine
    config = CompareConfig(
        recipe=(Recipe() if recipe is None else recipe).on(machine),
        machine=machine,
        mixers=tuple(mixers),
        seeds=tuple(seeds),
        score_on=score_on,
        out=str(out),
    )
    display = Display(console)
    with display.busy("reading images"):
        images = read_data(config.recipe)
    assert isinstance(images, ImageData)
    display.skipped(images.skipped)
    root = Path(config.out)
    config_hash = config.hash(images.fingerprint())
    runs = [_run(config, images, mixer, seed, config_hash) for seed in config.seeds for mixer in config.mixers]
    _check_before_writing(config, runs)
    with locked(root):
        merged = config.joined(root)
        read_runs(root, config_hash)  # refuses runs from other data before hours are spent beside them
        merged.write(root)
        write_text(root / "README.txt", README)
        _train_missing(config, runs, display)
        finished = read_runs(root, config_hash)
        summary = summarize(merged, images, finished)
        write_results(root, summary, finished)
        with display.busy("drawing the report"):
            report = write_report(root, merged, images, summary, finished)
    display.console.print(results_table(summary, display.console.width))
    display.say(f"report: {escape(str(report))}")
    return summary


def _run(config: CompareConfig, images: ImageData, mixer: str, seed: int, config_hash: str) -> Run:
    path = Path(config.out) / "runs" / f"{mixer}-seed{seed}"
    return Run(config.recipe, config.machine, images, mixer, seed, path, config_hash, config.score_on)


def _check_before_writing(config: CompareConfig, runs: Sequence[Run]) -> None:
    """Build everything once, so that a refusal comes before the first file."""
    for run in runs[: len(config.mixers)]:
        run.new_model()
    runs[0].data_module().train_dataloader()
    new_trainer(config.recipe, config.machine)


def _train_missing(config: CompareConfig, runs: Sequence[Run], display: Display) -> None:
    missing = [run for run in runs if not run.finished]
    if len(missing) < len(runs):
        display.say(f"{len(runs) - len(missing)} of {len(runs)} runs are finished already: reused")
    if not missing:
        return
    with display.runs(len(missing)) as bars:
        for run in missing:
            label = f"{run.mixer} seed {run.seed}"
            progress = bars.start(label, config.recipe.total_epochs)
            try:
                result = train_run(run, [progress])
            except StaticKeyError as error:
                raise type(error)(f"{label}: {error}") from error
            finally:
                progress.close()
            assert result is not None
            bars.finish(
                f"{label}: {result['accuracy']:.2f} % of {result['scored_images']} {config.score_on} images, "
                f"{result['train_seconds']:.0f} s"
            )
