"""The part of a page that shows attention, and what a model gives it."""

import json
import re

import numpy as np
import pytest
import timm
import torch

from statickey import MIXERS
from statickey.errors import StaticKeyError
from statickey.models import build_model
from statickey.viz import attention_explorer, attention_rollout, capture_maps, key_similarity, look, on_a_page
from statickey.viz.explorer import COARSE, FINE, pack_maps, size_on_a_page, spread, unpack_maps

SMALL = {"embed_dim": 16, "depth": 3, "num_heads": 2}


def small(mixer="ska", **options):
    return build_model("small_vit", mixer, img_size=8, in_chans=1, num_classes=3, model_args=SMALL | options).eval()


def seen(model, name="ska", images=2, size=8, chans=1):
    pictures = [torch.randint(0, 256, (chans, size, size), dtype=torch.uint8) for _ in range(images)]
    batch = torch.stack(pictures) / 255
    return look(name, model, [batch], pictures), batch


def content(page):
    return json.loads(re.search(r"id=attention-data>(.*?)</script>", page, re.S)[1])


@pytest.mark.parametrize("fineness", [FINE, COARSE])
@pytest.mark.parametrize("sharp", [0.1, 1.0, 30.0])
def test_a_number_is_the_models_to_half_a_step(fineness, sharp):
    weights = (sharp * torch.randn(3, 7, 7)).softmax(dim=-1)
    packed = pack_maps(weights, (2, 3), (2, 3), fineness)
    values, steps = unpack_maps(packed, 1)
    assert (np.abs(values - weights.numpy()) <= steps[..., None] / 2 + 1e-7).all()
    highest = weights.amax(dim=-1).numpy()
    assert steps == pytest.approx(np.maximum(highest / fineness.levels, 1 / (7 * fineness.uniform)))


def test_numbers_below_zero_and_rectangles_are_kept():
    values = torch.linspace(-1, 1, 2 * 6 * 4).reshape(2, 6, 4)
    packed = pack_maps(values, (2, 3), (1, 4))
    again, steps = unpack_maps(packed, 0)
    assert again.shape == (2, 6, 4)
    assert np.abs(again - values.numpy()).max() <= steps.max() / 2 + 1e-7


def test_layers_are_spread_evenly_up_to_the_last():
    assert spread(12, 4) == [2, 5, 8, 11]
    for total in range(1, 15):
        for count in range(1, 17):
            chosen = spread(total, count)
            assert chosen == sorted(set(chosen))
            assert len(chosen) == min(count, total)
            assert chosen[-1] == total - 1


def test_the_page_holds_what_the_model_computes():
    model = small()
    found, batch = seen(model)
    models = on_a_page([found], 10**7)
    odd = "</script><script>alert(1)</script>"
    page = attention_explorer(models, [odd, "two"])
    data = content(page)
    assert data["captions"] == [odd, "two"]
    assert odd not in page
    assert page.count("<script") == page.count("</script") == 2
    assert not re.search(r"https?://|(src|href)=", page)
    (shown,) = data["models"]
    maps = capture_maps(model, batch)
    assert [view["layer"] for view in shown["views"]["attention"]] == list(maps)
    assert list(models[0].views) == ["attention", "rollout", "keys", "prior"]
    for view, own in zip(models[0].views["attention"], maps.values(), strict=True):
        for packed, wanted in zip(view.maps, own.weights, strict=True):
            values, steps = unpack_maps(packed, 0)
            assert (np.abs(values - wanted.numpy()) <= steps[..., None] / 2 + 1e-7).all()
    values, steps = unpack_maps(models[0].views["rollout"][0].maps[1], 0)
    assert np.abs(values[0] - attention_rollout(list(maps.values()))[1].numpy()).max() <= steps.max() / 2 + 1e-6
    values, steps = unpack_maps(models[0].views["keys"][2].maps[0], 0)
    assert np.abs(values - key_similarity(model.blocks[2].attn.static_key).numpy()).max() <= steps.max() / 2 + 1e-6


def test_one_picture_that_several_models_saw_is_there_once():
    first, batch = seen(small())
    second = look("mhsa", small("mhsa"), [batch], first.pictures)
    data = content(attention_explorer(on_a_page([first, second], 10**7), ["a", "b"]))
    assert len(data["pictures"]) == 2
    assert [model["pictures"] for model in data["models"]] == [[0, 1], [0, 1]]
    assert data["models"][1]["missing"]["keys"] == "mhsa has no static key."
    assert "keys" not in data["models"][1]["views"]


def test_where_there_is_little_room_numbers_are_coarser_and_then_layers_fewer():
    found, _ = seen(small(depth=6))
    fine = found.shown()
    coarse = found.shown(fineness=COARSE)
    whole = size_on_a_page([fine])
    assert size_on_a_page([coarse]) < whole
    (all_layers,) = on_a_page([found], whole)
    assert (all_layers.fineness, all_layers.left_out) == (FINE, "")
    (kept,) = on_a_page([found], whole // 2)
    assert kept.fineness == COARSE
    layers = [view.layer for view in kept.views["attention"]]
    assert 1 <= len(layers) < 6
    assert layers[-1] == "blocks.5.attn"
    assert kept.left_out == f"{len(layers)} of 6 layers, evenly spread"
    with pytest.raises(StaticKeyError, match="not even one layer of each model fits into"):
        on_a_page([found], 500)
    with pytest.raises(StaticKeyError, match="these layers do not fit into"):
        on_a_page([found], whole // 2, [found.layers])


def test_what_rollout_and_priors_lack_is_said():
    found, _ = seen(small("ska", num_heads=4), "ska")
    assert found.shown().missing == {}
    former = build_model("skaformer_nano", None, img_size=32, num_classes=2, in_chans=1).eval()
    mixed, _ = seen(former, "former", size=32)
    shown = mixed.shown()
    assert shown.missing["rollout"].startswith("rollout needs layers that all attend on one grid, these are on 4 x 4")
    assert mixed.left_out == "1 layer left out: one token"


def test_of_partly_static_layers_the_keys_name_their_heads():
    model = small(num_heads=4)
    for block in model.blocks[1:]:
        static = MIXERS["partly_static"](16, 4, feat_size=(4, 4), dynamic_heads=(0, 2))
        block.attn = static.eval()
    shown = seen(model)[0].shown()
    names = [view.layer for view in shown.views["keys"]]
    assert names == ["blocks.0.attn", "blocks.1.attn, static heads 2, 4", "blocks.2.attn, static heads 2, 4"]
    assert [view.layer for view in shown.views["prior"]] == ["blocks.0.attn"]


def test_layers_in_windows_are_left_out_and_said():
    sizes = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "img_size": 56, "window_size": 7}
    swin = timm.create_model("swin_tiny_patch4_window7_224", num_classes=2, **sizes).eval()
    found, _ = seen(swin, "swin", size=56, chans=3)
    assert found.layers == ["layers.1.blocks.0.attn", "layers.1.blocks.1.attn"]
    assert found.left_out == "2 layers left out: attention in windows"
    assert "windows" in found.shown().missing["rollout"]
    whole = timm.create_model("swin_tiny_patch4_window7_224", num_classes=2, **sizes | {"depths": (2,)}).eval()
    with pytest.raises(
        StaticKeyError, match=r"no attention map of whole images in swin \(2 layers left out: attention in windows\)"
    ):
        seen(whole, "swin", size=56, chans=3)


def test_prefix_tokens_are_named():
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 2}
    for name, names in {
        "vit_tiny_patch16_224": ["class token"],
        "vit_small_patch14_reg4_dinov2": ["class token", *(f"register {i}" for i in range(1, 5))],
        "deit_tiny_distilled_patch16_224": ["class token", "distillation token"],
    }.items():
        found, _ = seen(timm.create_model(name, **sizes), name, size=16, chans=3)
        assert list(found.prefix_names) == names


def test_maps_of_other_shapes_are_named(monkeypatch):
    class Short(MIXERS["ska"]):
        def attention_weights(self, x, feat_size=None):
            return super().attention_weights(x, feat_size)[..., :-1]

    monkeypatch.setitem(MIXERS, "short", Short)
    with pytest.raises(
        StaticKeyError, match=r"the map of blocks.0.attn, \(2, 2, 16, 15\), is not \(B, heads, N, N\)"
    ):
        seen(small("short"), "short")


def test_pictures_of_a_model():
    drawn = dict(seen(small())[0].figures())
    assert list(drawn) == ["overlay-1", "overlay-2", "heads", "keys", "similarity"]
    (axes,) = drawn["heads"].axes
    assert len(axes.images) == 3 * 2
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"blocks.{i}.attn" for i in range(3)]
    assert drawn["similarity"].axes[0].images[0].get_clim() == (-1, 1)
