"""Folders that version 0.1 wrote stay readable, and what it left unfinished is finished."""

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from statickey.compare import compare
from statickey.errors import OutputError
from statickey.tasks import ClassificationRecipe, Machine, evaluate

STORED = Path(__file__).parents[1] / "stored" / "compare_0_1"
RECIPE = {
    "epochs": 2,
    "limit": 120,
    "batch_size": 54,
    "model_args": {"depth": 1, "embed_dim": 8, "num_heads": 2, "mlp_ratio": 1.0},
}


@pytest.fixture
def stored(tmp_path):
    return Path(shutil.copytree(STORED, tmp_path / "out"))


def run(out, seeds=(0, 1), **recipe):
    text = io.StringIO()
    summary = compare(
        ClassificationRecipe(**RECIPE | recipe),
        mixers=("mhsa", "ska"),
        seeds=seeds,
        out=str(out),
        machine=Machine(accelerator="cpu"),
        console=Console(file=text, width=160),
    )
    return summary, text.getvalue()


def test_finished_runs_are_reused_and_the_interrupted_one_goes_on(stored):
    begun = torch.load(stored / "runs" / "mhsa-seed1" / "epoch00000.ckpt", weights_only=True)
    before = {p: p.read_bytes() for p in stored.glob("runs/*-seed0/*")}
    assert len(before) == 10
    summary, text = run(stored)
    assert "2 of 4 runs are finished already: reused" in text
    assert all(path.read_bytes() == content for path, content in before.items())
    continued = json.loads((stored / "runs" / "mhsa-seed1" / "run.json").read_text())
    assert continued["curve"][0] == begun["curve"][0]
    assert len(continued["curve"]) == 2
    assert [row["seeds"] for row in summary["mixers"]] == [[0, 1], [0, 1]]


def test_another_recipe_is_refused_with_the_difference(stored):
    with pytest.raises(OutputError, match=r"another configuration \(epochs: 2 there, 3 here\); choose another --out"):
        run(stored, epochs=3)


def test_a_finished_run_is_scored_as_it_was(stored):
    folder = stored / "runs" / "ska-seed0"
    wanted = json.loads((folder / "run.json").read_text())
    for ema, name in ((False, "accuracy"), (True, "ema_accuracy")):
        found = evaluate(str(folder), ema=ema, accelerator="cpu", console=Console(file=io.StringIO()))
        assert found["top1"] == pytest.approx(wanted[name])
