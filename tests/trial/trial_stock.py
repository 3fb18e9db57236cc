"""What cases are made of: a finished run, a comparison, a run under way, and data of each kind."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from image_folders import make_folder, make_parquet, make_shards
from statickey.cli import main

MODEL = '{"depth": 1, "embed_dim": 8, "num_heads": 2}'
TINY = ("--limit", "40", "--epochs", "1", "--model-args", MODEL, "--accelerator", "cpu")
_COMMON = ("--limit", "10", "--epochs", "1", "--batch-size", "4", "--holdout", "0.2", "--accelerator", "cpu")
_NETWORK = ("--model", "small_vit", "--model-args", MODEL)
DENSE = {
    "detect": ("--task", "detect", *_COMMON, *_NETWORK, "--channels", "8", "--img-size", "32", "--anchor-size", "4"),
    "segment": ("--task", "segment", *_COMMON, *_NETWORK, "--decoder-channels", "8", "--crop-size", "32"),
}
"""Options with which a detector or a segmenter is trained in a second."""


@dataclass(frozen=True)
class Stock:
    """Folders that cases read, or copy and damage."""

    run: Path
    comparison: Path
    begun: Path
    folder: Path
    parquet: Path
    shards: Path
    detect: Path
    segment: Path

    @classmethod
    def make(cls, root: Path) -> "Stock":
        """Train what is needed, in a few seconds."""
        stock = cls(*(root / name for name in ("run", "comparison", "begun", "folder", "parquet", "shards", *DENSE)))
        make_folder(stock.folder)
        make_parquet(stock.parquet)
        stock.shards.mkdir()
        make_shards(stock.shards)
        assert main(["train", *TINY, "--out", str(stock.run)]) == 0
        compare = ("compare", *TINY, "--mixers", "ska", "identity", "--seeds", "0")
        assert main([*compare, "--out", str(stock.comparison)]) == 0
        for task, words in DENSE.items():
            assert main(["train", *words, "--out", str(root / task)]) == 0
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("statickey.tasks.engine.score", _interrupt)
            assert main(["train", *TINY, "--out", str(stock.begun)]) == 130
        return stock

    def copy(self, name: str, place: Path) -> Path:
        """A copy of one of the folders."""
        return Path(shutil.copytree(getattr(self, name), place))


def _interrupt(*args: object) -> None:
    raise KeyboardInterrupt
