"""Several processes, one a device, share the runs of one comparison."""

import csv
import io
import json
import os
import signal
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from statickey.compare import compare
from statickey.tasks import ClassificationRecipe, Machine, TrainingModule

RECIPE = {"limit": 120, "epochs": 4, "batch_size": 32, "model_args": {"embed_dim": 16, "depth": 1, "num_heads": 2}}


def _compare(out, number, killed):
    torch.set_num_threads(1)
    step = TrainingModule.training_step

    def dies(self, batch, batch_idx):
        if killed and self.current_epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch, batch_idx)

    TrainingModule.training_step = dies
    text = io.StringIO()
    compare(
        ClassificationRecipe(**RECIPE),
        mixers=("mhsa", "ska"),
        seeds=(0, 1),
        out=str(out),
        machine=Machine(accelerator="cpu"),
        console=Console(file=text, width=160),
    )
    (out.parent / f"{number}.txt").write_text(text.getvalue())


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_three_processes_share_the_runs_and_one_is_killed(processes, tmp_path):
    out = tmp_path / "shared"
    children = [processes.Process(target=_compare, args=(out, i, i == 0)) for i in range(3)]
    children[0].start()
    while not list(out.glob("runs/*/*.ckpt")) and children[0].is_alive():  # it is to be killed within a run
        children[0].join(0.02)
    for child in children[1:]:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [-signal.SIGKILL, 0, 0]
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert sorted((row["mixer"], row["seed"]) for row in rows) == [
        (mixer, seed) for mixer in ("mhsa", "ska") for seed in "01"
    ]
    assert (out / "report.html").is_file()
    texts = [(tmp_path / f"{i}.txt").read_text() for i in (1, 2)]
    trained = [text.count("of 360 test images, ") for text in texts]
    assert sum(trained) == 4  # each run once, the killed one's too
    assert all("report: " in text for text in texts)
    _compare(tmp_path / "alone", "alone", killed=False)
    for path in (tmp_path / "alone").glob("runs/*"):  # as one process trains them
        alone, shared = (
            load_file(root / "runs" / path.name / "model.safetensors") for root in (path.parents[1], out)
        )
        assert all(torch.equal(value, shared[name]) for name, value in alone.items())
    curve = json.loads((out / "runs" / "mhsa-seed0" / "run.json").read_text())["curve"]
    assert [row["epoch"] for row in curve] == [1, 2, 3, 4]
