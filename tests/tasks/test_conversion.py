"""``statickey convert``: from a trained classifier's folder to a folder of one with static keys."""

import csv
import io
import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console

from statickey import StaticKeyAttention
from statickey.cli import main
from statickey.convert import token_mixers
from statickey.errors import DataError, OutputError, StaticKeyError
from statickey.layers import SelfAttention
from statickey.tasks import ClassificationRecipe, Machine, convert_run, evaluate, load_model, train

QUIET = {"accelerator": "cpu"}
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def silent():
    return Console(file=io.StringIO(), width=100)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    recipe = ClassificationRecipe(limit=400, epochs=8, model_args=SMALL)
    train(recipe, mixer="mhsa", out=str(out), machine=Machine(accelerator="cpu"), console=silent())
    return out


def test_a_run_becomes_a_folder_that_all_commands_take(trained, tmp_path):
    text = io.StringIO()
    out = tmp_path / "static"
    report = convert_run(
        str(trained), out=str(out), fraction=0.5, bias="key", num_images=64, console=Console(file=text), **QUIET
    )
    model, card = load_model(out)
    assert card.mixer.startswith("mhsa;partly_static:bias=key,dynamic_heads=")
    static = {(head.layer, head.head) for head in report.heads if head.static}
    assert len(static) == 2
    for name, mixer in token_mixers(model).items():
        own = tuple(head for layer, head in sorted(static) if layer == name)
        assert isinstance(mixer, SelfAttention) if not own else mixer.static_heads == own
    saved = json.loads((out / "calibration.json").read_text())
    assert saved["stages"][0] == {"name": report.stages[0].name, "change": 0.0, "metric": report.stages[0].metric}
    assert [row["static"] for row in csv.DictReader((out / "heads.csv").open())] == [
        str(head.static) for head in report.heads
    ]
    assert Image.open(out / "heads.png").width > 400
    assert "2 of 4 heads became static" in text.getvalue()
    before = evaluate(str(trained), console=silent(), **QUIET)["top1"]
    after = evaluate(str(out), data="digits", console=silent(), **QUIET)["top1"]
    assert abs(before - after) < 10
    larger, _ = load_model(out, img_size=16)
    assert larger(torch.randn(1, 1, 16, 16)).shape == (1, 10)


def test_a_budget_is_of_points_on_held_out_images(trained, tmp_path):
    out = str(tmp_path / "static")
    report = convert_run(str(trained), out=out, max_drop=100.0, num_images=32, console=silent(), **QUIET)
    assert all(head.static for head in report.heads)
    assert "of the metric" in report.note
    assert {type(mixer) for mixer in token_mixers(load_model(out)[0]).values()} == {StaticKeyAttention}


def test_layers_and_a_folder_of_images_on_the_command_line(trained, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(folder / f"{i}.png")
    words = ["convert", str(trained), "--out", str(tmp_path / "static"), "--data", str(folder), "--layers", "-1"]
    assert main([*words, "--fit", "lstsq", "--criterion", "kl", "--accelerator", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "2 of 2 heads became static, all; fit=lstsq bias=None on 9 images, measured on 3 others" in shown
    assert load_model(tmp_path / "static")[1].mixer == "mhsa;ska@blocks.1.attn"
    assert main([*words, "--accelerator", "cpu"]) == 2
    assert "holds a network already; choose another --out" in capsys.readouterr().err


def test_a_published_model_and_a_folder_of_images(tmp_path, monkeypatch):
    args = {"img_size": 32, "patch_size": 16, "embed_dim": 24, "depth": 2, "num_heads": 3}

    def build(name, mixer, *, img_size, num_classes, in_chans, model_args):
        assert (name, mixer, img_size, model_args) == ("vit_tiny_patch16_224", None, 32, {"pretrained": True})
        return timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **args)

    monkeypatch.setattr("statickey.tasks.published.build_model", build)
    images = tmp_path / "images"
    images.mkdir()
    for i in range(9):
        Image.new("RGB", (40, 40), (20 * i, 90, 200 - 20 * i)).save(images / f"{i}.png")
    out = tmp_path / "static"
    convert_run("vit_tiny_patch16_224", out=str(out), data=str(images), img_size=32, console=silent(), **QUIET)
    card = json.loads((out / "config.json").read_text())
    assert card["architecture"] == "vit_tiny_patch16_224"
    assert card["statickey"]["mixer"] == "ska@blocks.0.attn,blocks.1.attn"
    assert len(card["label_names"]) == 1000
    assert card["label_names"][0].startswith("tench")


def test_refusals(trained, tmp_path):
    out = str(tmp_path / "static")
    with pytest.raises(OutputError, match="'vit_tiny' is neither the folder of a run nor a model's name"):
        convert_run("vit_tiny", out=out, console=silent(), **QUIET)
    with pytest.raises(StaticKeyError, match="'vit_small_patch14_dinov2' has no classes; from Python"):
        convert_run("vit_small_patch14_dinov2", out=out, console=silent(), **QUIET)
    with pytest.raises(DataError, match="none' is neither a folder nor one of digits"):
        convert_run(str(trained), out=out, data=str(tmp_path / "none"), console=silent(), **QUIET)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no image; give a folder with images"):
        convert_run(str(trained), out=out, data=str(tmp_path / "empty"), console=silent(), **QUIET)
    with pytest.raises(StaticKeyError, match="layers has index 7, but the model has 2 attention modules"):
        convert_run(str(trained), out=out, layers="7", console=silent(), **QUIET)
    assert not (tmp_path / "static").exists()
