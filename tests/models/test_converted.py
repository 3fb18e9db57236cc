"""Converted models in files."""

import pytest
import torch
from timm.models import create_model
from torch import nn

from statickey import Calibration, convert, load_converted, save_converted
from statickey.errors import OutputError, StaticKeyError
from statickey.layers import MIXERS
from statickey.models import Swap, build_model
from tolerances import assert_close

SIZES = {"patch_size": 8, "img_size": 32, "depth": 3, "embed_dim": 24, "num_heads": 3, "num_classes": 5}


def host(**kwargs):
    return create_model("vit_tiny_patch16_224", **SIZES | kwargs).eval()


def converted():
    model = host()
    heads = {"blocks.0.attn": [0, 1, 2], "blocks.1.attn": [1]}
    report = convert(model, "ska", calibration=Calibration(torch.randn(12, 3, 32, 32), heads=heads, bias="map"))
    return model, report


def test_from_a_model_to_a_saved_one_and_back(tmp_path):
    model, report = converted()
    save_converted(model, tmp_path / "static.safetensors", report)
    back = host()
    told = load_converted(back, tmp_path / "static.safetensors")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(back(x), model(x))
    assert told["num_images"] == 9
    assert [head["static"] for head in told["heads"]] == [True, True, True, False, True, *[False] * 4]
    larger = host(img_size=48)
    load_converted(larger, tmp_path / "static.safetensors")
    model.set_input_size((48, 48))
    x = torch.randn(2, 3, 48, 48)
    assert_close("resampled", larger(x), model(x))


def test_conversions_without_images_are_saved_too(tmp_path):
    model = host()
    convert(model, "cska", layers=[0, -1], mixer_args={"kernel_size": 5})
    convert(model, "ska", layers=1)
    save_converted(model, tmp_path / "static.safetensors")
    back = host()
    assert load_converted(back, tmp_path / "static.safetensors") is None
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(back(x), model(x))


def test_a_host_built_with_mixers_is_converted_further(tmp_path):
    def build():
        return build_model("small_vit", "mhsa", img_size=8, num_classes=3, in_chans=1).eval()

    model = build()
    convert(model, "partly_static", layers=1, mixer_args={"dynamic_heads": [1], "bias": "key"})
    save_converted(model, tmp_path / "static.safetensors")
    back = build()
    load_converted(back, tmp_path / "static.safetensors")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(back(x), model(x))


CHANGES = {
    "key_size": lambda model: model.set_key_size((2, 3)),
    "key": lambda model: model.set_key("continuous"),
    "off_grid": lambda model: model.set_off_grid("window"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_chosen_for_keys_after_the_conversion_is_saved(tmp_path, change):
    model, back = host(dynamic_img_size=True), host(dynamic_img_size=True)
    convert(model, "ska", layers=range(2))
    CHANGES[change](model)
    save_converted(model, tmp_path / "static.safetensors")
    load_converted(back, tmp_path / "static.safetensors")
    for x in (torch.randn(2, 3, 32, 32), torch.randn(2, 3, 48, 40)):
        assert torch.equal(back(x), model(x))


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_every_mixer_is_saved(tmp_path, mixer):
    model, back = (host(class_token=False, global_pool="avg") for _ in range(2))
    convert(model, mixer, layers=1)
    save_converted(model, tmp_path / "static.safetensors")
    load_converted(back, tmp_path / "static.safetensors")
    x = torch.randn(2, 3, 32, 32)
    assert type(back.blocks[1].attn) is type(model.blocks[1].attn)
    assert torch.equal(back(x), model(x))


FAMILIES = {
    "botnet26t_256": {"img_size": 64},  # no output projection
    "hiera_tiny_224": {"img_size": 64, "embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)},  # patches uncounted
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "window_size": 4,
        "embed_dim": 16,
        "depths": (2,),
        "num_heads": (2,),
    },
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_are_saved(tmp_path, name):
    model, back = (create_model(name, num_classes=5, **FAMILIES[name]).eval() for _ in range(2))
    convert(model, "ska")
    save_converted(model, tmp_path / "static.safetensors")
    load_converted(back, tmp_path / "static.safetensors")
    size = FAMILIES[name]["img_size"]
    x = torch.randn(2, 3, size, size)
    assert torch.equal(back(x), model(x))


@pytest.mark.parametrize("whole", [True, False])
def test_what_wraps_a_converted_model_is_saved_as_the_model_is(tmp_path, whole):
    """Whether it was converted through what wraps it or not; tensors with two names are in the file under both."""
    model, back = (nn.ModuleDict({"body": body, "head": body.head}) for body in (host(), host()))
    convert(model if whole else model["body"], "ska")
    save_converted(model, tmp_path / "whole.safetensors")
    save_converted(model["body"], tmp_path / "body.safetensors")
    load_converted(back, tmp_path / "whole.safetensors")
    alone = host()
    load_converted(alone, tmp_path / "body.safetensors")
    x = torch.randn(2, 3, 32, 32)
    for body in (back["body"], alone):
        assert torch.equal(body(x), model["body"](x))


def test_what_runs_a_model_leaves_no_trace_in_the_file(tmp_path):
    model, back = nn.DataParallel(host()), nn.DataParallel(host())
    convert(model, "ska")
    save_converted(model, tmp_path / "static.safetensors")
    alone = host()
    for reader in (back, alone):
        load_converted(reader, tmp_path / "static.safetensors")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(back(x), model(x))
    assert torch.equal(alone(x), model(x))


def test_refusals(tmp_path):
    path = tmp_path / "static.safetensors"
    with pytest.raises(StaticKeyError, match="VisionTransformer was not converted; call"):
        save_converted(host(), path)
    model, _ = converted()
    with pytest.raises(OutputError, match=r"static.pth' must end in .safetensors"):
        save_converted(model, tmp_path / "static.pth")
    with pytest.raises(OutputError, match=r"cannot read .*static.safetensors: No such file"):
        load_converted(host(), path)
    path.write_bytes(b"text")
    with pytest.raises(OutputError, match=r"cannot read .*give a file that statickey.save_converted wrote"):
        load_converted(host(), path)
    save_converted(model, path)
    with pytest.raises(OutputError, match=r"is of another host: layers='blocks\.1\.attn' matches none"):
        load_converted(host(depth=1), path)
    with pytest.raises(OutputError, match="is of another model"):
        load_converted(host(embed_dim=48), path)


def test_several_swaps_as_one_text():
    text = "mhsa;ska@blocks.0.attn,blocks.3.attn;partly_static:bias=map,dynamic_heads=[0,2]@blocks.1.attn"
    assert ";".join(map(str, Swap.parse_all(text))) == text
    model = build_model("small_vit", text, img_size=8, num_classes=3, in_chans=1)
    assert [type(block.attn).__name__ for block in model.blocks] == [
        "StaticKeyAttention",
        "PartlyStaticAttention",
        "SelfAttention",
        "StaticKeyAttention",
    ]
    assert model.mixer_text == text
    assert model.blocks[1].attn.dynamic_heads == (0, 2)
    with pytest.raises(StaticKeyError, match="unknown mixer 'sk'"):
        build_model("small_vit", "mhsa;sk@0", img_size=8, num_classes=3, in_chans=1)
