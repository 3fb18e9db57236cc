"""Cards of trained networks: what they keep, and what they refuse."""

import dataclasses
import json

import pytest
import timm
import torch

import statickey  # noqa: F401  (registers the models)
from statickey.convert import token_mixers
from statickey.errors import OutputError
from statickey.models import build_model
from statickey.tasks import ModelCard, load_model
from statickey.tasks.weights import write_model

TINY = {"embed_dim": 16, "depth": 1, "num_heads": 2}


def card(**fields):
    common = {
        "architecture": "small_vit",
        "mixer": "ska",
        "model_args": TINY,
        "img_size": 8,
        "in_chans": 1,
        "class_names": ("a", "b"),
        "mean": (0.5,),
        "std": (0.2,),
    }
    return ModelCard(**common | fields)


def written(folder, **fields):
    """A run's folder with weights as after training, and the network in it."""
    own = card(**fields)
    model = own.build().eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    write_model(folder, "last", model, own)
    return model


def edited(folder, **changes):
    value = json.loads((folder / "config.json").read_text())
    for path, new in changes.items():
        *parents, last = path.split("__")
        place = value
        for parent in parents:
            place = place[parent]
        if new is None and last != "mixer":
            del place[last]
        else:
            place[last] = new
    (folder / "config.json").write_text(json.dumps(value))


def same(first, second):
    states = first.state_dict(), second.state_dict()
    return all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))


def test_patches_and_width_stay_at_another_image_size(tmp_path):
    written(tmp_path, model_args={"depth": 1})
    kept = load_model(tmp_path)[1].model_args
    assert kept["patch_size"] == 2
    assert kept["embed_dim"] == 64
    larger = load_model(tmp_path, img_size=32)[0]  # a fresh small_vit of 32 pixels has patches of 4 and width 96
    assert larger.blocks[0].attn.feat_size == (16, 16)
    assert larger.embed_dim == 64


def test_a_card_of_version_0_1(tmp_path):
    model = written(tmp_path, model_args={"depth": 1})
    edited(tmp_path, statickey__model_args={"depth": 1, "pretrained": True}, statickey__fp32_logits=None)
    loaded, old = load_model(tmp_path)
    assert same(loaded, model)
    assert not old.fp32_logits
    assert load_model(tmp_path, img_size=32)[0].embed_dim == 64


def test_logits_stay_in_float32(tmp_path):
    written(tmp_path, fp32_logits=True)
    loaded, own = load_model(tmp_path)
    assert own.fp32_logits
    assert {mixer.backend for mixer in token_mixers(loaded).values()} == {"math"}


FOLDERS = {
    "a name of ours": {"architecture": "small_vit"},
    "a MetaFormer with its mixer's place": {
        "architecture": "skaformer_nano",
        "mixer": "cska",
        "img_size": 32,
        "model_args": {"depths": [1, 1, 1, 1], "dims": [16, 32, 48, 64], "mixers": ["sepconv", "X", "X", "mhsa"]},
    },
    "a host of timm's that was converted": {"architecture": "vit_tiny_patch16_224", "img_size": 32},
    "one that was not": {"architecture": "vit_tiny_patch16_224", "img_size": 32, "mixer": None},
}


@pytest.mark.parametrize("case", FOLDERS)
def test_the_folder_of_a_run_is_a_model(tmp_path, case):
    run = tmp_path / "run"
    model = written(run, **FOLDERS[case])
    args = {"model_args": {"pretrained": True}, "in_chans": 1}
    size = FOLDERS[case].get("img_size", 8)
    again = build_model(f"local-dir:{run}", None, img_size=size, num_classes=2, **args)
    assert same(again, model)
    assert not same(build_model(f"local-dir:{run}", None, img_size=size, num_classes=2, in_chans=1), model)
    more = build_model(f"local-dir:{run}", None, img_size=2 * size, num_classes=5, **args)
    assert more.num_classes == 5
    assert list(token_mixers(more)) == list(token_mixers(model))
    # a run from that run needs neither the first folder nor its name
    second = dataclasses.replace(
        card(**FOLDERS[case]), architecture=f"local-dir:{run}", mixer=None, model_args={"pretrained": True}
    )
    write_model(tmp_path / "second", "last", again, second)
    run.rename(tmp_path / "gone")
    assert same(load_model(tmp_path / "second")[0], model)


def test_another_mixer_than_the_run_had(tmp_path):
    model = written(tmp_path)
    args = {"model_args": {"pretrained": True}, "in_chans": 1}
    other = build_model(f"local-dir:{tmp_path}", "cska", img_size=8, num_classes=2, **args)
    assert torch.equal(other.blocks[0].attn.qv.weight, model.blocks[0].attn.qv.weight)
    assert torch.equal(other.blocks[0].mlp.fc1.weight, model.blocks[0].mlp.fc1.weight)


def test_timm_loads_the_folder_too(tmp_path):
    model = written(tmp_path)
    assert same(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": 5}, "architecture is 5"),
        (
            {"architecture": "smal_vit"},
            "cannot build the network of .*: unknown model 'smal_vit'; did you mean small",
        ),
        ({"statickey__mixer": 3}, "mixer is 3"),
        ({"statickey__mixer": "skaa"}, "cannot build the network of .*: unknown mixer 'skaa'"),
        ({"statickey__model_args": [1]}, r"model_args is \[1\]"),
        ({"statickey__model_args": {"depth": 10**9}}, "cannot build the network of .*: depth=1000000000"),
        ({"statickey__streamed": "no"}, "streamed is 'no'"),
        ({"statickey__fp32_logits": 1}, "fp32_logits is 1"),
        ({"statickey": None}, r"does not describe a network of this program \(KeyError\('statickey'\)\)"),
        ({"statickey": [1]}, r"does not describe a network of this program"),
        ({"model_args": 5}, r"does not describe a network of this program"),
        ({"label_names": "ab"}, "label_names is 'ab'"),
        ({"label_names": []}, r"label_names is \[\]"),
        ({"label_names": [1, 2]}, r"label_names is \[1, 2\]"),
        ({"pretrained_cfg__input_size": [1, 8]}, r"input_size is \[1, 8\]"),
        ({"pretrained_cfg__input_size": [1, 8, 9]}, r"input_size is \[1, 8, 9\]"),
        ({"pretrained_cfg__input_size": [1, 8.0, 8.0]}, r"input_size is \[1, 8.0, 8.0\]"),
        ({"pretrained_cfg__input_size": [0, 8, 8]}, r"input_size is \[0, 8, 8\]"),
        ({"pretrained_cfg__mean": 0.5}, "mean is 0.5"),
        ({"pretrained_cfg__mean": ["x"]}, r"mean is \['x'\]"),
        ({"pretrained_cfg__mean": [float("nan")]}, r"mean is \[nan\]"),
        ({"pretrained_cfg__mean": [0.1, 0.2, 0.3]}, "mean has 3 numbers for 1 channels"),
        ({"pretrained_cfg__std": [0]}, r"std is \[0\]"),
    ],
)
def test_a_field_that_is_wrong_is_named(tmp_path, changes, message):
    written(tmp_path)
    edited(tmp_path, **changes)
    with pytest.raises(OutputError, match=message) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "5", "[]", "null", "{", "\x00"])
def test_a_file_that_is_no_card(tmp_path, text):
    written(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(OutputError, match=r"config.json does not describe a network of this program \("):
        load_model(tmp_path)


def test_weights_come_last(tmp_path, monkeypatch):
    """Commands take a folder that has them for finished."""

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("statickey.tasks.weights.write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path)
    assert not list(tmp_path.iterdir())
