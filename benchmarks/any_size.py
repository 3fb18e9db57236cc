"""What is a static key worth at sizes it was not trained at?

    python benchmarks/any_size.py PATH_TO_CIFAR10_PARQUET          # the comparison at 32 pixels
    python benchmarks/any_size.py PATH_TO_CIFAR10_PARQUET sizes    # then: its networks at other sizes

The first may be run by several processes at once, and again: finished runs are reused. The second resizes the test
images (bicubic), has timm resample the position embedding of every network alike, and gives the keys in each way that
there is. Results: ``runs/any-size`` with its report, ``sizes.json`` and ``sizes.png`` in it.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from statickey.compare import compare, paired_differences
from statickey.convert import token_mixers
from statickey.data import ImageDataModule
from statickey.layers import StaticKeyAttention
from statickey.models import build_model, load_exactly
from statickey.tasks import ClassificationRecipe
from statickey.tasks.accuracy import Accuracy
from statickey.tasks.classification import Classification
from statickey.viz.figures import STYLE, colours

MIXERS = [
    "mhsa",
    "ska",
    "ska:key=continuous",
    "ska:key_size=[4,4]",
    "ska:key=continuous,key_size=[4,4]",
    "kv_shared",
    "fcska",
    "cska",
    "cska:key=continuous",
]
SEEDS, OUT = (0, 1, 2), Path("runs/any-size")
SIZES = (24, 28, 32, 40, 48, 64)
IMAGES = 4_000
"""Test images, the first ones, that are scored at all sizes; their order in the file is random."""
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "mhsa": ("mhsa", {}),
    "grid keys, resampled": ("ska", {}),
    "grid keys, in windows": ("ska", {"off_grid": "window"}),
    "grid keys, values pooled": ("ska", {"key_size": (8, 8)}),
    "continuous keys": ("ska:key=continuous", {}),
    "continuous keys, values pooled": ("ska:key=continuous", {"key_size": (8, 8)}),
    "4x4 keys, values pooled": ("ska:key_size=[4,4]", {"key_size": (4, 4)}),
    "continuous 4x4 keys, values pooled": ("ska:key=continuous,key_size=[4,4]", {"key_size": (4, 4)}),
}
"""For each way, whose networks, and what is set on their layers."""


def recipe(data: str) -> ClassificationRecipe:
    """The recipe ``cifar10-cpu``."""
    return ClassificationRecipe(data=data, limit=20_000, model="small_vit", epochs=12, batch_size=64, lr=0.001)


def network(mixer: str, seed: int, settings: dict[str, Any]) -> Any:
    """A trained network that runs on any size."""
    model = build_model("small_vit", mixer, img_size=32, num_classes=10, model_args={"dynamic_img_size": True})
    folder = next(path for path in OUT.glob("runs/*") if _is_of(path, mixer, seed))
    load_exactly(model, folder / "model.safetensors")
    for layer in token_mixers(model).values():
        if isinstance(layer, StaticKeyAttention) and "key_size" in settings:
            layer.set_key_size(settings["key_size"])
        if isinstance(layer, StaticKeyAttention) and "off_grid" in settings:
            layer.set_off_grid(settings["off_grid"])
    return model.eval()


def _is_of(folder: Path, mixer: str, seed: int) -> bool:
    result = folder / "run.json"
    if not result.is_file():
        return False
    run = json.loads(result.read_text())
    return (run["mixer"], run["seed"]) == (mixer, seed)


@torch.no_grad()
def predictions(model: Any, images: Tensor, size: int) -> Tensor:
    """Classes of normalised images, resized."""
    said = []
    for part in images.split(250):
        resized = (
            part if size == part.shape[-1] else F.interpolate(part, (size, size), mode="bicubic", antialias=True)
        )
        said.append(model(resized).argmax(1))
    return torch.cat(said)


def sizes(data: str) -> None:
    """Score the networks of the comparison at all sizes."""
    module = ImageDataModule(Classification().read_data(recipe(data)), batch_size=64)
    test = module.data.test
    images, truth = module.normalize(test.images[:IMAGES]), test.labels[:IMAGES].numpy()
    evidence: dict[int, dict[str, dict[int, Accuracy]]] = {size: {} for size in SIZES}
    for way, (mixer, settings) in WAYS.items():
        for seed in SEEDS:
            model = network(mixer, seed, settings)
            for size in SIZES:
                said = predictions(model, images, size).numpy()
                evidence[size].setdefault(way, {})[seed] = Accuracy(said, truth)
            print(way, seed, *(f"{evidence[size][way][seed].value():.2f}" for size in SIZES), flush=True)
    rows = []
    for size, of_size in evidence.items():
        differences = paired_differences("mhsa", of_size)
        for way, of_way in of_size.items():
            values = [found.value() for found in of_way.values()]
            row = {"size": size, "way": way, "mean": np.mean(values), "std": np.std(values, ddof=1)}
            if way in differences:
                d = differences[way]
                row |= {"minus mhsa": d.mean, "interval": d.interval, "p": d.adjusted_p, "decided": d.decided}
            rows.append(row)
    (OUT / "sizes.json").write_text(json.dumps(rows, indent=2, default=float))
    for way in WAYS:
        cells = [row for row in rows if row["way"] == way]
        print("|", " | ".join([way, *(f"{c['mean']:.2f} ± {c['std']:.2f}{_verdict(c)}" for c in cells)]), "|")
    draw(rows).savefig(OUT / "sizes.png", dpi=160)


def _verdict(row: dict[str, Any]) -> str:
    return "" if not row.get("decided") else (" ▲" if row["minus mhsa"] > 0 else " ▼")


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Accuracy against the size of the test images, a line per way."""
    shades = colours(list(WAYS))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 4), layout="constrained")
        axes = figure.subplots()
        for way in WAYS:
            cells = [row for row in rows if row["way"] == way]
            x, mean, std = ([cell[name] for cell in cells] for name in ("size", "mean", "std"))
            axes.errorbar(x, mean, yerr=std, fmt="o-", color=shades[way], label=way, capsize=2, linewidth=1.6)
        axes.axvline(32, color="#9aa5b1", linewidth=1, linestyle=":")
        axes.set_xticks(SIZES)
        axes.set_xlabel("side of the test images, pixels (trained at 32)")
        axes.set_title("test accuracy, %")
        axes.grid(axis="y")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


if __name__ == "__main__":
    if sys.argv[2:] == ["sizes"]:
        sizes(sys.argv[1])
    else:
        compare(recipe(sys.argv[1]), mixers=MIXERS, seeds=SEEDS, out=str(OUT))
