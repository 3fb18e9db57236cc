"""The main job: train one network with different token mixers, and say how sure the difference is."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from .._checks import check_arguments, check_folder
from .._files import read_json, write_text
from ..data.dense import SCENES
from ..errors import DivergedError, StaticKeyError
from ..models import Swap
from ..tasks import (
    ClassificationRecipe,
    Display,
    Machine,
    Recipe,
    Run,
    RunsDisplay,
    ScoreOn,
    counted,
    free,
    locked,
    new_trainer,
    train_run,
)
from .config import CompareConfig, run_name
from .report import REPORT_FILE, write_report
from .results import SUMMARY_FILE, read_runs, summarize, write_results
from .table import results_table

MIXERS, SEEDS = ("mhsa", "ska", "cska", "fcska"), (0, 1, 2)
"""What is compared where nothing is said."""
_POLL, _PATIENCE = 2.0, 600.0
"""Seconds between looks at what other processes have finished, and to wait for one that writes results."""
README = """Results of `statickey compare`.
config.yaml   reruns or continues it: statickey compare --config config.yaml
report.html   the results as a page
results.csv, summary.json   the results as numbers
runs/         one folder a run: run.json, predictions.npz, weights for statickey evaluate and predict
"""


def compare(
    recipe: Recipe | None = None,
    *,
    mixers: Sequence[str | Swap] | None = None,
    seeds: Sequence[int] | None = None,
    out: str = "statickey-compare",
    score_on: ScoreOn = "test",
    machine: Machine | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """Train one network with several token mixers and seeds under one recipe, and compare their scores.

    At one seed all mixers get bit-identical shared weights, batches and augmentations. Finished runs in
    ``out`` are reused, an interrupted run continues at its last finished epoch, and more mixers or seeds may
    be added later. The test images are read once per run, after its last epoch.

    The same call made by several processes, one a device, shares the runs of one ``out``: each takes the next that
    nobody has, a killed one's run is taken up by another, and who finishes last writes the report.

    Args:
        recipe: What is learned and how; default a ``ClassificationRecipe``, 14 epochs of the built-in digits.
        mixers: Token mixers, with their arguments and layers if need be, as ``cska:kernel_size=5`` or
            ``ska@-3,-2,-1``; the differences are to ``mhsa`` if it is among them, else to the first. Default
            ``mhsa``, ``ska``, ``cska`` and ``fcska``; on the built-in scenes, where runs take minutes, the first two.
        seeds: One run per mixer and seed; default 0, 1 and 2, on the built-in scenes 0, for a first look.
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
    check_arguments(compare, locals())
    check_folder(out=str(out))
    machine = Machine() if machine is None else machine
    recipe = ClassificationRecipe() if recipe is None else recipe
    few = recipe.data == SCENES
    mixers = (MIXERS[:2] if few else MIXERS) if mixers is None else mixers
    seeds = (SEEDS[:1] if few else SEEDS) if seeds is None else seeds
    config = CompareConfig.of(recipe, machine, mixers, seeds, score_on, str(out))
    display = Display(console)
    with display.busy("reading images"):
        data = config.task.read_data(config.recipe)
    display.skipped(data.skipped)
    root = Path(config.out)
    ids = config.ids(data.fingerprint())
    runs = [_run(config, data, mixer, seed, ids) for seed in config.seeds for mixer in config.mixers]
    _check_before_writing(config, runs)
    with locked(root, wait=_PATIENCE):
        merged = config.joined(root)
        read_runs(config.task, root, ids)  # refuses runs from other data before hours are spent beside them
        merged.write(root)
        write_text(root / "README.txt", README)
    beside, diverged = _train_missing(config, runs, display)
    if diverged and not any(run.finished for run in runs):
        raise DivergedError("; ".join(diverged))
    with display.busy("writing the results"), locked(root, wait=-1):  # another process may be at it
        merged = config.joined(root)
        summary = _summary_of_another(root, runs) if beside and not diverged else None
        if summary is None:
            finished = read_runs(config.task, root, ids)
            summary = summarize(merged, data, finished)
            write_results(root, summary, finished)
            write_report(root, merged, data, summary, finished)
    display.console.print(results_table(summary, display.console.width))
    display.say(f"report: {escape(str(root / REPORT_FILE))}")
    if diverged:
        raise DivergedError(f"{'; '.join(diverged)}; the other runs are finished and in the report")
    return summary


def _run(config: CompareConfig, data: Any, mixer: str, seed: int, ids: tuple[str, ...]) -> Run:
    return Run(
        task=config.task,
        recipe=config.recipe,
        machine=config.machine,
        data=data,
        mixer=mixer,
        seed=seed,
        path=Path(config.out) / "runs" / run_name(mixer, seed),
        ids=ids,
        score_on=config.score_on,
    )


def _check_before_writing(config: CompareConfig, runs: Sequence[Run]) -> None:
    """Build everything once, so that a refusal comes before the first file."""
    config.task.settled(config.recipe, runs[0].data)
    for run in runs[: len(config.mixers)]:
        run.new_model()
    runs[0].data_module().train_dataloader()
    new_trainer(config.recipe, config.machine)


def _train_missing(config: CompareConfig, runs: Sequence[Run], display: Display) -> tuple[bool, list[str]]:
    """Train what no process has trained yet, one run after the other, and wait for those that others train.

    A process that is killed loses its locks, so another takes its run up at the last finished epoch. A run that
    diverges does not keep the others from their turn.

    Returns:
        Whether there was anything to do, so that a process beside this one may have written the results since, and
        what is to be said of runs that diverged.
    """
    diverged: list[str] = []
    missing = [run for run in runs if not run.finished]
    if len(missing) < len(runs):
        display.say(f"{len(runs) - len(missing)} of {len(runs)} runs are finished already: reused")
    if not missing:
        return False, diverged
    with display.runs(len(missing)) as bars:
        while missing:
            for run in list(missing):
                trained = False
                if not run.finished:
                    with free(run.path) as ours:
                        if ours and not run.finished:
                            try:
                                _train(config, run, bars)
                            except DivergedError as error:
                                diverged.append(str(error))
                                missing.remove(run)
                            trained = True
                if run.finished:
                    missing.remove(run)
                    if not trained:
                        bars.finish(f"{run.mixer} seed {run.seed}: by another process")
            if missing:
                bars.wait(f"other processes train the last {counted(len(missing), 'run')}")
                time.sleep(_POLL)
    return True, diverged


def _train(config: CompareConfig, run: Run, bars: RunsDisplay) -> None:
    label, metric = f"{run.mixer} seed {run.seed}", config.task.metric
    progress = bars.start(label, config.recipe.total_epochs, metric)
    try:
        result = train_run(run, [progress])
    except StaticKeyError as error:
        raise type(error)(f"{label}: {error}") from error
    finally:
        progress.close()
    assert result is not None
    bars.finish(
        f"{label}: {metric.text(result[metric.name])} of {result['scored_images']} {config.score_on} images, "
        f"{result['train_seconds']:.0f} s"
    )


def _summary_of_another(root: Path, runs: Sequence[Run]) -> dict[str, Any] | None:
    """What the process that finished last wrote, where it has written already."""
    place = root / SUMMARY_FILE
    newest = max(run.result.stat().st_mtime_ns for run in runs)
    if not place.is_file() or place.stat().st_mtime_ns < newest or not (root / REPORT_FILE).is_file():
        return None  # a summary older than a run is an earlier call's
    summary: dict[str, Any] = read_json(place, "delete it to write it anew")
    told = {(row["mixer"], seed) for row in summary["mixers"] for seed in row["seeds"]}
    return summary if {(run.mixer, run.seed) for run in runs} <= told else None
