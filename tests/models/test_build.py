import pytest
import torch

from statickey.errors import StaticKeyError, UnknownNameError
from statickey.models import build_model, count_macs, small_vit


def closed_form_macs(mixer, dim, heads, tokens, depth, hidden, patch_inputs, classes):
    width = dim // heads
    logits = {"mhsa": width, "ska": width, "cska": 9 * width, "fcska": width}[mixer] * heads * tokens**2
    projections = (4 if mixer == "mhsa" else 3) * dim * dim * tokens
    query_conv = 9 * width * dim * tokens if mixer == "fcska" else 0
    block = projections + query_conv + logits + dim * tokens**2 + 2 * dim * hidden * tokens
    return depth * block + patch_inputs * dim * tokens + dim * classes


@pytest.mark.parametrize("mixer", ["mhsa", "ska", "cska", "fcska"])
def test_macs_match_the_closed_form(mixer):
    model = build_model("small_vit", mixer, img_size=32, num_classes=10)
    expected = closed_form_macs(mixer, 96, 4, 64, 4, 192, 48, 10)
    assert count_macs(model, (3, 32, 32)) == expected
    assert model.training
    assert {m.backend for m in model.modules() if hasattr(m, "backend")} == {"sdpa"}


def test_small_vit_sizes_follow_the_image():
    digits = small_vit(8, num_classes=10, in_chans=1)
    assert digits.patch_embed.grid_size == (4, 4)
    assert digits.embed_dim == 64
    assert small_vit(32, num_classes=10).patch_embed.grid_size == (8, 8)
    assert small_vit(8, num_classes=10, patch_size=4, embed_dim=32).patch_embed.grid_size == (2, 2)


def test_any_timm_vision_transformer_by_name():
    model = build_model("vit_tiny_patch16_224", "ska", img_size=32, num_classes=3, model_args={"depth": 1})
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    assert model.blocks[0].attn.feat_size == (2, 2)
    assert model.blocks[0].attn.num_prefix_tokens == 1


def test_one_seed_one_set_of_weights():
    first, second, other = (build_model("small_vit", "ska", img_size=8, num_classes=2, seed=s) for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.pos_embed, other.pos_embed)


@pytest.mark.parametrize(
    ("name", "args", "error", "message"),
    [
        ("smal_vit", {}, UnknownNameError, "unknown model 'smal_vit'; did you mean small_vit"),
        (
            "small_vit",
            {"patch_size": 5},
            StaticKeyError,
            r"patch_size=5 does not divide img_size=32; use one of \[2, 4, 8\]",
        ),
        ("small_vit", {"embed_dim": 50}, StaticKeyError, "dim=50 is not divisible by num_heads=4; use num_heads in"),
        ("small_vit", {"widht": 50}, StaticKeyError, "widht"),
        (
            "vit_tiny_patch16_224",
            {"patch_size": 12},
            StaticKeyError,
            "patch size 12 .* does not divide img_size=32; resize to img_size=24",
        ),
        (
            "small_vit",
            {"num_classes": 7},
            StaticKeyError,
            "num_classes=7 in model_args: it comes from the data; leave",
        ),
        ("vit_tiny_patch16_224", {"in_chans": 1}, StaticKeyError, "in_chans=1 in model_args: it comes from the data"),
        ("skaformer_nano", {"img_size": 64}, StaticKeyError, "img_size=64 in model_args: it is an option of its own"),
        ("resnet18", {}, StaticKeyError, "ResNet is not a host this can convert"),
    ],
)
def test_refuses(name, args, error, message):
    with pytest.raises(error, match=message):
        build_model(name, "ska", img_size=32, num_classes=2, model_args=args)
