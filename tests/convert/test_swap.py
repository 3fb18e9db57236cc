import pytest
import timm
import torch

from statickey import MIXERS, convert
from statickey.errors import StaticKeyError, UnknownNameError, UnsupportedHostError
from tolerances import assert_close

ARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 5}


def host(seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.models.VisionTransformer(**ARGS | kwargs)


def test_self_attention_keeps_the_function():
    model = host(reg_tokens=2).eval()
    images = torch.randn(2, 3, 32, 32)
    before = model(images)
    report = convert(model, "mhsa")
    assert_close("logits", model(images), before)
    assert [m.name for m in report.modules] == ["blocks.0.attn", "blocks.1.attn"]
    assert all(m.feat_size == (4, 4) and m.params_after == m.params_before for m in report.modules)
    assert not model.blocks[0].attn.training


@pytest.mark.parametrize("mixer", sorted(set(MIXERS) - {"pool", "sepconv"}))
def test_any_mixer_runs_in_a_host_with_prefix_tokens(mixer):
    model = host(reg_tokens=1)
    convert(model, mixer)
    assert isinstance(model.blocks[1].attn, MIXERS[mixer])
    assert model.blocks[1].attn.num_prefix_tokens == 2
    model(torch.randn(2, 3, 32, 32)).sum().backward()


def test_projections_are_carried_over():
    reference = host().blocks[0].attn
    query, _, value = reference.qkv.weight.chunk(3)
    for mixer in ("ska", "cska", "fcska", "synthesizer"):
        model = host()
        convert(model, mixer)
        attn = model.blocks[0].attn
        assert torch.equal(attn.qv.weight, torch.cat([query, value]))
        assert torch.equal(attn.proj.weight, reference.proj.weight)
    model = host()
    convert(model, "constant")
    assert torch.equal(model.blocks[0].attn.v.weight, value)


def test_fresh_weights_on_request():
    model = host()
    convert(model, "ska", keep_weights=False)
    assert not torch.equal(model.blocks[0].attn.proj.weight, host().blocks[0].attn.proj.weight)


def test_shared_weights_are_bit_identical_across_mixers():
    states = []
    for mixer in ("mhsa", "ska", "cska", "fcska"):
        model = host(seed=7)
        convert(model, mixer)
        states.append(model.state_dict())
        assert torch.initial_seed() == 7
        states[-1]["next draw"] = torch.rand(3)
    shared = set.intersection(*(set(state) for state in states))
    assert {
        "patch_embed.proj.weight",
        "blocks.1.mlp.fc1.weight",
        "blocks.0.attn.proj.weight",
        "head.weight",
    } <= shared
    for name in shared:
        assert all(torch.equal(state[name], states[0][name]) for state in states), name


def test_layers_get_different_keys_and_seeds_too():
    model = host()
    convert(model, "ska")
    assert not torch.equal(model.blocks[0].attn.static_key, model.blocks[1].attn.static_key)
    other = host(seed=1)
    convert(other, "ska")
    assert not torch.equal(model.blocks[0].attn.static_key, other.blocks[0].attn.static_key)


def test_rectangular_grid_and_drop_rates():
    model = host(img_size=(32, 48), attn_drop_rate=0.1, proj_drop_rate=0.2, qkv_bias=False)
    convert(model, "cska", mixer_args={"kernel_size": 5})
    attn = model.blocks[0].attn
    assert attn.feat_size == (4, 6)
    assert (attn.attn_drop.p, attn.proj_drop.p, attn.kernel_size) == (0.1, 0.2, 5)
    assert attn.qv.bias is None
    assert model(torch.randn(1, 3, 32, 48)).shape == (1, 5)


REFUSED = {
    "not a transformer": (lambda: timm.create_model("resnet18"), "ska", {}, "ResNet is not a timm VisionTransformer"),
    "dynamic size": (lambda: host(dynamic_img_size=True), "ska", {}, "dynamic_img_size=True"),
    "query norm": (lambda: host(qk_norm=True), "ska", {}, "blocks.0.attn is a Attention"),
    "parallel blocks": (
        lambda: host(block_fn=timm.models.vision_transformer.ParallelScalingBlock),
        "ska",
        {},
        "ParallelScalingBlock hold no attn",
    ),
    "unknown option": (host, "ska", {"kernel_size": 3}, "mixer 'ska': .*kernel_size"),
    "prefix": (host, "pool", {}, "class_token=False"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_and_leaves_the_model_alone(case):
    make, mixer, mixer_args, message = REFUSED[case]
    model = make()
    modules = list(model.modules())
    error = UnsupportedHostError if not mixer_args and mixer == "ska" else StaticKeyError
    with pytest.raises(error, match=message):
        convert(model, mixer, mixer_args=mixer_args)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))


def test_unknown_mixer_names_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown mixer 'skaa'; did you mean ska"):
        convert(host(), "skaa")
