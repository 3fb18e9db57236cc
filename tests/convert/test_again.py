"""Swapping what was swapped before: what a mixer hands on, and what it cannot."""

import pytest
import timm
import torch
from torch import nn

from statickey import convert
from statickey.convert import token_mixers
from statickey.errors import StaticKeyError
from tolerances import assert_close

ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def converted(mixer, seed=0, mixer_args=None, **kwargs):
    torch.manual_seed(seed)
    model = timm.models.VisionTransformer(**ARGS | kwargs).eval()
    convert(model, mixer, mixer_args=mixer_args)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("mixer", ["ska", "cska", "fcska", "kv_shared", "synthesizer", "constant", "identity"])
def test_a_mixer_to_itself_keeps_its_projections(mixer):
    model, images = converted(mixer, qk_norm=mixer.endswith("ska")), torch.randn(2, 3, 32, 32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    out = model(images)
    report = convert(model, mixer)
    assert len(report.modules) == 2
    after = model.state_dict()
    fresh = {
        name for name in after if not name.endswith("_extra_state") and not torch.equal(after[name], before[name])
    }
    if mixer in ("ska", "cska", "fcska"):
        assert not fresh
        assert torch.equal(model(images), out)
        assert all(module.key_carried for module in report.modules)
        assert "key carried over" in str(report)
    else:
        assert {name.rpartition(".")[2] for name in fresh} <= {"static_key", "key_bias", "logits"}
        assert not any(module.key_carried for module in report.modules)


@pytest.mark.parametrize(("first", "second", "carried"), [
    ("ska", "fcska", True), ("fcska", "ska", True), ("ska", "cska", False), ("cska", "ska", False),
])  # fmt: skip
def test_from_one_static_key_to_another(first, second, carried):
    model = converted(first, qkv_bias=False)
    old = model.blocks[1].attn
    report = convert(model, second)
    new = model.blocks[1].attn
    assert report.modules[0].key_carried == carried
    assert ("key carried over" in str(report)) == carried
    for part in ("qv", "proj"):
        assert torch.equal(getattr(new, part).weight, getattr(old, part).weight)
    assert new.qv.bias is None
    if carried:
        assert torch.equal(new.static_key, old.static_key)
    model(torch.randn(2, 3, 32, 32)).sum().backward()


def test_rows_are_evaluated_or_resampled_where_the_new_key_wants_them():
    model, images = converted("ska", mixer_args={"key": "continuous"}), torch.randn(1, 3, 32, 32)
    before = model(images)
    assert convert(model, "ska").modules[0].key_carried
    assert_close("on the grid", model(images), before)
    report = convert(model, "ska", mixer_args={"key_size": (2, 2)})
    assert report.modules[0].key_carried
    assert model.blocks[0].attn.static_key.shape == (3, 5, 8)
    assert not convert(model, "ska", mixer_args={"key": "continuous"}).modules[0].key_carried


def test_a_frozen_projection_stays_frozen():
    model = converted("ska")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("static_key" in name)
    convert(model, "fcska")
    trainable = {name.rpartition("attn.")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"static_key", "query_conv.weight", "query_conv.bias"}
    convert(model, "constant")
    assert {name.rpartition("attn.")[2] for name, p in model.named_parameters() if p.requires_grad} == {"logits"}


def test_all_means_what_is_left_then_all():
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(**ARGS)
    convert(model, "ska", layers=[0])
    assert [module.name for module in convert(model, "cska").modules] == ["blocks.1.attn"]
    assert [module.name for module in convert(model, "fcska").modules] == ["blocks.0.attn", "blocks.1.attn"]


def test_values_alone():
    model = converted("ska")
    values = model.blocks[0].attn.qv.weight.chunk(2)[1]
    convert(model, "constant")
    assert torch.equal(model.blocks[0].attn.v.weight, values)


REFUSED = {
    "the projection of keys is gone": (
        "ska",
        "mhsa",
        {},
        "is a StaticKeyAttention, which has no qkv for the SelfAtt",
    ),
    "nothing to carry": ("identity", "ska", {}, "is a IdentityMixer, which has no qv"),
}


@pytest.mark.parametrize("case", ["the projection of keys is gone", "nothing to carry"])
def test_what_cannot_be_carried_over(case):
    first, second, options, message = REFUSED[case]
    model = converted(first)
    mixers = token_mixers(model)
    with pytest.raises(StaticKeyError, match=message + ".*build the host again, or pass keep_weights=False"):
        convert(model, second, **options)
    assert token_mixers(model) == mixers
    report = convert(model, second, keep_weights=False)
    assert not any(module.key_carried for module in report.modules)
    model(torch.randn(2, 3, 32, 32)).sum().backward()


def test_fewer_dynamic_heads_keep_their_keys_and_the_static_ones_theirs():
    model = converted("partly_static", mixer_args={"dynamic_heads": [0, 2], "bias": "map"}, qk_norm=True)
    old = model.blocks[0].attn
    report = convert(model, "partly_static", mixer_args={"dynamic_heads": [2], "bias": "map"})
    new = model.blocks[0].attn
    assert not report.modules[0].key_carried
    assert torch.equal(new.k.weight, old.k.weight[8:])
    assert torch.equal(new.k.bias, old.k.bias[8:])
    for key in ("static_key", "map_bias"):
        assert torch.equal(getattr(new, key)[1], getattr(old, key)[0])
    with pytest.raises(StaticKeyError, match=r"keys of the input for heads \[2\], not for dynamic_heads=\[0\]"):
        convert(model, "partly_static", mixer_args={"dynamic_heads": [0], "bias": "map"})
    model(torch.randn(2, 3, 32, 32)).sum().backward()


def test_other_heads_keep_the_widths_of_the_projections():
    model = converted("ska")
    assert not convert(model, "ska", mixer_args={"num_heads": 2}).modules[0].key_carried
    with pytest.raises(StaticKeyError, match=r"blocks\.0\.attn\.qv: .*keep its heads and biases in mixer_args"):
        convert(model, "ska", mixer_args={"head_dim": 4, "num_heads": 2})
