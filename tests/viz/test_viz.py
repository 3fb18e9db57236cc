import numpy as np
import pytest
import timm
import torch
from torch import nn

from statickey import StaticKeyAttention, convert
from statickey.convert import token_mixers
from statickey.errors import StaticKeyError, UnknownNameError, UnsupportedHostError
from statickey.models import build_model
from statickey.viz import attention_overlay, capture_attention, differences, key_colours, learning_curves
from tolerances import assert_close


def test_captured_maps_are_those_the_model_uses():
    model = build_model("small_vit", "ska", img_size=8, in_chans=1, num_classes=3)
    images = torch.randn(2, 1, 8, 8)
    maps = capture_attention(model, images)
    assert list(maps) == [f"blocks.{i}.attn" for i in range(4)]
    embedded = model.pos_drop(model._pos_embed(model.patch_embed(images)))
    block = model.blocks[0]
    assert_close("map", maps["blocks.0.attn"], block.attn.attention_weights(block.norm1(embedded)).detach())
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_capture_takes_the_grid_of_the_call():
    class Host(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = StaticKeyAttention(8, 2, feat_size=(4, 4))

        def forward(self, x):
            return self.attn(x, feat_size=(2, 3))

    assert capture_attention(Host(), torch.randn(1, 6, 8))["attn"].shape == (1, 2, 6, 6)


WINDOWS = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "img_size": 56, "window_size": 7}
BIASED = {
    "beit_base_patch16_224": {"embed_dim": 48, "depth": 2, "num_heads": 4, "img_size": 48},
    "swin_tiny_patch4_window7_224": WINDOWS,
    "swinv2_tiny_window8_256": WINDOWS,
}


@pytest.mark.parametrize("mixer", ["mhsa", "ska"])
@pytest.mark.parametrize("host", BIASED)
def test_captured_maps_hold_position_bias_and_masks_of_shifted_windows(host, mixer):
    model = timm.create_model(host, num_classes=2, **BIASED[host])
    for name, parameter in model.named_parameters():
        if "bias_table" in name or "cpb_mlp" in name:
            nn.init.normal_(parameter)
    convert(model, mixer)
    model.eval()
    seen = {}
    for name, module in token_mixers(model).items():
        module.register_forward_hook(
            lambda m, args, kwargs, out, n=name: seen.update({n: (args[0], out)}), with_kwargs=True
        )
    size = BIASED[host]["img_size"]
    maps = capture_attention(model, torch.randn(2, 3, size, size))
    assert list(maps) == list(token_mixers(model)) == list(seen)
    for name, module in token_mixers(model).items():
        tokens, out = seen[name]
        packed = module.qkv if mixer == "mhsa" else module.qv
        value = packed(tokens).chunk(3 if mixer == "mhsa" else 2, dim=-1)[-1]
        value = value.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        mixed = (maps[name] @ value).transpose(1, 2).flatten(2)
        assert_close(name, module.proj(mixed), out)
    if "swin" in host:  # in the last window of a shifted block most pairs of tokens are not neighbours
        shifted = maps["layers.0.blocks.1.attn.mixer"]
        assert shifted.shape == (8, 2, 49, 49)
        assert (shifted[3] < 1e-6).float().mean() > 0.5


def test_only_the_layers_asked_for_are_computed(monkeypatch):
    model = build_model("small_vit", "ska", img_size=8, in_chans=1, num_classes=3)
    images = torch.randn(2, 1, 8, 8)
    whole = capture_attention(model, images)
    computed = []
    whole_map = StaticKeyAttention.attention_weights
    monkeypatch.setattr(
        StaticKeyAttention,
        "attention_weights",
        lambda *args, **kwargs: computed.append(1) or whole_map(*args, **kwargs),
    )
    found = capture_attention(model, images, ["blocks.2.attn"])
    assert list(found) == ["blocks.2.attn"]
    assert len(computed) == 1
    assert torch.equal(found["blocks.2.attn"], whole["blocks.2.attn"])
    assert capture_attention(model, images, []) == {}


def test_what_has_no_map_is_refused():
    images = torch.randn(2, 1, 8, 8)
    former = build_model("skaformer_nano", None, img_size=32, num_classes=2, in_chans=1)
    for layers, message in {
        ("blocks.0.attn",): "unknown layer with an attention map 'blocks.0.attn'; did you mean stages.3.blocks.0",
        ("stages.0.blocks.0.token_mixer",): "unknown layer with an attention map 'stages.0.blocks.0.token_mixer'",
        (3,): "layer with an attention map=3 must be a name, such as stages",
    }.items():
        with pytest.raises(UnknownNameError, match=message):
            capture_attention(former, images, layers)
    with pytest.raises(StaticKeyError, match=r"layers='last' must be a list of names, such as \['last'\]"):
        capture_attention(former, images, "last")
    with pytest.raises(UnsupportedHostError, match="ResNet"):
        capture_attention(timm.create_model("resnet18"), torch.randn(1, 3, 32, 32))


def host_maps(model, images):
    """The maps of timm's plain attention, by its own code."""
    maps = {}
    for name, module in model.named_modules():
        if hasattr(module, "attn_drop"):
            module.fused_attn = False
            module.attn_drop.register_forward_hook(lambda m, a, out, n=name: maps.update({n: out.detach()}))
    with torch.no_grad():
        model(images)
    return maps


@pytest.mark.parametrize("host", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", *BIASED])
def test_maps_of_a_host_as_it_is(host):
    small = {"embed_dim": 48, "depth": 2, "num_heads": 4, "img_size": 32, "patch_size": 8}
    model = timm.create_model(host, num_classes=2, **BIASED.get(host, small)).train()
    model.blocks[0].eval() if hasattr(model, "blocks") else None
    modes = [module.training for module in model.modules()]
    kinds, state = [type(module) for module in model.modules()], {k: v.clone() for k, v in model.state_dict().items()}
    images = torch.randn(2, 3, *[BIASED.get(host, small)["img_size"]] * 2)
    maps = capture_attention(model, images)
    assert [type(module) for module in model.modules()] == kinds
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    wanted = host_maps(model.eval(), images)
    assert list(maps) == list(wanted)
    for name, own in maps.items():
        assert_close(name, own, wanted[name])
    last = list(maps)[-1]
    assert list(capture_attention(model, images, [last])) == [last]
    with pytest.raises(UnknownNameError, match=r"unknown layer with an attention map 'blocks\.9\.attn'"):
        capture_attention(model, images, ["blocks.9.attn"])


def test_maps_of_a_transformers_model_as_it_is():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
    model = transformers.ViTForImageClassification(transformers.ViTConfig(num_hidden_layers=2, **sizes)).eval()
    images = torch.randn(2, 3, 32, 32)
    maps = capture_attention(model, images)
    model.set_attn_implementation("eager")
    wanted = model(images, output_attentions=True).attentions
    assert len(maps) == len(wanted) == 2
    for (name, own), other in zip(maps.items(), wanted, strict=True):
        assert_close(name, own, other.detach())


def test_a_partly_converted_model_shows_both_kinds():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=2).eval()
    convert(model, "ska", layers=-1)
    images = torch.randn(1, 3, 32, 32)
    maps = capture_attention(model, images)
    assert sorted(maps) == ["blocks.0.attn", "blocks.1.attn"]
    assert_close(
        "static", maps["blocks.1.attn"], capture_attention(model, images, ["blocks.1.attn"])["blocks.1.attn"]
    )
    assert_close("host's", maps["blocks.0.attn"], host_maps(model, images)["blocks.0.attn"])


def test_maps_of_a_copy_that_computes_otherwise_are_refused():
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=2)

        def forward(self, x):
            return self.model(x + torch.randn_like(x))

    with pytest.raises(StaticKeyError, match=r"output differs by .* from that of the copy whose maps are read"):
        capture_attention(Random(), torch.randn(1, 3, 32, 32))


def test_capture_leaves_frozen_modules_as_they_were():
    model = build_model("small_vit", "ska", img_size=8, in_chans=1, num_classes=3)
    model.blocks[1].eval()
    capture_attention(model, torch.randn(1, 1, 8, 8))
    assert model.blocks[0].attn.training
    assert not model.blocks[1].attn.training


def test_key_colours_refuse_what_has_no_grid():
    for key, message in {
        torch.randn(2, 9): r"key \(2, 9\) of torch.float32 cannot be drawn on feat_size=\(2, 3\) with 1 prefix",
        torch.randn(2, 6, 4): r"takes floats \(heads, 7, ...\); pass the grid the key was built for",
        torch.zeros(2, 7, 4, dtype=torch.long): "of torch.int64 cannot be drawn",
    }.items():
        with pytest.raises(StaticKeyError, match=message):
            key_colours(key, 1, (2, 3))
    with pytest.raises(StaticKeyError, match=r"feat_size=7 must be a pair \(H, W\)"):
        key_colours(torch.randn(2, 7, 4), 0, 7)


def test_key_colours_show_differences_between_rows_only():
    key = torch.randn(2, 1 + 35, 4)
    pictures = key_colours(key, 1, (7, 5))
    assert pictures.shape == (2, 7, 5, 3)
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    shifted = key + torch.randn(2, 1, 4)
    torch.testing.assert_close(key_colours(shifted, 1, (7, 5)), pictures, atol=1e-4, rtol=0)
    assert_close("equal rows", key_colours(torch.ones(1, 4, 2), 0, (2, 2)), torch.full((1, 2, 2, 3), 0.5))


def test_overlays_colour_what_differs_from_uniform_attention():
    image = np.full((8, 8, 3), 0.5)
    uniform = torch.full((2, 17, 17), 1 / 17)
    peaked = uniform.clone()
    peaked[0, 0] = torch.tensor([0.0] * 16 + [1.0])  # the class token looks at the last patch

    def levels(weights):
        axes = attention_overlay(image, weights, (4, 4), "a_$x$.png").axes
        assert [text.get_text() for text in axes[-1].get_xticklabels()][:2] == ["0", "1/N (uniform)"]
        return [np.asarray(panel.images[-1].get_array()) for panel in axes[2:4]]

    np.testing.assert_allclose(levels(uniform), 0, atol=1e-6)
    first, second = levels(peaked)
    assert first[3, 3] == pytest.approx(1)
    assert first[0, 0] == pytest.approx(-1)
    np.testing.assert_allclose(second, 0, atol=1e-6)


@pytest.mark.parametrize("seeds", [1, 3])
def test_figures_draw(seeds):
    curve = [{"epoch": e, "holdout_accuracy": 10.0 * e, "train_loss": 1 / e} for e in (1, 2)]
    shown = {"holdout_accuracy": "held-out accuracy, %", "train_loss": "training loss"}
    accuracy, loss = learning_curves({"mhsa": [curve] * seeds, "ska": [curve] * seeds}, shown)
    assert loss.axes[0].get_title(loc="left") == "training loss"
    lines = accuracy.axes[0].lines
    assert [line.get_label() for line in lines] == ["mhsa", "ska"]
    np.testing.assert_allclose(lines[0].get_ydata(), [10, 20])
    interval = None if seeds == 1 else (-1.0, 2.0)
    row = {"mixer": "ska", "difference": {"mean": 0.5, "interval": interval, "image_interval": (-0.2, 1.1)}}
    rows = [{"mixer": "mhsa", "difference": None}, row]
    axes = differences(rows, {"ska": [0.5] * seeds}, "accuracy minus mhsa, points").axes[0]
    assert axes.get_xlabel() == "accuracy minus mhsa, points"
    assert [t.get_text() for t in axes.get_yticklabels()] == ["ska"]


@pytest.mark.parametrize("seeds", [1, 3])
def test_one_epoch_is_a_point(seeds):
    curve = [{"epoch": 1, "train_loss": 2.0}]
    (figure,) = learning_curves({"mhsa": [curve] * seeds, "ska": [curve] * seeds}, {"train_loss": "training loss"})
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["mhsa", "ska"]
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in points] == [(0, 2.0), (1, 2.0)]
