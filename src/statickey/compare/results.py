"""From finished runs on disk to the numbers of the comparison."""

import csv
import io
import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._files import write_json, write_text
from ..data import ImageData
from ..errors import OutputError
from ..tasks import PREDICTIONS_FILE, RESULT_FILE
from .config import CompareConfig
from .statistics import mean_and_std, paired_difference

_ROW_FIELDS = (
    "mixer",
    "seed",
    "accuracy",
    "ema_accuracy",
    "scored_on",
    "scored_images",
    "params",
    "macs",
    "images_per_second",
    "train_seconds",
    "config_hash",
)


@dataclass(frozen=True)
class FinishedRun:
    """One run as it lies on disk."""

    path: Path
    result: dict[str, Any]
    correct: NDArray[np.bool_]
    """Which scored images the last weights got right, (N,)."""

    @property
    def mixer(self) -> str:
        """Name of the mixer."""
        return str(self.result["mixer"])

    @property
    def seed(self) -> int:
        """The run's seed."""
        return int(self.result["seed"])


def read_runs(root: Path, config_hash: str) -> list[FinishedRun]:
    """All finished runs of a comparison, in order of seed.

    Raises:
        OutputError: A run is broken, or saw other data than ``config_hash`` stands for.
    """
    runs = []
    for path in sorted(root.glob(f"runs/*/{RESULT_FILE}")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            with np.load(path.parent / PREDICTIONS_FILE, allow_pickle=False) as arrays:
                correct = arrays["last"] == arrays["truth"]
            found = result["config_hash"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path.parent} is broken ({error}); delete this folder to repeat the run") from error
        if found != config_hash:
            raise OutputError(
                f"{path.parent} was made from other data, or under another configuration "
                f"({found}, now {config_hash}); choose another --out, or delete this folder to repeat the run"
            )
        runs.append(FinishedRun(path.parent, result, correct))
    return sorted(runs, key=lambda run: run.seed)


def summarize(config: CompareConfig, data: ImageData, runs: list[FinishedRun]) -> dict[str, Any]:
    """The comparison in numbers: per mixer means, spreads and the paired difference to the baseline.

    Args:
        config: The comparison, with the mixers of all calls.
        data: Its images.
        runs: All its finished runs.

    Returns:
        Plain values, ready for JSON.
    """
    finished = {run.mixer for run in runs}
    names = [name for name in config.mixers if name in finished]
    baseline = "mhsa" if "mhsa" in names else names[0]
    correct = {n: {run.seed: run.correct for run in runs if run.mixer == n} for n in names}
    rows = []
    for name in names:
        own = [run.result for run in runs if run.mixer == name]
        accuracy = mean_and_std([r["accuracy"] for r in own])
        ema = mean_and_std([r["ema_accuracy"] for r in own])
        difference = None if name == baseline else paired_difference(baseline, correct[baseline], correct[name])
        rows.append(
            {
                "mixer": name,
                "seeds": [r["seed"] for r in own],
                "params": own[0]["params"],
                "macs": own[0]["macs"],
                "images_per_second": statistics.median(r["images_per_second"] for r in own),
                "accuracy_mean": accuracy[0],
                "accuracy_std": accuracy[1],
                "ema_accuracy_mean": ema[0],
                "ema_accuracy_std": ema[1],
                "difference": None if difference is None else asdict(difference) | {"decided": difference.decided},
            }
        )
    first = runs[0].result
    data_name = Path(config.recipe.data).name
    part = "test" if config.score_on == "test" else "held-out training"
    return {
        "title": (
            f"{config.recipe.model} on {data_name}: {first['scored_images']} {part} images, "
            f"{config.recipe.total_epochs} epochs"
        ),
        "reading": (
            f"accuracy: last epoch, mean ± standard deviation over seeds; minus {baseline}: paired difference in "
            "points,\nwith 95 % intervals over seeds (Student's t) and over images (paired bootstrap, seeds fixed)"
        ),
        "baseline": baseline,
        "mixers": rows,
        "data": {
            "name": data_name,
            "train_images": len(data.train.labels),
            "scored_images": first["scored_images"],
            "classes": list(data.class_names),
            "img_size": data.img_size,
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
    text = io.StringIO()
    writer = csv.DictWriter(text, _ROW_FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(run.result for run in runs)
    write_text(root / "results.csv", text.getvalue())
    write_json(root / "summary.json", summary)
