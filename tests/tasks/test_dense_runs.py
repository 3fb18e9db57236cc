"""Runs of dense tasks that are killed, or shared by two processes, end as one process trains them."""

import io
import json
import os
import random
import signal
import socket
import sys
import threading
import time

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from statickey.data import scenes
from statickey.tasks import DetectionRecipe, Machine, SegmentationRecipe, TrainingModule, engine, train

COMMON = {
    "model": "small_vit",
    "model_args": {"depth": 1, "embed_dim": 16, "num_heads": 2},
    "limit": 10,
    "batch_size": 4,
    "holdout": 0.2,
}
RECIPES = {  # the former's images are padded to 32 or to 64 pixels
    "detect": (DetectionRecipe, {"channels": 8, "img_size": 28, "max_size": 64, "train_size": 32, "anchor_size": 4}),
    "segment": (SegmentationRecipe, {"decoder": "upernet", "decoder_channels": 16, "crop_size": 32, "img_size": 32}),
}
LOSSES = {"detect": {}, "segment": {"loss": ("cross_entropy", "dice")}}
MOMENTS = {
    "step": (TrainingModule, "training_step"),
    "validation": (TrainingModule, "validation_step"),
    "write": (os, "fsync"),
    "score": (engine, "score"),
}
"""What goes on when a run is killed; the finished file is moved into place after its ``fsync``."""
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="neither SIGKILL nor gloo there")


def _train(task, out, kill=None, rank=None, port=None, epochs=3):
    torch.set_num_threads(1)
    scenes.TEST_SCENES = 5
    if kill is not None:
        _kill_at(*kill)
    if rank is not None:  # as torchrun starts one of two processes
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
        os.environ.update({k: str(v) for k, v in (ranks | {"MASTER_PORT": port}).items()})
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_RUN_ID": "test"}
    cls, settings = RECIPES[task]
    train(
        cls(**COMMON | settings | LOSSES[task] | {"epochs": epochs}),
        mixer="ska",
        out=str(out),
        machine=Machine(accelerator="cpu", devices=1 if rank is None else 2),
        console=Console(file=io.StringIO()),
    )


def _kill_at(moment, occurrence, delay):
    """Kill this process so many seconds after something begins for the so-manieth time."""
    place, name = MOMENTS[moment]
    function, calls = getattr(place, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == occurrence:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        result = function(*args, **kwargs)
        if moment == "write" and len(calls) == occurrence:
            time.sleep(0.01)  # about as likely before the file is in place as after
        return result

    setattr(place, name, counted)


def ended(processes, *args):
    child = processes.Process(target=_train, args=args)
    child.start()
    child.join(120)
    return child.exitcode


@pytest.fixture(scope="module")
def whole(processes, tmp_path_factory):
    """Folders of runs that nothing disturbed, by task."""
    folders = {task: tmp_path_factory.mktemp(task) for task in RECIPES}
    assert [ended(processes, task, folder) for task, folder in folders.items()] == [0] * len(folders)
    return folders


def losses(folder):
    curve = json.loads((folder / "run.json").read_text())["curve"]
    return [[v for k, v in row.items() if k.startswith(("train_", "holdout_"))] for row in curve]


def weights(folder):
    names = ("model.safetensors", "model_ema.safetensors")
    return {f"{name}: {k}": v for name in names for k, v in load_file(folder / name).items()}


def killed_run_ends_in_the_same_bits(processes, task, moments, whole, folder, epochs=3):
    draws = random.Random(task)
    for moment in moments:
        most = {"step": 4, "validation": 2, "write": 4, "score": 2}[moment]
        kill = moment, draws.randint(1, most), draws.uniform(0, 0.02)
        assert ended(processes, task, folder, kill, None, None, epochs) == -signal.SIGKILL, kill
    assert ended(processes, task, folder, None, None, None, epochs) == 0
    before, after = weights(whole), weights(folder)
    assert before.keys() == after.keys()
    assert [name for name in before if not before[name].equal(after[name])] == []
    assert losses(whole) == losses(folder)


@pytest.mark.parametrize(
    ("task", "moments"), [("detect", ("step", "write", "score")), ("segment", ("validation", "score"))]
)
def test_killed_run_ends_in_the_same_bits(processes, task, moments, whole, tmp_path):
    killed_run_ends_in_the_same_bits(processes, task, moments, whole[task], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("task", RECIPES)
def test_run_killed_ten_times_ends_in_the_same_bits(processes, task, tmp_path):
    moments = ("write", "step", "validation", "step", "write", "validation", "step", "write", "score", "score")
    assert ended(processes, task, tmp_path / "whole", None, None, None, 24) == 0
    killed_run_ends_in_the_same_bits(processes, task, moments, tmp_path / "whole", tmp_path / "killed", 24)


@pytest.mark.parametrize("task", RECIPES)
def test_two_processes_train_as_one(processes, task, whole, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [processes.Process(target=_train, args=(task, tmp_path, None, rank, port)) for rank in (0, 1)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]
    np.testing.assert_allclose(losses(tmp_path), losses(whole[task]), rtol=1e-4, atol=1e-6)
    one, two = weights(whole[task]), weights(tmp_path)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")
    assert json.loads((tmp_path / "run.json").read_text())["scored_images"] == 5
