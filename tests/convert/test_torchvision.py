import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models import SwinTransformer, VisionTransformer
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

from statickey import HostRule, Site, convert, register_host_rule
from statickey.convert import token_mixers
from statickey.errors import StaticKeyError, UnsupportedHostError
from tolerances import assert_close

SWIN = {
    "patch_size": [2, 2],
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": [4, 4],
    "num_classes": 5,
}
V2 = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}


class ViTStyleAttention(nn.Module):
    """In the style of vit-pytorch: a norm of its own, ``to_qkv`` without bias, heads of any width, ``to_out``."""

    def __init__(self, dim, heads, dim_head):
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(0.1))

    def forward(self, x):
        parts = self.to_qkv(self.norm(x)).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        weights = (query @ key.transpose(-1, -2) * self.scale).softmax(dim=-1)
        return self.to_out((weights @ value).transpose(1, 2).flatten(2))


class ViTStyle(nn.Module):
    def __init__(self, image_size=32, patch_size=8, dim=24):
        super().__init__()
        self.grid = (image_size // patch_size, image_size // patch_size)
        self.to_patch_embedding = nn.Conv2d(3, dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, dim))
        self.layers = nn.ModuleList(
            nn.ModuleList([ViTStyleAttention(dim, heads=3, dim_head=10), nn.Linear(dim, dim)]) for _ in range(2)
        )
        self.mlp_head = nn.Linear(dim, 5)

    def forward(self, images):
        x = self.to_patch_embedding(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for attention, feed_forward in self.layers:
            x = x + attention(x)
            x = x + feed_forward(x)
        return self.mlp_head(x[:, 0])


def vit_style_sites(model):
    return {
        f"layers.{index}.0": Site.of(
            attention,
            feat_size=model.grid,
            num_prefix_tokens=1,
            num_heads=attention.heads,
            qkv_weight=attention.to_qkv.weight,
            proj=attention.to_out[0],
            proj_drop=attention.to_out[1].p,
            wrap=partial(nn.Sequential, attention.norm),
        )
        for index, (attention, _) in enumerate(model.layers)
    }


register_host_rule(HostRule(host=ViTStyle, sites=vit_style_sites))


HOSTS = {
    "vit": lambda: VisionTransformer(32, 8, 2, 3, 24, 32, attention_dropout=0.1, num_classes=5),
    "swin": lambda: SwinTransformer(**SWIN),
    "swin v2": lambda: SwinTransformer(**SWIN, **V2),
    "in vit-pytorch's style": ViTStyle,
}
SIZES = [("vit", (32, 32)), ("in vit-pytorch's style", (32, 32))] + [
    (name, size) for name in ("swin", "swin v2") for size in ((32, 32), (36, 28), (16, 40), (6, 6))
]


def build(name):
    torch.manual_seed(0)
    model = HOSTS[name]().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.1, std=0.2)
    return model


def images(height=32, width=32):
    return torch.randn(2, 3, height, width, dtype=torch.float64)


@pytest.mark.parametrize(("name", "size"), SIZES, ids=str)
def test_self_attention_keeps_the_function(name, size):
    model, x = build(name), images(*size)
    before = model(x)
    report = convert(model, "mhsa")
    assert_close("logits", model(x), before)
    assert report.macs_before == report.macs_after > 0


@pytest.mark.parametrize("mixer", ["ska", "cska"])
@pytest.mark.parametrize("name", HOSTS)
def test_trains_saves_and_loads(name, mixer):
    model, x = build(name), images()
    convert(model, mixer)
    model.train()(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert any(name.endswith("_key") for name in model.no_weight_decay())
    model.eval()
    other = build(name)
    convert(other, mixer)
    other.load_state_dict(model.state_dict())
    out = model(x)
    assert_close("loaded", other(x), out)
    assert torch.equal(copy.deepcopy(model)(x), out)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), out)


@pytest.mark.parametrize("mixer", ["mhsa", "ska", "fcska"])
@pytest.mark.parametrize("name", ["vit", "swin", "swin v2"])
def test_self_attention_can_be_swapped_again(name, mixer):
    model, twin, x = build(name), build(name), images()
    convert(model, "mhsa")
    again, once = convert(model, mixer), convert(twin, mixer)
    assert_close("logits", model(x), twin(x))
    assert again.macs_after == once.macs_after


def test_another_size_of_images():
    model = build("vit")
    convert(model, "ska")
    model.set_input_size(48)
    assert {mixer.feat_size for mixer in token_mixers(model).values()} == {(6, 6)}
    assert model(images(48, 48)).shape == (2, 5)
    with pytest.raises(UnsupportedHostError, match="img_size=50 must be a multiple of the patch size 8"):
        model.set_input_size(50)


def test_a_common_window_size_follows_no_image():
    model = build("swin")
    convert(model, "cska")
    assert {mixer.feat_size for mixer in token_mixers(model).values()} == {(4, 4)}
    assert model(images(48, 20)).shape == (2, 5)


@pytest.mark.parametrize("name", ["vit", "swin v2"])
def test_exports_and_traces(name):
    model, x = build(name), images()
    convert(model, "ska")
    exported = torch.export.export(model, (x,))
    assert_close("exported", exported.module()(x), model(x))
    node = "encoder.ln" if name == "vit" else "norm"
    features = create_feature_extractor(model, {node: "features"}).eval()
    assert features(x)["features"].isfinite().all()


def test_refuses_attention_of_another_kind():
    class Own(nn.MultiheadAttention):
        pass

    model = build("vit")
    model.encoder.layers.encoder_layer_1.self_attention = Own(24, 3, batch_first=True)
    with pytest.raises(UnsupportedHostError, match=r"encoder_layer_1.self_attention is a Own; supported: Multihead"):
        convert(model, "ska")
    with pytest.raises(StaticKeyError, match="a position bias, for which mixer 'pool'"):
        convert(build("swin"), "pool")
