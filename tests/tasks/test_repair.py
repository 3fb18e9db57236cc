"""A converted classifier follows the one it was made of."""

import io
import os
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from timm.models import create_model

from statickey.convert import layer_loss, token_mixers
from statickey.convert.again import static_heads
from statickey.data import load_images
from statickey.errors import OutputError, StaticKeyError
from statickey.layers import StaticKeyAttention
from statickey.tasks import (
    ClassificationRecipe,
    Machine,
    RepairRecipe,
    convert_run,
    evaluate,
    load_model,
    task_named,
    train,
)
from statickey.tasks.repair import _teacher
from tolerances import assert_close

CPU = Machine(accelerator="cpu")
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def silent():
    return Console(file=io.StringIO(), width=100)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run, and what became of it: all heads static but one, a bias among them."""
    place = tmp_path_factory.mktemp("repair")
    teacher, student = place / "teacher", place / "student"
    recipe = ClassificationRecipe(limit=600, epochs=12, model_args=SMALL)
    train(recipe, mixer="mhsa", out=str(teacher), machine=CPU, console=silent())
    args = {"fit": "mean", "fraction": 0.75, "accelerator": "cpu", "num_images": 64}
    convert_run(str(teacher), out=str(student), console=silent(), **args)
    return str(teacher), str(student)


def repaired(folders, out, **options):
    teacher, student = folders
    recipe = RepairRecipe(**{"limit": 600, "student": student, "teacher": teacher, "epochs": 4} | options)
    return train(recipe, out=str(out), machine=CPU, console=silent())


def test_layers_train_keys_alone(folders, tmp_path):
    result = repaired(folders, tmp_path / "run")
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (folders[1], tmp_path / "run"))
    changed = {name for name, tensor in after.items() if not torch.equal(before[name], tensor)}
    assert changed == {name for name in before if name.endswith(".static_key")}
    losses = [row["train_loss"] for row in result["curve"]]
    assert losses[-1] < losses[0]
    model, card = load_model(tmp_path / "run")
    assert card.mixer == load_model(folders[1])[1].mixer
    digits = load_images("digits").test.images[:64].float() / 255
    images = (digits - card.mean[0]) / card.std[0]
    teacher = load_model(folders[0])[0]
    assert layer_loss(model, teacher, images) < layer_loss(load_model(folders[1])[0], teacher, images)
    score = evaluate(str(tmp_path / "run"), console=silent(), accelerator="cpu")["top1"]
    assert score == pytest.approx(result["accuracy"])


@pytest.mark.parametrize("match", ["features", "logits", "labels"])
def test_the_rest_trains_all_weights(folders, tmp_path, match):
    result = repaired(folders, tmp_path / "run", match=match)
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (folders[1], tmp_path / "run"))
    moved = {name for name, tensor in after.items() if not torch.equal(before[name], tensor)}
    assert {"blocks.0.mlp.fc1.weight", "patch_embed.proj.weight"} <= moved
    losses = [row["train_loss"] for row in result["curve"]]
    assert losses[-1] < losses[0]
    where = {"data": "digits", "out": str(tmp_path / "evaluation"), "accelerator": "cpu"}
    assert result["accuracy"] >= evaluate(folders[1], console=silent(), **where)["top1"] - 1.0


def test_one_repair_starts_from_another(folders, tmp_path):
    repaired(folders, tmp_path / "keys", epochs=1)
    result = repaired((folders[0], str(tmp_path / "keys")), tmp_path / "logits", match="logits", epochs=1)
    assert result["config"]["student"] == str(tmp_path / "keys")


def test_heads_become_static_a_part_at_a_time(folders, tmp_path):
    """What a repair made is converted further, and repaired again; static heads stay static."""
    repaired(folders, tmp_path / "first", match="features", epochs=1)
    more = {"fit": "mean", "accelerator": "cpu", "num_images": 64, "console": silent()}
    with pytest.raises(StaticKeyError, match=r"fraction=0\.5 of 4 heads, 3 of which are static already"):
        convert_run(str(tmp_path / "first"), out=str(tmp_path / "less"), fraction=0.5, **more)
    report = convert_run(str(tmp_path / "first"), out=str(tmp_path / "second"), **more)
    assert len(report.heads) == 1
    before, after = (load_model(tmp_path / name)[0] for name in ("first", "second"))
    for (name, old), new in zip(token_mixers(before).items(), token_mixers(after).values(), strict=True):
        assert type(new) is StaticKeyAttention, name
        assert torch.equal(new.static_key[list(static_heads(old))], old.static_key)
    result = repaired((folders[0], str(tmp_path / "second")), tmp_path / "third", match="logits", epochs=2)
    where = {"data": "digits", "accelerator": "cpu", "console": silent()}
    assert evaluate(str(tmp_path / "third"), **where)["top1"] == pytest.approx(result["accuracy"])
    assert evaluate(str(tmp_path / "second"), out=str(tmp_path / "scores"), **where)["top1"] > 20


def test_the_layer_loss_is_that_of_each_layer_on_the_teachers_input(folders):
    teacher, student = (load_model(folder)[0] for folder in folders)
    images = torch.randn(3, 1, 8, 8)
    x = teacher.norm_pre(teacher.pos_drop(teacher._pos_embed(teacher.patch_embed(images))))
    terms = []
    for own, other in zip(teacher.blocks, student.blocks, strict=True):
        wanted, said = own.attn(own.norm1(x)), other.attn(own.norm1(x))
        terms.append((wanted - said).square().mean() / wanted.square().mean())
        x = own(x)
    static = [hasattr(mixer, "static_key") for mixer in token_mixers(student).values()]
    assert_close("loss", layer_loss(student, teacher, images), torch.stack(terms)[static].mean())
    assert not any(module._forward_hooks for module in teacher.modules())


def test_the_teacher_may_be_a_published_model(monkeypatch):
    built = []

    def build(name, mixer, *, img_size, num_classes, in_chans, model_args):
        built.append((name, mixer, img_size, num_classes, model_args))
        return create_model(name, img_size=img_size, num_classes=num_classes, depth=1, embed_dim=24, num_heads=3)

    monkeypatch.setattr("statickey.tasks.published.build_model", build)
    teachers = [_teacher("vit_tiny_patch16_224", 32) for _ in range(2)]
    assert teachers[0] is teachers[1]
    assert built == [("vit_tiny_patch16_224", None, 32, 1000, {"pretrained": True})]
    assert list(token_mixers(teachers[0])) == ["blocks.0.attn"]
    assert not teachers[0].training
    assert not any(p.requires_grad for p in teachers[0].parameters())
    with pytest.raises(OutputError, match="'nowhere' is neither the folder of a run nor a model's name"):
        _teacher("nowhere", 32)


def test_the_teacher_is_read_again_when_its_file_changed(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "run")
    before = _teacher(str(tmp_path / "run"), 8)
    assert _teacher(str(tmp_path / "run"), 8) is before
    os.utime(tmp_path / "run" / "model.safetensors", ns=(0, 0))
    assert _teacher(str(tmp_path / "run"), 8) is not before


def test_images_and_both_networks_are_brought_to_one_size(folders, tmp_path):
    args = {"fit": "mean", "accelerator": "cpu", "num_images": 16, "img_size": 12}
    convert_run(folders[0], out=str(tmp_path / "larger"), console=silent(), **args)
    result = repaired((folders[0], str(tmp_path / "larger")), tmp_path / "run", epochs=1, limit=64)
    assert result["curve"][0]["train_loss"] > 0


def test_refusals(folders, tmp_path):
    teacher, student = folders
    out = str(tmp_path / "run")
    with pytest.raises(StaticKeyError, match="match='heads' must be 'layers' or 'features'"):
        RepairRecipe(student=student, teacher=teacher, match="heads")
    with pytest.raises(StaticKeyError, match="model='vit_tiny_patch16_224': a repair has the student's network"):
        RepairRecipe(student=student, teacher=teacher, model="vit_tiny_patch16_224")
    with pytest.raises(StaticKeyError, match="a repair needs --teacher, the folder of a network"):
        train(RepairRecipe(student=student), out=out, machine=CPU, console=silent())
    with pytest.raises(StaticKeyError, match="mixer='ska': a repair has the student's mixers"):
        train(RepairRecipe(student=student, teacher=teacher), mixer="ska", out=out, machine=CPU, console=silent())
    with pytest.raises(StaticKeyError, match="has no static key; give a converted network"):
        train(RepairRecipe(student=teacher, teacher=teacher), out=out, machine=CPU, console=silent())
    with pytest.raises(OutputError, match="does not describe a network of this program"):
        train(RepairRecipe(student=str(tmp_path), teacher=teacher), out=out, machine=CPU, console=silent())


def test_a_repaired_network_is_a_classifier():
    assert task_named("repair").metric == task_named("classify").metric
