"""Checkpoints in the reference's layouts give the reference's outputs."""

import contextlib

import pytest
import timm
import torch
from reference_models import ReferenceFormer, ReferenceSmallVit
from torch import nn

from statickey.errors import StaticKeyError
from statickey.models import load_reference_state_dict

FORMER = {"depths": (1, 2, 1, 1), "dims": (32, 64, 96, 128)}
VIT = {"dim": 48, "depth": 2, "heads": 3, "width": 16, "hidden": 40, "classes": 6}


def former(second):
    torch.manual_seed(3)
    reference = ReferenceFormer(second, size=64, classes=6, **FORMER).eval()
    return reference, timm.create_model(f"{second}former_s18", img_size=64, num_classes=6, **FORMER).eval()


def small_vit(kind):
    torch.manual_seed(4)
    reference = ReferenceSmallVit(kind, **VIT).eval()
    for module in reference.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, mean=1.0)
            nn.init.normal_(module.bias)
    name = {"mhsa": ""}.get(kind, f"{kind}_") + "lsa_vit_small_patch4_32"
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3, "head_dim": 16, "mlp_ratio": 40 / 48, "num_classes": 6}
    return reference, timm.create_model(name, **sizes).eval()


CASES = {
    "skaformer": (lambda: former("ska"), 64),
    "cskaformer": (lambda: former("cska"), 64),
    "lsa_vit": (lambda: small_vit("mhsa"), 32),
    "ska_lsa_vit": (lambda: small_vit("ska"), 32),
    "cska_lsa_vit": (lambda: small_vit("cska"), 32),
}


@pytest.fixture(params=CASES)
def case(request):
    make, size = CASES[request.param]
    reference, model = make()
    expect = pytest.warns(UserWarning, match="one token off") if request.param == "cska_lsa_vit" else nothing()
    return reference, model, torch.randn(2, 3, size, size), expect


def nothing():
    return contextlib.nullcontext()


def agree(model, reference, images):
    with torch.no_grad():
        actual, expected = model(images), reference(images)
    assert expected.std() > 0.05
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


def test_outputs_agree(case):
    reference, model, images, expect = case
    with expect:
        load_reference_state_dict(model, reference.state_dict())
    agree(model, reference, images)


def test_through_a_file(case, tmp_path):
    """As timm's users load: ``checkpoint_path=`` at creation, and ``load_checkpoint`` afterwards."""
    reference, model, images, expect = case
    path = tmp_path / "checkpoint.pth"
    torch.save({"state_dict": reference.state_dict(), "epoch": 3}, path)
    with expect:
        timm.models.load_checkpoint(model, str(path))
    agree(model, reference, images)


def test_checkpoint_path(tmp_path):
    reference, _ = former("cska")
    torch.save({"model": reference.state_dict()}, tmp_path / "last.pth")
    model = timm.create_model(
        "cskaformer_s18", checkpoint_path=str(tmp_path / "last.pth"), img_size=64, num_classes=6, **FORMER
    )
    agree(model.eval(), reference, torch.randn(2, 3, 64, 64))


WRONG = {
    "image size": (
        {"img_size": 96},
        r"stages.1.blocks.0.token_mixer.conv_key: \(4, 64, 16, 3, 3\) in the checkpoint, \(4, 144, 16, 3, 3\) in "
        "the model; build the model with the img_size",
    ),
    "classes": ({"num_classes": 5}, r"head.fc.fc2.weight: \(6, 512\) .* \(5, 512\) .*num_classes"),
    "width": ({"dims": (16, 64, 96, 128)}, r"stem.conv.weight: \(32, 3, 7, 7\) .* \(16, 3, 7, 7\) .*sizes"),
    "heads": ({"mixer_args": {"cska": {"head_dim": 32}}}, r"conv_key: \(2, 128, 16, 3, 3\) .* \(2, 64, 32, 3, 3\)"),
    "deeper": ({"depths": (1, 2, 2, 1)}, "the checkpoint lacks 'stages.2.blocks.1.*token mixers, depths"),
    "shallower": ({"depths": (1, 1, 1, 1)}, "the checkpoint has 'stages.1.blocks.1.*token mixers, depths"),
    "other mixer": ({"mixers": ("sepconv", "ska", "mhsa", "mhsa")}, "the checkpoint lacks .*token mixers"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_checkpoint_of_another_model(wrong):
    overrides, message = WRONG[wrong]
    reference, _ = former("cska")
    model = timm.create_model("cskaformer_s18", **{"img_size": 64, "num_classes": 6} | FORMER | overrides)
    with pytest.raises(StaticKeyError, match=message):
        load_reference_state_dict(model, reference.state_dict())


def test_not_a_reference_checkpoint():
    _, model = former("ska")
    with pytest.raises(StaticKeyError, match=r"not a checkpoint of the reference.*starts with 'stem.conv.weight'"):
        load_reference_state_dict(model, model.state_dict())
