"""Is attention with a static key the better second stage on dense tasks, too?

    python benchmarks/dense.py FOLDER                        # everything, from FOLDER/{cifar10,bccd,pennfudan,camvid}
    python benchmarks/dense.py FOLDER --steps classifiers    # what the detectors and segmenters start from
    python benchmarks/dense.py FOLDER --steps tune compare --sets camvid camvid-stage3
    python benchmarks/dense.py FOLDER --steps sizes --sets camvid      # scores at other sizes than in training
    python benchmarks/dense.py FOLDER --steps cost metrics             # time and memory; wants a machine to itself

One run a process, ``--processes`` at a time; finished runs are reused. Results: ``runs/dense/SET`` with its report.
Tables are in docs/results/dense.md.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from statickey import set_off_grid
from statickey._typing import OffGrid
from statickey.bench.measure import Phase, Setting, interleaved, peak_memory
from statickey.compare import compare
from statickey.compare.config import run_name
from statickey.tasks import (
    ClassificationRecipe,
    DetectionRecipe,
    Recipe,
    ScoreOn,
    SegmentationRecipe,
    load_model,
    read_result,
    task_named,
)
from statickey.tasks.scoring import score

OUT = Path("runs/dense")
CLASSIFIERS = OUT / "classifiers"
RATES_FILE = OUT / "rates.json"
PATTERNS = ["mhsa", "sepconv", "ska", "cska", "fcska", "ska:key=continuous", "ska:key_size=[7,7]"]
"""What stands in the second of four stages; the first has convolutions, the last two self-attention."""
REPEATED = ["mhsa", "sepconv", "ska", "cska", "ska:key=continuous"]
"""Those with three seeds on bccd and camvid."""
STAGE3 = ["sepconv", "sepconv", "X", "mhsa"]
SETS = ("bccd-cascade", "bccd", "pennfudan", "camvid", "camvid-stage3", "camvid-scratch")
TUNED = {"bccd": ("bccd", "bccd-cascade", "pennfudan"), "camvid": ("camvid", "camvid-stage3", "camvid-scratch")}
"""What is tuned, and the comparisons that take its learning rate."""
RATES = (5e-4, 1e-3, 2e-3)
EPOCHS = {"bccd": 8, "pennfudan": 8, "camvid": 8}
SIDES = {"bccd": (96, 120, 144, 180), "camvid": (120, 180, 240, 360)}
"""Shorter sides of test images in pixels, of which the second is that of training; for bccd 240 x 180 is the most."""


def family_of(name: str) -> str:
    """The data set of a comparison."""
    return name.partition("-")[0]


def recipe(name: str, folder: Path) -> Recipe:
    """What is trained on a set; its learning rate is the tuned one."""
    if name == "classifiers":  # CIFAR-10 at 64 pixels: a second stage of 8x8 tokens
        data = str(folder / "cifar10")
        return ClassificationRecipe(
            data=data, limit=20_000, model="skaformer_nano", img_size=64, epochs=4, batch_size=64, lr=0.002
        )
    family = family_of(name)
    rates = json.loads(RATES_FILE.read_text()) if RATES_FILE.exists() else {}
    settings: dict[str, Any] = {
        "data": str(folder / family),
        "weights": None if name.endswith(("-scratch", "-stage3")) else str(CLASSIFIERS),
        "epochs": EPOCHS[family],
        "batch_size": 8,
        "lr": next(rates.get(tuned, {}).get("rate", RATES[1]) for tuned, takers in TUNED.items() if name in takers),
        "precision": "32-true",
    }
    if family == "camvid":
        args = {"mixers": STAGE3} if name.endswith("-stage3") else {}
        return SegmentationRecipe(**settings, img_size=180, crop_size=160, model_args=args)
    arch = {"bccd": "faster_rcnn", "bccd-cascade": "cascade_rcnn", "pennfudan": "mask_rcnn"}[name]
    return DetectionRecipe(**settings, arch=arch, img_size=144, max_size=240)


def runs_of(name: str) -> list[tuple[str, int]]:
    """Mixers and seeds of a comparison."""
    if name.endswith("-scratch"):
        return [("mhsa", 0), ("sepconv", 0)]
    again = [(mixer, seed) for seed in (1, 2) for mixer in REPEATED] if name in ("bccd", "camvid") else []
    return [(mixer, 0) for mixer in PATTERNS] + again


def train(epochs: int | None, name: str, folder: Path, mixer: str, seed: int, rate: float | None = None) -> str:
    """One run of a comparison, or of its tuning at a rate; says how it went."""
    asked, out = recipe(name, folder), OUT / name
    score_on: ScoreOn = "test"
    if epochs is not None and name != "classifiers":
        asked = replace(asked, epochs=epochs)
    if rate is not None:
        asked, out, score_on = replace(asked, lr=rate, holdout=0.2), OUT / f"tune-{name}-{rate:g}", "holdout"
    with (OUT / "log.txt").open("a") as log:
        compare(asked, mixers=[mixer], seeds=(seed,), out=str(out), score_on=score_on, console=Console(file=log))
    result = read_result(out / "runs" / run_name(mixer, seed))
    value = result[task_named(result["task"]).metric.name]
    return f"{out.name} {mixer} seed {seed}: {value:.2f}, {result['train_seconds']:.0f} s"


def choose_rates(sets: Iterable[str]) -> None:
    """Keep the learning rate whose mean over ``mhsa`` and ``sepconv`` is the best on held-out images."""
    rates = json.loads(RATES_FILE.read_text()) if RATES_FILE.exists() else {}
    for name in sets:
        scores: dict[float, list[float]] = {}
        for rate in RATES:
            for mixer in ("mhsa", "sepconv"):
                result = read_result(OUT / f"tune-{name}-{rate:g}" / "runs" / run_name(mixer, 0))
                scores.setdefault(rate, []).append(result[task_named(result["task"]).metric.name])
        best = max(scores, key=lambda rate: float(np.mean(scores[rate])))
        rates[name] = {"rate": best, "scores of mhsa and sepconv": {f"{rate:g}": s for rate, s in scores.items()}}
        print(name, rates[name], flush=True)
    RATES_FILE.write_text(json.dumps(rates))


def sizes(name: str, folder: Path, mixer: str, seed: int) -> str:
    """The score on test images of other sizes than in training, by what static keys do there."""
    run = OUT / name / "runs" / run_name(mixer, seed)
    task = task_named(read_result(run)["task"])
    found: dict[str, dict[int, float]] = {}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for off_grid in get_args(OffGrid) if mixer != "mhsa" else ("-",):
        for side in SIDES[name]:
            model, _ = load_model(str(run), img_size=side)
            if off_grid != "-":
                set_off_grid(model, off_grid)
            settings: Any = task.recipe_class(data=str(folder / name), img_size=side)  # type: ignore[call-arg]
            module = task.data_module(settings, task.read_data(settings), 0)
            evidence = score(task, model.to(device), module, module.scoring_dataloader("test"), "32-true")
            found.setdefault(off_grid, {})[side] = evidence.value()
    (OUT / f"sizes-{name}-{run.name}.json").write_text(json.dumps(found))
    return f"sizes of {name} {run.name}: {found}"


class Pass(nn.Module):
    """A fresh network of a comparison with batches of its own: what it says of test images, or its training loss."""

    def __init__(self, name: str, folder: Path, mixer: str) -> None:
        super().__init__()
        asked = recipe(name, folder)
        self.task: Any = task_named("segment" if isinstance(asked, SegmentationRecipe) else "detect")
        self.data = self.task.read_data(asked)
        self.recipe = self.task.settled(asked, self.data)
        self.module = self.task.data_module(self.recipe, self.data, 0)
        self.loaders = {"training": self.module.train_dataloader(), "forward": self.module.scoring_dataloader("test")}
        self.batches = {phase: self.ready(next(iter(each))) for phase, each in self.loaders.items()}
        self.network = self.task.build(self.recipe, self.data, mixer, 0)

    def ready(self, batch: Any) -> Any:
        """A batch as the network takes it."""
        return self.module.on_after_batch_transfer(batch, 0)

    def forward(self, x: Tensor) -> Any:
        if not self.training:
            return self.task.outputs(self.network, self.batches["forward"])
        return torch.stack(list(self.task.losses(self.network, self.batches["training"], self.recipe).values())).sum()


def work_of(name: str, folder: Path, mixer: str) -> tuple[nn.Module, Tensor]:
    """A network at work on what it holds; the tensor is there for the clock's sake."""
    return Pass(name, folder, mixer), torch.zeros(1)


def cost(name: str, folder: Path) -> None:
    """Milliseconds an image, in test and in training, and peak megabytes of a batch of eight; one core."""
    setting = Setting()
    phases: tuple[Phase, ...] = ("forward", "training")
    torch.set_num_threads(1)
    peaks = {mixer: peak_memory(partial(work_of, name, folder, mixer), phases, setting) for mixer in PATTERNS}
    made = {mixer: work_of(name, folder, mixer) for mixer in PATTERNS}
    for phase in phases:
        calls = {mixer: setting.prepare(each, phase) for mixer, each in made.items()}
        rounds = list(interleaved(calls, 5, setting))
        for mixer in PATTERNS:
            times = [1e3 * each[mixer] / 8 for each in rounds]
            ratio = np.median([each[mixer] / each["mhsa"] for each in rounds])
            megabytes = (peaks[mixer][phase] or 0) / 1e6
            print(
                f"| {name} | {phase} | {mixer} | {np.median(times):.1f} | {ratio:.2f} | {megabytes:.0f} |", flush=True
            )


def metrics(name: str, folder: Path) -> None:
    """Seconds that the metric takes for all test images, as a share of an epoch of training."""
    torch.set_num_threads(1)
    made = Pass(name, folder, "mhsa").eval()
    with torch.inference_mode():
        said = [made.task.outputs(made.network, made.ready(batch)) for batch in made.loaders["forward"]]
    metric = made.task.validation_metric(made.data)
    start = time.perf_counter()
    for outputs in said:
        metric.update(*outputs)
    metric.compute()
    own = time.perf_counter() - start
    calls = {"training": Setting().prepare((made, torch.zeros(1)), "training")}
    step = float(np.median([each["training"] for each in interleaved(calls, 5, Setting())]))
    epoch = step * len(made.loaders["training"])
    print(f"| {name} | {own:.2f} s | {epoch:.1f} s | {own / epoch:.1%} |", flush=True)


def work(jobs: "Iterable[partial[str]]", processes: int, until: float) -> None:
    """Do jobs in so many processes, which stop taking new ones at a time."""
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        for line in pool.imap_unordered(partial(_done, until), list(jobs)):
            print(f"{time.strftime('%X')} {line}", flush=True)


def _done(until: float, job: "partial[str]") -> str:
    what = " ".join(str(each) for each in job.args if not isinstance(each, Path))
    if time.time() > until:
        return f"{what}: left out for lack of time"
    try:
        return job()
    except Exception as error:  # the others go on
        return f"{what}: {type(error).__name__}: {error}"


def main() -> None:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = ("classifiers", "tune", "compare", "sizes", "cost", "metrics")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", nargs="+", choices=steps, default=steps[:-2])
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--epochs", type=int, help="of the dense tasks, other than the published ones")
    parser.add_argument("--minutes", type=float, default=1e6, help="start nothing after so long")
    given = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    until = time.time() + 60 * given.minutes
    tuned = [name for name in TUNED if name in given.sets]
    todo = partial(work, processes=given.processes, until=until)
    run = partial(train, given.epochs)
    if "classifiers" in given.steps:
        todo(partial(run, "classifiers", given.folder, mixer, 0) for mixer in PATTERNS)
    if "tune" in given.steps:
        pairs = [(rate, mixer) for rate in RATES for mixer in ("mhsa", "sepconv")]
        todo(partial(run, name, given.folder, mixer, 0, rate) for name in tuned for rate, mixer in pairs)
        choose_rates(tuned)
    if "compare" in given.steps:
        todo(partial(run, name, given.folder, *each) for name in given.sets for each in runs_of(name))
    if "sizes" in given.steps:
        runs = [(mixer, seed) for mixer in ("mhsa", "ska", "cska") for seed in range(3)]
        todo(partial(sizes, name, given.folder, *each) for name in SIDES if name in given.sets for each in runs)
    if "cost" in given.steps:
        for name in given.sets:
            cost(name, given.folder)
    if "metrics" in given.steps:
        for name in given.sets:
            metrics(name, given.folder)


if __name__ == "__main__":
    main()
