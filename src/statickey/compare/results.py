"""From finished runs on disk to the numbers of the comparison."""

import statistics
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .._files import explained_read, regular, write_csv, write_json
from ..errors import OutputError
from ..tasks import PREDICTIONS_FILE, RESULT_FILE, Evidence, Task, counted, read_result
from ..tasks.run import check_mixer_source
from .config import CompareConfig, run_name
from .statistics import mean_and_std, paired_differences
from .table import difference_unit

SUMMARY_FILE = "summary.json"
_COSTS = ("params", "macs", "images_per_second", "train_seconds", "config_hash")
_NEEDED = ("config_hash", "mixer", "seed", "scored_images", "curve", "environment", *_COSTS)


@dataclass(frozen=True)
class FinishedRun:
    """One run as it lies on disk."""

    path: Path
    result: dict[str, Any]
    evidence: Evidence
    """What the score of the last weights is made of."""

    @property
    def mixer(self) -> str:
        """Name of the mixer."""
        return str(self.result["mixer"])

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.result["seed"])


def read_runs(task: Task, root: Path, ids: Collection[str]) -> list[FinishedRun]:
    """All finished runs of a comparison, in order of seed.

    Args:
        task: What they learned.
        root: Folder of the comparison.
        ids: Identities of the circumstances they must have been made under.

    Raises:
        OutputError: A run is broken, saw other data or another configuration, or is not named after itself.
    """
    runs = []
    remedy = "delete this folder to repeat the run"
    for path in sorted(place.parent for place in root.glob(f"runs/*/{RESULT_FILE}")):
        result = read_result(path)
        check_mixer_source(path, result)
        with explained_read(path, remedy), np.load(regular(path / PREDICTIONS_FILE), allow_pickle=False) as arrays:
            evidence = task.evidence_from(arrays)
            for key in (*_NEEDED, task.metric.name):
                result[key]
        if result["config_hash"] not in ids:
            raise OutputError(
                f"{path} was made from other data, or under another configuration ({result['config_hash']}, now "
                f"{next(iter(ids))}); choose another --out, or {remedy}"
            )
        if path.name != run_name(str(result["mixer"]), result["seed"]):
            raise OutputError(
                f"{path} holds the run {run_name(str(result['mixer']), result['seed'])}, of which it would count as "
                "another seed; move this folder out of runs/"
            )
        runs.append(FinishedRun(path, result, evidence))
    return sorted(runs, key=lambda run: run.seed)


def summarize(config: CompareConfig, data: Any, runs: list[FinishedRun]) -> dict[str, Any]:
    """The comparison in numbers: per mixer means, spreads and the paired difference to the baseline.

    Args:
        config: The comparison, with the mixers of all calls.
        data: Its images.
        runs: All its finished runs.

    Returns:
        Plain values, ready for JSON.
    """
    metric = config.task.metric
    module = config.task.data_module(config.recipe, data, config.seeds[0])
    finished = {run.mixer for run in runs}
    names = [name for name in config.mixers if name in finished]
    baseline = "mhsa" if "mhsa" in names else names[0]
    evidence = {n: {run.seed: run.evidence for run in runs if run.mixer == n} for n in names}
    differences = paired_differences(baseline, evidence)
    rows = []
    for name in names:
        own = [run.result for run in runs if run.mixer == name]
        difference = differences.get(name)
        row = {
            "mixer": name,
            "seeds": [r["seed"] for r in own],
            "params": own[0]["params"],
            "macs": own[0]["macs"],
            "images_per_second": statistics.median(row["images_per_second"] for r in own for row in r["curve"]),
        }
        for key in (metric.name, f"ema_{metric.name}"):
            row[f"{key}_mean"], row[f"{key}_std"] = mean_and_std([r[key] for r in own])
        found = None if difference is None else asdict(difference) | {"decided": difference.decided}
        rows.append(row | {"difference": found})
    first = runs[0].result
    data_name = Path(config.recipe.data).name
    part = "test" if config.score_on == "test" else "held-out training"
    return {
        "title": (
            f"{config.recipe.model} on {data_name}: {counted(first['scored_images'], f'{part} image')}, "
            f"{counted(config.recipe.total_epochs, 'epoch')}"
        ),
        "reading": (
            f"{metric.label}: last epoch, mean ± standard deviation over seeds; minus {baseline}: paired difference "
            f"in {difference_unit(metric)};\n95 %: its interval by seeds and images jointly, by seeds alone "
            "(Student's t), by images alone (bootstrap);\np: of the joint interval, by Holm over the mixers of the "
            "table; train img/s: median over all epochs of all runs"
        ),
        "metric": asdict(metric),
        "baseline": baseline,
        "mixers": rows,
        "data": {
            "name": data_name,
            "train_images": len(module.train_images) + len(module.val_images),
            "scored_images": first["scored_images"],
            "classes": list(data.class_names),
            "img_size": config.task.input_size(config.recipe, data)[1],
            "skipped": list(data.skipped),
        },
        "config": config.to_dict(),
        "config_hash": first["config_hash"],
        "environments": _distinct([run.result["environment"] for run in runs]),
    }


def _distinct(values: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [value for i, value in enumerate(values) if value not in values[:i]]


def write_results(root: Path, summary: dict[str, Any], runs: list[FinishedRun]) -> None:
    """Write ``summary.json`` and ``results.csv``, one row a run."""
    name = summary["metric"]["name"]
    fields = ("mixer", "seed", name, f"ema_{name}", "scored_on", "scored_images", *_COSTS)
    write_csv(root / "results.csv", fields, (run.result for run in runs))
    write_json(root / SUMMARY_FILE, summary)
