"""Losses by which a converted model follows what it was made of."""

import copy

import pytest
import torch
from timm.models import create_model

from statickey import convert
from statickey.convert import as_mixers, feature_loss, key_parameters, layer_loss, relative_error, token_mixers
from statickey.errors import StaticKeyError
from tolerances import assert_close

ROW = {"depths": (1,), "num_heads": (2,), "embed_dim": 16, "window_size": 4}
TINY = {"depth": 1, "embed_dim": 24, "num_heads": 3, "patch_size": 8}
HOSTS = {
    "vit_small_patch16_dinov3": TINY,
    "beit_base_patch16_224": TINY,
    "swin_tiny_patch4_window7_224": ROW,
    "caformer_s18": {},
}


def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def backbone(**kwargs):
    torch.manual_seed(0)
    sizes = TINY | {"depth": 2, "img_size": 64, "num_classes": 0}
    return create_model("vit_tiny_patch16_224", **sizes | kwargs).eval()


@pytest.mark.parametrize("name", HOSTS)
def test_the_layer_loss_knows_every_host(name):
    """The host itself loses nothing, whatever its attention is called and called with."""
    size = {} if name == "caformer_s18" else {"img_size": 64}
    teacher = create_model(name, num_classes=3, **size, **HOSTS[name]).eval()
    student = copy.deepcopy(teacher)
    before = teacher(images())
    convert(student, "ska", layers=-1)
    followed = as_mixers(teacher)
    assert_close("teacher", followed(images()), before)
    loss = layer_loss(student, followed, images())
    loss.backward()
    assert loss > 0
    assert token_mixers(student).popitem()[1].static_key.grad.abs().sum() > 0


@pytest.mark.parametrize("loss_of", [layer_loss, feature_loss])
def test_a_backbone_without_classes_learns_to_follow(loss_of):
    teacher = as_mixers(backbone())
    student = backbone()
    convert(student, "ska")
    keys = key_parameters(student)
    assert len(keys) == 2
    optimizer = torch.optim.Adam(keys, lr=0.03)
    losses = []
    for _ in range(15):
        loss = loss_of(student, teacher, images())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert not any(module._forward_hooks for module in teacher.modules())


def test_features_are_the_last_ones_whatever_is_made_of_them():
    teacher, student = backbone(num_classes=3), backbone(num_classes=3)
    convert(student, "ska")
    said, wanted = student.forward_features(images()), teacher.forward_features(images())
    expected = (said - wanted).square().mean() / wanted.square().mean()
    assert_close("loss", feature_loss(student, teacher, images()), expected)
    plain = [torch.nn.Sequential(model) for model in (student, teacher)]
    assert_close("called", feature_loss(*plain, images()), relative_error(student(images()), teacher(images())))


def test_features_of_transformers():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 32}
    config = transformers.Dinov2Config(**sizes, image_size=64, patch_size=16)
    teacher = transformers.Dinov2Model(config).eval()
    student = copy.deepcopy(teacher)
    convert(student, "ska")
    said, wanted = (model(images()).last_hidden_state for model in (student, teacher))
    assert_close("loss", feature_loss(student, teacher, images()), relative_error(said, wanted))
    assert layer_loss(student, as_mixers(teacher), images()) > 0


def test_refusals():
    teacher, student = backbone(), backbone()
    with pytest.raises(StaticKeyError, match="VisionTransformer has no static key; give a converted model"):
        layer_loss(student, teacher, images())
    convert(student, "ska")
    with pytest.raises(
        StaticKeyError, match=r"the teacher has no blocks.1.attn; give what the student was converted"
    ):
        layer_loss(student, backbone(depth=1), images())

    class Parts(torch.nn.Module):
        def forward(self, x):
            return {"a": x}

    with pytest.raises(StaticKeyError, match="Parts gives a dict, not one tensor; give the backbone in it"):
        feature_loss(Parts(), Parts(), images())
