"""Is attention with a static key the better second stage on dense tasks, too?

    python benchmarks/dense.py classifiers PATH_TO_CIFAR10_PARQUET   # what the detectors and segmenters start from
    python benchmarks/dense.py tune SET PATH                         # on held-out images, for sepconv and mhsa
    python benchmarks/dense.py SET PATH                              # the comparison
    python benchmarks/dense.py sizes RUN [SIDE ...]                  # a run's score at other sizes of image

SET is ``bccd``, ``bccd-cascade``, ``pennfudan``, ``camvid``, ``camvid-scratch`` or ``camvid-stage3``. Each may be run
by several processes at once, and again: finished runs are reused. Results: ``runs/dense/SET`` with its report.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from statickey import set_off_grid
from statickey._typing import OffGrid
from statickey.compare import compare
from statickey.tasks import (
    ClassificationRecipe,
    DetectionRecipe,
    Recipe,
    SegmentationRecipe,
    load_model,
    read_result,
    task_named,
)
from statickey.tasks.scoring import score

OUT = Path("runs/dense")
CLASSIFIERS = OUT / "classifiers"
PATTERNS = ["mhsa", "sepconv", "ska", "cska", "fcska", "ska:key=continuous", "ska:key_size=[7,7]"]
"""What stands in the second of four stages; the first has convolutions, the last two self-attention."""
REPEATED = ["mhsa", "sepconv", "ska", "cska", "ska:key=continuous"]
"""Those with three seeds on bccd and camvid."""
STAGE3 = ["sepconv", "sepconv", "X", "mhsa"]
RATES = (5e-4, 1e-3, 2e-3)
SIDES = (64, 80, 112, 160, 224)


def classifier(data: str) -> ClassificationRecipe:
    """CIFAR-10 at 64 pixels: a second stage of 8x8 tokens."""
    return ClassificationRecipe(
        data=data, limit=20_000, model="skaformer_nano", img_size=64, epochs=4, batch_size=64, lr=0.002
    )


def recipe(name: str, data: str) -> Recipe:
    """What is trained on a set; its learning rate and length were tuned on held-out images, see ``tune``."""
    weights = None if name.endswith(("-scratch", "-stage3")) else str(CLASSIFIERS)
    if name.startswith("camvid"):
        return SegmentationRecipe(
            data=data,
            weights=weights,
            img_size=180,
            crop_size=160,
            epochs=8,
            batch_size=8,
            lr=1e-3,
            model_args={"mixers": STAGE3} if name.endswith("-stage3") else {},
        )
    arch = {"bccd": "faster_rcnn", "bccd-cascade": "cascade_rcnn", "pennfudan": "mask_rcnn"}[name]
    return DetectionRecipe(
        data=data,
        weights=weights,
        arch=arch,
        img_size=144,
        max_size=240,
        epochs=8,
        batch_size=8,
        lr=2e-3,
    )


def main(name: str, data: str) -> None:
    """The comparison of a set: every pattern at seed 0, some of them at two more."""
    out = str(OUT / name)
    of_set = recipe(name, data)
    if name in ("bccd", "camvid"):
        compare(of_set, mixers=REPEATED, seeds=(0, 1, 2), out=out)
    compare(of_set, mixers=["mhsa", "sepconv"] if name.endswith("-scratch") else PATTERNS, seeds=(0,), out=out)


def tune(name: str, data: str) -> None:
    """Learning rates, on held-out images of the training part."""
    for rate in RATES:
        of_set = replace(recipe(name, data), lr=rate)
        compare(
            of_set, mixers=["mhsa", "sepconv"], seeds=(0,), out=str(OUT / f"tune-{name}-{rate:g}"), score_on="holdout"
        )


def sizes(run: str, sides: Sequence[int]) -> None:
    """The score on test images of other sizes than in training, by what static keys do there."""
    result = read_result(Path(run))
    task = task_named(result["task"])
    print("| shorter side |", " | ".join(map(str, sides)), "|")
    for off_grid in get_args(OffGrid):
        found = []
        for side in sides:
            model, _ = load_model(run, img_size=side)
            set_off_grid(model, off_grid)
            settings = task.recipe_class(data=result["data"], img_size=side)
            module = task.data_module(settings, task.read_data(settings), 0)
            evidence = score(task, model, module, module.scoring_dataloader("test"), "32-true")
            found.append(f"{evidence.value():.1f}")
        print(f"| {off_grid} |", " | ".join(found), "|", flush=True)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["classifiers", data]:
            compare(classifier(data), mixers=PATTERNS, seeds=(0,), out=str(CLASSIFIERS))
        case ["tune", name, data]:
            tune(name, data)
        case ["sizes", run, *sides]:
            sizes(run, [int(side) for side in sides] or SIDES)
        case [name, data]:
            main(name, data)
        case _:
            sys.exit(__doc__)
