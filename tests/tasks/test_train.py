import csv
import errno
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file, save_file
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from image_folders import make_folder
from statickey.convert import token_mixers
from statickey.data import ImageData, LabelledImages
from statickey.errors import DataError, OutputError, StaticKeyError
from statickey.models import build_model
from statickey.tasks import (
    AtomicCheckpointIO,
    Classification,
    ClassificationRecipe,
    Machine,
    TrainingModule,
    evaluate,
    load_model,
    replay,
    train,
)
from statickey.tasks.checkpoint import check_whole
from statickey.tasks.recipe import identities
from statickey.tasks.start import start_file

TINY = {
    "limit": 120,
    "epochs": 3,
    "batch_size": 32,
    "model_args": {"embed_dim": 16, "depth": 2, "num_heads": 2, "drop_path_rate": 0.2},
}
FULL = {"mixup": 0.2, "auto_augment": "rand-m5-n1", "flip": True, "crop_padding": 1, "grad_accum_steps": 2}
CPU = Machine(accelerator="cpu")


def run(out, *, mixer="ska", machine=CPU, seed=0, score_on="test", resume="auto", **recipe):
    text = io.StringIO()
    result = train(
        ClassificationRecipe(**TINY | recipe),
        mixer=mixer,
        seed=seed,
        out=str(out),
        machine=machine,
        score_on=score_on,
        resume=resume,
        console=Console(file=text, width=100),
    )
    return result, text.getvalue()


def weights(out):
    return {which: load_file(Path(out) / f"{which}.safetensors") for which in ("model", "model_ema")}


def assert_same_weights(first, second):
    for which, tensors in weights(first).items():
        other = weights(second)[which]
        assert tensors.keys() == other.keys()
        for name, value in tensors.items():
            assert torch.equal(value, other[name]), (which, name)


def test_a_run_leaves_what_it_says(tmp_path):
    result, text = run(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text()) == json.loads(json.dumps(result))
    rows = list(csv.DictReader((tmp_path / "curve.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert float(rows[-1]["train_loss"]) == pytest.approx(result["curve"][-1]["train_loss"])
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert not list(tmp_path.glob("*.ckpt"))
    assert "epoch 2/3" in text
    assert "360 test images" in text
    assert "small_vit with ska on digits" in text
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert (config["mixer"], config["epochs"], config["accelerator"]) == ("ska", 3, "cpu")
    before = (tmp_path / "run.json").stat().st_mtime_ns
    again, text = run(tmp_path)
    assert "finished already" in text
    assert again["accuracy"] == result["accuracy"]
    assert (tmp_path / "run.json").stat().st_mtime_ns == before


def test_saved_weights_are_the_scored_ones(tmp_path):
    result, _ = run(tmp_path)
    for ema, name in ((False, "accuracy"), (True, "ema_accuracy")):
        found = evaluate(str(tmp_path), ema=ema, accelerator="cpu", console=Console(file=io.StringIO()))
        assert found["top1"] == pytest.approx(result[name])


def test_own_names_load_with_timm(tmp_path):
    run(tmp_path, model="skaformer_nano", mixer="cska", model_args={}, epochs=1)
    ours, card = load_model(tmp_path)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1).eval()
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(ours(x), theirs(x))
    assert card.class_names == tuple("0123456789")
    assert tuple(theirs.pretrained_cfg["mean"]) == card.mean


def test_an_interrupted_run_is_told_from_a_folder_without_one(tmp_path, monkeypatch):
    interrupted(tmp_path / "run", monkeypatch, epoch=1, epochs=2)
    with pytest.raises(OutputError, match="run holds an interrupted run; the same command that began it finishes it"):
        load_model(tmp_path / "run")
    with pytest.raises(OutputError, match=r"holds no model.safetensors; give the folder of a finished run"):
        load_model(tmp_path)


def test_out_is_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot write .*file: .*; a file is where a folder should be; choose an"):
        run(tmp_path / "file", epochs=1)
    with pytest.raises(OutputError, match="out='' must name a folder"):
        run("", epochs=1)


def test_another_configuration_is_refused_with_the_difference(tmp_path):
    run(tmp_path, epochs=1)
    with pytest.raises(OutputError, match=r"another configuration \(epochs: 1 there, 2 here; lr: None there, 0.01"):
        run(tmp_path, epochs=2, lr=0.01)
    with pytest.raises(OutputError, match="holds a run and resume is 'never'"):
        run(tmp_path, epochs=1, resume="never")


@pytest.mark.parametrize(
    "options",
    [
        {"opt": "lamb", "layer_decay": 0.8, "cooldown_epochs": 1, "min_lr": 1e-5, "warmup_lr": 1e-6},
        {"opt": "sgd", "lr": 0.01, "clip_grad": 0.0, "ema_decay": 0.0, "fp32_logits": True},
        {"precision": "bf16-mixed", "random_erasing": 0.5, "cutmix": 1.0},
        {"model": "vit_tiny_patch16_224", "mixer": None, "model_args": {"depth": 1, "patch_size": 4}},
        {"model": "skaformer_nano", "mixer": "ska", "model_args": {}, "img_size": 32, "limit": 20, "batch_size": 9},
    ],
    ids=["lamb", "sgd", "bf16", "timm", "former"],
)
def test_options_train(tmp_path, options):
    result, _ = run(tmp_path, **{"epochs": 1} | options)
    assert len(result["curve"]) == 1 + options.get("cooldown_epochs", 0)
    assert result["curve"][0]["train_loss"] > 0
    if options.get("fp32_logits"):
        assert result["backend"] == ["math"]


@pytest.mark.slow
def test_compiled_and_channels_last_train(tmp_path):
    machine = Machine(accelerator="cpu", compile=True, channels_last=True)
    result, _ = run(
        tmp_path, mixer="cska", machine=machine, epochs=1, limit=64, model_args={"embed_dim": 16, "depth": 1}
    )
    assert result["environment"]["compiled"]


def test_weights_to_start_from(tmp_path):
    run(tmp_path / "first", epochs=1)
    run(tmp_path / "second", epochs=1, weights=str(tmp_path / "first" / "model.safetensors"), lr=1e-9)
    first, second = (weights(tmp_path / name)["model"] for name in ("first", "second"))
    torch.testing.assert_close(first["blocks.0.attn.static_key"], second["blocks.0.attn.static_key"])
    (tmp_path / "text.safetensors").write_text("these are not weights")
    with pytest.raises(OutputError, match=r"text.safetensors: not a safetensors file \(.*timm checkpoint"):
        run(tmp_path / "third", weights=str(tmp_path / "text.safetensors"))
    with pytest.raises(OutputError, match="no weights file 'nowhere'"):
        run(tmp_path / "third", weights="nowhere")
    assert not (tmp_path / "third").exists()


def test_a_run_or_a_comparison_to_start_from(tmp_path):
    for mixer, seed in (("ska", 0), ("ska", 3), ("fcska", 3)):
        model = build_model("small_vit", mixer, img_size=8, num_classes=10, in_chans=1, seed=seed)
        folder = tmp_path / "comparison" / "runs" / f"{mixer}-{seed}"
        folder.mkdir(parents=True)
        save_file(model.state_dict(), folder / "model.safetensors")
        (folder / "run.json").write_text(json.dumps({"mixer": mixer, "seed": seed}))
    comparison = str(tmp_path / "comparison")
    for mixer, seed, expected in (("ska", 3, "ska-3"), ("ska", 7, "ska-0"), ("fcska", 0, "fcska-3")):
        assert start_file(comparison, mixer, seed).parent.name == expected
    assert start_file(str(folder), "mhsa", 0) == folder / "model.safetensors"
    with pytest.raises(StaticKeyError, match="no finished run of cska, but of fcska, ska; train it there first"):
        start_file(comparison, "cska", 0)
    with pytest.raises(StaticKeyError, match="neither a run's folder nor a comparison's"):
        start_file(str(tmp_path), "ska", 0)
    before = identities(ClassificationRecipe(weights=comparison), "classify", "", {})
    save_file({"other": torch.zeros(1)}, folder / "model.safetensors")
    assert identities(ClassificationRecipe(weights=comparison), "classify", "", {}) != before


def test_layer_decay_slows_the_lower_layers(tmp_path, monkeypatch):
    made = {}
    configure = TrainingModule.configure_optimizers

    def spy(self):
        out = configure(self)
        made.update(rates={group["initial_lr"] for group in out["optimizer"].param_groups})
        return out

    monkeypatch.setattr(TrainingModule, "configure_optimizers", spy)
    run(tmp_path, epochs=1, layer_decay=0.5, lr=1e-3)
    assert max(made["rates"]) == pytest.approx(1e-3)
    assert min(made["rates"]) == pytest.approx(1e-3 * 0.5 ** (len(made["rates"]) - 1))
    assert len(made["rates"]) > 2


def test_accumulated_steps_train_as_whole_ones(tmp_path):
    args = TINY["model_args"] | {"drop_path_rate": 0.0}
    whole, _ = run(tmp_path / "whole", model_args=args)
    parts, _ = run(tmp_path / "parts", model_args=args, grad_accum_steps=4)
    curves = [[row["train_loss"] for row in result["curve"]] for result in (whole, parts)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


WRONG = {
    "mixer": ({"mixer": "skaa"}, "unknown mixer 'skaa'; did you mean"),
    "optimizer": ({"opt": "adamq"}, "unknown opt 'adamq'; did you mean"),
    "policy": ({"auto_augment": "rand-x"}, "rand-x"),
    "mean": ({"mean": (0.5, 0.5, 0.5), "std": (1.0, 1.0, 1.0)}, "has 3 numbers for images of 1 channels"),
    "accumulation": ({"grad_accum_steps": 5}, "grad_accum_steps=5 does not divide batch_size=32"),
    "accelerator": ({"machine": Machine(accelerator="cuda")}, "accelerator='cuda' is not available here"),
    "strategy": ({"machine": {"strategy": "deepspeed"}}, "strategy='deepspeed' must be 'auto', 'ddp' or 'fsdp'"),
    "channels_last shards": (
        {"machine": {"strategy": "fsdp", "channels_last": True}},
        "strategy='fsdp' keeps weights contiguous; leave out channels_last",
    ),
    "workers": ({"machine": {"num_workers": -1}}, "num_workers=-1 must not be negative"),
    "world": ({"machine": Machine(accelerator="cpu", devices=3)}, "does not divide into 3 processes x 1"),
    "odd": ({"batch_size": 9, "mixup": 0.2}, "mixup pairs images, but 9 are computed at once"),
    "precision": ({"precision": "bf16-true"}, "precision='bf16-true' must be one of auto, 32-true"),
    "warm-up": ({"warmup_epochs": 4.0}, "warmup_epochs=4.0 must not exceed epochs=3"),
    "stream": ({"stream": True, "limit": None}, "digits are small and in memory; leave out --stream"),
    "seed": ({"seed": -1}, "seed=-1 must be a whole number from 0"),
    "layer decay": ({"layer_decay": 1.5}, r"layer_decay=1.5 must be in \(0, 1\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses_and_writes_nothing(tmp_path, case):
    options, message = WRONG[case]
    if case == "accelerator" and torch.cuda.is_available():
        pytest.skip("has CUDA")
    with pytest.raises(StaticKeyError, match=message):
        if isinstance(options.get("machine"), dict):
            options = {"machine": Machine(**options["machine"])}
        run(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_refused_start_leaves_a_folder_that_can_be_used(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules["statickey.tasks.train"], "train_run", _refuses)
        with pytest.raises(StaticKeyError, match="refused"):
            run(tmp_path, epochs=2)
    assert (tmp_path / "config.yaml").is_file()
    result, _ = run(tmp_path, epochs=1)
    assert len(result["curve"]) == 1


def _refuses(*args):
    raise StaticKeyError("refused")


def test_a_finished_run_on_other_data_is_refused(tmp_path):
    first, second = (make_folder(tmp_path / name, per_class=n) for name, n in (("a", 8), ("b", 9)))
    options = {"limit": None, "epochs": 1, "batch_size": 4, "holdout": 0.2}
    run(tmp_path / "out", data=str(first), **options)
    with pytest.raises(OutputError, match="holds a finished run on other data"):
        run(tmp_path / "out", data=str(second), **options)
    first.rename(tmp_path / "moved")
    _, text = run(tmp_path / "out", data=str(tmp_path / "moved"), **options)
    assert "finished already" in text


def test_a_finished_run_that_is_not_whole_is_no_finished_run(tmp_path):
    run(tmp_path, epochs=1)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(OutputError, match=r"model.safetensors is missing or torn .*; delete this folder to repeat"):
        run(tmp_path, epochs=1)
    path.unlink()
    with pytest.raises(OutputError, match=r"model.safetensors is missing or torn"):
        run(tmp_path, epochs=1)
    path.write_bytes(content)
    (tmp_path / "run.json").write_text('{"accuracy": 100}')
    with pytest.raises(OutputError, match=r"is broken \(it has no 'config_hash'\)"):
        run(tmp_path, epochs=1)


def test_a_run_from_a_run_knows_its_mixer(tmp_path):
    run(tmp_path / "first", epochs=1, mixer="cska:kernel_size=5@-1")
    again = f"local-dir:{tmp_path / 'first'}"
    run(tmp_path / "second", epochs=1, mixer=None, model=again, model_args={"pretrained": True})
    model, card = load_model(tmp_path / "second")
    assert card.mixer == "cska:kernel_size=5@-1"
    assert card.architecture == "small_vit"
    assert [mixer.kernel_size for mixer in token_mixers(model).values()] == [5]
    with pytest.raises(OutputError, match="on other data or under another configuration"):
        weights_of = tmp_path / "first" / "model.safetensors"
        state = load_file(weights_of)
        save_file(
            {name: value + 1 if value.is_floating_point() else value for name, value in state.items()}, weights_of
        )
        run(tmp_path / "second", epochs=1, mixer=None, model=again, model_args={"pretrained": True})


def test_weights_may_lie_elsewhere(tmp_path):
    run(tmp_path / "first", epochs=1)
    (tmp_path / "first" / "model.safetensors").rename(tmp_path / "a.safetensors")
    run(tmp_path / "out", epochs=1, weights=str(tmp_path / "a.safetensors"))
    (tmp_path / "a.safetensors").rename(tmp_path / "b.safetensors")
    _, text = run(tmp_path / "out", epochs=1, weights=str(tmp_path / "b.safetensors"))
    assert "finished already" in text


def test_min_lr_above_the_peak_that_the_data_choose(tmp_path):
    with pytest.raises(StaticKeyError, match=r"min_lr=10.0 must not exceed the peak, lr=0.003"):
        run(tmp_path / "out", min_lr=10.0)
    assert not (tmp_path / "out").exists()


def test_a_launcher_with_more_processes_than_devices(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(StaticKeyError, match="the launcher started 4 processes, devices=1"):
        run(tmp_path / "out")


def test_a_loader_worker_that_dies_is_named(tmp_path, monkeypatch):
    images = torch.zeros(40, 1, 8, 8, dtype=torch.uint8)
    part = LabelledImages(images, torch.arange(40) % 2)
    data = ImageData("dead", part, part, ("a", "b"), 0, False)
    monkeypatch.setattr("statickey.tasks.classification.load_images", lambda *args, **kwargs: data)
    monkeypatch.setattr("statickey.data.module.MemoryImages.__getitem__", _dies)
    with pytest.raises(
        DataError, match=r"^DataLoader worker .*; out of memory\? .* the same command goes on where it stopped$"
    ):
        run(tmp_path, machine=Machine(accelerator="cpu", num_workers=1), limit=None)


def _dies(self, plan):
    os.kill(os.getpid(), signal.SIGKILL)


def _train_in_child(out, recipe):
    torch.set_num_threads(1)
    run(out, **recipe)


def kill_until_done(processes, out, recipe, kills, generator):
    """Kill runs with SIGKILL at random moments, then let one finish; the number of kills that hit."""
    hits = 0
    while True:
        child = processes.Process(target=_train_in_child, args=(out, recipe))
        child.start()
        if hits < kills:
            # from before the first epoch's end to well into the next ones, wherever the earlier run got to
            seen = len(list(out.glob("*.ckpt"))) if out.is_dir() else 0
            deadline = time.monotonic() + 60
            while child.is_alive() and time.monotonic() < deadline and not (out / ".lock").exists():
                time.sleep(0.01)
            time.sleep(torch.rand((), generator=generator).item() * (0.6 if seen else 1.2))
            if child.is_alive():
                os.kill(child.pid, signal.SIGKILL)
                hits += 1
        child.join(120)
        assert child.exitcode is not None
        if child.exitcode == 0:
            return hits
        assert child.exitcode == -signal.SIGKILL


def killed_run_ends_in_the_same_bits(processes, tmp_path, kills):
    recipe = FULL | {"epochs": 40}
    run(tmp_path / "whole", **recipe)
    hits = kill_until_done(processes, tmp_path / "killed", recipe, kills, torch.Generator().manual_seed(kills))
    assert hits == kills
    assert_same_weights(tmp_path / "whole", tmp_path / "killed")
    curves = [json.loads((tmp_path / name / "run.json").read_text())["curve"] for name in ("whole", "killed")]
    assert [(r["epoch"], r["train_loss"]) for r in curves[0]] == [(r["epoch"], r["train_loss"]) for r in curves[1]]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_killed_run_ends_in_the_same_bits(processes, tmp_path):
    killed_run_ends_in_the_same_bits(processes, tmp_path, kills=5)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_run_killed_twenty_times_ends_in_the_same_bits(processes, tmp_path):
    killed_run_ends_in_the_same_bits(processes, tmp_path, kills=20)


class Interruption(Exception):
    """Stands in for a power cut."""


def interrupted(tmp_path, monkeypatch, epoch, **recipe):
    step = TrainingModule.training_step

    def breaks(self, batch, batch_idx):
        if self.current_epoch == epoch:
            raise Interruption
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", breaks)
        with pytest.raises(Interruption):
            run(tmp_path, **recipe)


@pytest.mark.parametrize("stream", [False, True], ids=["memory", "stream"])
def test_resume_with_loader_workers_ends_in_the_same_bits(tmp_path, monkeypatch, stream):
    data = make_folder(tmp_path / "data", per_class=10, size=(12, 12))
    recipe = {"data": str(data), "limit": None, "holdout": 0.2, "batch_size": 4, "img_size": 8, "stream": stream}
    machine = Machine(accelerator="cpu", num_workers=1)
    run(tmp_path / "whole", machine=machine, **recipe)
    interrupted(tmp_path / "parts", monkeypatch, 2, machine=machine, **recipe)
    run(tmp_path / "parts", machine=machine, **recipe)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")
    run(tmp_path / "none", **recipe)
    assert_same_weights(tmp_path / "whole", tmp_path / "none")


def test_a_bad_image_while_scoring_is_one_line(tmp_path):
    data = make_folder(tmp_path / "data", per_class=10)
    (data / "val" / "b" / "bad.png").write_bytes(b"nope")
    recipe = {"data": str(data), "limit": None, "holdout": 0.2, "batch_size": 4, "img_size": 8, "stream": True}
    machine = Machine(accelerator="cpu", num_workers=1)
    with pytest.raises(DataError, match=r"^cannot read image .*bad.png: .*; mend or remove it, .*skip$"):
        run(tmp_path / "out", machine=machine, epochs=1, **recipe)
    with pytest.warns(UserWarning, match=r"bad.png.*; left out"):
        result, _ = run(tmp_path / "skip", epochs=1, on_bad_image="skip", **recipe)
    assert result["scored_images"] == 20


@pytest.mark.parametrize("harm", ["torn", "foreign", "flipped"])
def test_a_broken_checkpoint_is_named_and_the_one_before_it_used(tmp_path, monkeypatch, harm):
    run(tmp_path / "whole")
    interrupted(tmp_path / "parts", monkeypatch, 2)
    newest = tmp_path / "parts" / "epoch00001.ckpt"
    content = bytearray(newest.read_bytes())
    if harm == "torn":
        newest.write_bytes(content[: len(content) // 2])
    elif harm == "foreign":
        torch.save({"state_dict": {}}, newest)
    else:
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
    with pytest.warns(
        UserWarning, match=r"epoch00001.ckpt is not a .*checkpoint .*; going on from .*epoch00000.ckpt"
    ):
        run(tmp_path / "parts")
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_all_checkpoints_broken(tmp_path, monkeypatch):
    interrupted(tmp_path, monkeypatch, 1)
    (tmp_path / "epoch00000.ckpt").write_bytes(b"PK")
    with pytest.raises(
        OutputError, match=r"epoch00000.ckpt is not a checkpoint .*; delete it to start this run anew"
    ):
        run(tmp_path)


def test_checkpoint_of_another_model_is_refused(tmp_path, monkeypatch):
    interrupted(tmp_path / "a", monkeypatch, 1)
    interrupted(tmp_path / "b", monkeypatch, 1, mixer="mhsa")
    (tmp_path / "b" / "epoch00000.ckpt").replace(tmp_path / "a" / "epoch00000.ckpt")
    with pytest.raises(OutputError, match="the checkpoint is of another configuration or other data"):
        run(tmp_path / "a")


def test_every_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"weights": torch.arange(3.0)}, path)
    whole = path.read_bytes()
    state = torch.load(io.BytesIO(whole), weights_only=True)
    for position in range(len(whole)):
        torn = bytearray(whole)
        torn[position] ^= 1 << (position % 8)
        path.write_bytes(torn)
        try:
            loaded = AtomicCheckpointIO().load_checkpoint(path)
        except OutputError:
            continue
        assert torch.equal(loaded["weights"], state["weights"])  # a bit that nothing reads, such as of a time stamp


def test_checkpoints_hold_a_checksum_and_load_with_torch(tmp_path, monkeypatch):
    interrupted(tmp_path, monkeypatch, 2)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert [path.name for path in paths] == ["epoch00000.ckpt", "epoch00001.ckpt"]
    check_whole(paths[-1])
    state = torch.load(paths[-1], weights_only=True)
    assert state["epoch"] == 1
    assert state["global_step"] == 6
    assert len(state["curve"]) == 2


MIXED = {"mixup": 0.2, "cutmix": 0.5, "random_erasing": 0.5, "auto_augment": "rand-m5-n1", "crop_padding": 1}
SHARED = {"limit": 121, "flip": True, "model_args": {"embed_dim": 16, "depth": 2, "num_heads": 2}} | MIXED


def _train_as_rank(out, rank, port, strategy, stop_at, diverging=False, dying=(0, 1)):
    """As torchrun starts one of two processes."""
    torch.set_num_threads(1)
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({k: str(v) for k, v in (ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items()})
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    step = TrainingModule.training_step

    def stops(self, batch, batch_idx):
        if self.current_epoch == stop_at and rank in dying:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, batch, batch_idx)

    TrainingModule.training_step = stops
    if diverging or len(dying) == 1:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # both end in a traceback, as they should
    if diverging and rank == 1:
        losses = Classification.losses
        Classification.losses = lambda *args: {"loss": losses(*args)["cross_entropy"] * float("nan")}
    run(out, machine=Machine(accelerator="cpu", devices=2, strategy=strategy), **SHARED)


def train_as_two(processes, out, strategy, stop_at=None, diverging=False, target=None, dying=(0, 1)):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [
        processes.Process(
            target=target or _train_as_rank, args=(out, rank, port, strategy, stop_at, diverging, dying)
        )
        for rank in (0, 1)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    return [child.exitcode for child in children]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    run(out, **SHARED)
    return out


def assert_trained_alike(alone, together):
    """The loss curve of one process, and metrics right with uneven last batches."""
    single, double = (json.loads((out / "run.json").read_text()) for out in (alone, together))
    assert double["environment"]["processes"] == 2
    for name, tolerance in (("train_loss", 1e-4), ("holdout_accuracy", 1e-6)):
        curves = [[row[name] for row in result["curve"]] for result in (single, double)]
        assert curves[0] == pytest.approx(curves[1], rel=tolerance), name
    assert double["accuracy"] == pytest.approx(single["accuracy"], abs=0.3)
    assert double["scored_images"] == 360
    truths = [np.load(out / "predictions.npz")["truth"] for out in (alone, together)]
    assert np.array_equal(*truths)  # the parts of the processes in the order of the images
    for which, tensors in weights(alone).items():
        for name, value in weights(together)[which].items():
            torch.testing.assert_close(value, tensors[name], rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.skipif(sys.platform == "win32", reason="no gloo there")
def test_two_processes_train_as_one(processes, alone, tmp_path):
    assert train_as_two(processes, tmp_path, "ddp") == [0, 0]
    assert_trained_alike(alone, tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="no gloo there")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_loss_that_is_not_finite_on_one_process_stops_all(processes, tmp_path, strategy):
    start = time.monotonic()
    assert train_as_two(processes, tmp_path, strategy, diverging=True) == [1, 1]
    assert time.monotonic() - start < 100  # one that waits for the other is joined after 120 s
    kept = tmp_path / "diverged"
    assert json.loads((kept / "replay.json").read_text())["losses"] == {"1": {"loss": "nan"}}
    assert {path.name for path in kept.glob("batch*")} == {"batch-1.safetensors"}
    assert replay(kept)["cross_entropy"].isfinite()  # from whole weights; here nothing spoils the loss
    with pytest.raises(OutputError, match="has no step of process 0; give one of 1"):
        replay(kept, rank=0)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_shards_train_as_one_and_when_killed_end_in_the_same_bits(processes, alone, tmp_path):
    assert train_as_two(processes, tmp_path / "whole", "fsdp") == [0, 0]
    assert_trained_alike(alone, tmp_path / "whole")
    killed = train_as_two(processes, tmp_path / "parts", "fsdp", stop_at=2)
    assert killed == [-signal.SIGKILL] * 2
    states = sorted((tmp_path / "parts").glob("*.ckpt"))
    assert len(states) == 2
    state = torch.load(states[-1], weights_only=True)
    assert all(type(value) is torch.Tensor for value in state["state_dict"].values())  # whole, not shards
    assert train_as_two(processes, tmp_path / "parts", "fsdp") == [0, 0]
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def _says(out, rank, *args):
    try:
        _train_as_rank(out, rank, *args)
    except StaticKeyError as error:
        (out / "said").write_text(str(error))
        raise


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
@pytest.mark.parametrize(
    ("strategy", "dead"),
    [("ddp", 1), *(pytest.param(*case, marks=pytest.mark.slow) for case in [("ddp", 0), ("fsdp", 1)])],
)
def test_a_process_whose_peer_is_killed_says_so(processes, tmp_path, strategy, dead):
    start = time.monotonic()
    codes = train_as_two(processes, tmp_path, strategy, stop_at=1, target=_says, dying=(dead,))
    assert codes[dead] == -signal.SIGKILL
    assert codes[1 - dead] == 1
    assert time.monotonic() - start < 60
    message = (
        r"another process of this run has ended or does not answer \(.*peer.*\); see what it said, the same command"
    )
    assert re.match(message, (tmp_path / "said").read_text())


@pytest.mark.parametrize(("where", "number"), [("write", 1), ("write", 6), ("flush", 1)])
def test_a_disk_that_is_full_for_tensorboard(tmp_path, monkeypatch, capfd, where, number):
    """What TensorBoard's own thread meets is said where the run notices, and by nobody else."""
    calls = iter(range(1, 1000))
    method = getattr(RecordWriter, where)

    def full(self, *args):
        if next(calls) >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return method(self, *args)

    monkeypatch.setattr(RecordWriter, where, full)
    with pytest.raises(
        OutputError, match=r"^cannot write .*tensorboard: No space left on device; the disk is full; free"
    ):
        run(tmp_path)
    assert "Traceback" not in capfd.readouterr().err


def test_shards_are_shards():
    """Each process keeps its part of weights, average and optimizer state; here it is all, on a mesh of one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = torch.distributed.TCPStore("127.0.0.1", port, 1, is_master=True)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = build_model("small_vit", "ska", img_size=8, num_classes=3, in_chans=1)
        task = TrainingModule(model, Classification(), ClassificationRecipe(), SimpleNamespace(class_names="abc"))
        task._device_mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
        task.configure_model()
        units = [name for name, module in task.named_modules() if isinstance(module, FSDPModule)]
        assert units == ["model", *(f"model.blocks.{i}" for i in range(4)), "ema.module"] + [
            f"ema.module.blocks.{i}" for i in range(4)
        ]
        assert all(isinstance(parameter, DTensor) for parameter in task.parameters())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_one_command_starts_two_processes(alone, tmp_path):
    words = ["train", "--limit", "121", "--epochs", "3", "--batch-size", "32", "--flip", "true", "--mixer", "ska"]
    words += [word for name, value in MIXED.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words += ["--model-args", json.dumps(SHARED["model_args"]), "--accelerator", "cpu", "--devices", "2"]
    env = {k: v for k, v in os.environ.items() if "RANK" not in k} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "statickey", *words, "--out", str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert_trained_alike(alone, tmp_path)
    assert done.stdout.count("epoch 1/3") == 1  # one process talks
