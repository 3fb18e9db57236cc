"""Attention some of whose heads have a static key: exact at both ends, and against its naive twin between."""

import pytest
import torch
from timm.models import create_model
from torch import nn

from statickey import StaticKeyAttention, convert
from statickey.errors import StaticKeyError
from statickey.layers import HeadMix, PartlyStaticAttention, SelfAttention
from statickey.ops import reference
from tolerances import assert_close, assert_same_with_gradients

GRID, DIM, HEADS = (3, 2), 12, 4
CASES = {
    "half": {"dynamic_heads": (0, 2)},
    "half, key bias": {"dynamic_heads": (3, 1), "bias": "key", "num_prefix_tokens": 1, "qkv_bias": True},
    "one, map bias": {"dynamic_heads": (1,), "bias": "map", "num_prefix_tokens": 2},
    "none, map bias": {"bias": "map", "learned_temperature": True},
    "none, key bias": {"bias": "key", "scale": 0.3, "head_dim": 5},
    "no diagonal": {"dynamic_heads": (1,), "bias": "map", "mask_diagonal": True},
}


def make(**kwargs):
    layer = PartlyStaticAttention(DIM, HEADS, feat_size=GRID, dtype=torch.float64, **kwargs)
    for bias in (layer.key_bias, layer.map_bias):
        if bias is not None:
            nn.init.normal_(bias)
    return layer


def tokens(layer, batch=2):
    return torch.randn(batch, layer.num_tokens, layer.dim, dtype=torch.float64)


def naive(layer, x, attn_mask=None):
    """Head by head, by the formula."""
    batch, count, width = *x.shape[:2], layer.head_dim
    query, value = (part.reshape(batch, count, HEADS, width) for part in layer.qv(x).chunk(2, dim=2))
    out = torch.zeros_like(value)
    scale = layer.scale if layer.log_temperature is None else layer.log_temperature.exp()
    keys = layer.k(x).reshape(batch, count, -1, width) if layer.dynamic_heads else None
    for head in range(HEADS):
        mask = None if attn_mask is None else attn_mask[head]
        bias = None
        if head in layer.dynamic_heads:
            key = keys[:, :, layer.dynamic_heads.index(head)]
        else:
            place = layer.static_heads.index(head)
            key = layer.static_key[place].expand(batch, -1, -1)
            bias = None if layer.key_bias is None else layer.key_bias[place : place + 1]
            if layer.map_bias is not None:
                mask = layer.map_bias[place] + (0 if mask is None else mask)
        for image in range(batch):
            one = (query[image, :, head], key[image], value[image, :, head])
            queries, own, values = (part[None, None] for part in one)
            out[image, :, head] = reference.static_key_attention(
                queries, own[0], values, key_bias=bias, scale=scale, mask_diagonal=layer.mask_diagonal, attn_mask=mask
            )[0, 0]
    return layer.proj(out.flatten(2))


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("case", CASES)
def test_matches_naive_twin(case, backend, masked):
    layer = make(**CASES[case])
    layer.backend = backend
    mask = torch.randn(HEADS, layer.num_tokens, layer.num_tokens, dtype=torch.float64) if masked else None
    names, parameters = zip(*layer.named_parameters(), strict=True)

    class Called(nn.Module):
        def __init__(self, call):
            super().__init__()
            self.layer, self.call = layer, call

        def forward(self, x):
            return self.call(self.layer, x, attn_mask=mask)

    def run(call):
        def of(x, *values):
            arguments = {f"layer.{name}": value for name, value in zip(names, values, strict=True)}
            return torch.func.functional_call(Called(call), arguments, (x,))

        return of

    fused = run(lambda layer, x, attn_mask: layer(x, attn_mask=attn_mask))
    assert_same_with_gradients(fused, run(naive), [tokens(layer), *parameters])


def test_all_heads_dynamic_is_self_attention():
    layer, twin = make(dynamic_heads=range(HEADS), qkv_bias=True), None
    twin = SelfAttention(DIM, HEADS, feat_size=GRID, qkv_bias=True, dtype=torch.float64)
    with torch.no_grad():
        for name in ("weight", "bias"):
            query, value = getattr(layer.qv, name).chunk(2)
            getattr(twin.qkv, name).copy_(torch.cat([query, getattr(layer.k, name), value]))
    twin.proj.load_state_dict(layer.proj.state_dict())
    x = tokens(layer)
    assert torch.equal(layer(x), twin(x))
    assert layer.static_key is None
    assert layer.macs() == twin.macs()
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in twin.parameters())


def test_no_head_dynamic_and_no_bias_is_static_key_attention():
    layer = make()
    twin = StaticKeyAttention(DIM, HEADS, feat_size=GRID, dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    x = tokens(layer)
    assert torch.equal(layer(x), twin(x))
    assert layer.macs() == twin.macs()


def test_talking_heads_mix_the_logits_of_both_kinds():
    layer = make(dynamic_heads=(1, 2), bias="key")
    layer.head_mix = HeadMix(*(nn.Linear(HEADS, HEADS, dtype=torch.float64) for _ in range(2)))
    x = tokens(layer)
    query, value = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in layer.qv(x).chunk(2, dim=2))
    dynamic = layer.k(x).unflatten(2, (2, -1)).transpose(1, 2)
    static, bias = layer.static_key.expand(2, -1, -1, -1), layer.key_bias[:, None]
    logits = [query[:, 0] @ static[:, 0].mT + bias[0], query[:, 1] @ dynamic[:, 0].mT]
    logits += [query[:, 2] @ dynamic[:, 1].mT, query[:, 3] @ static[:, 1].mT + bias[1]]
    weights = layer.head_mix.logits(layer.scale * torch.stack(logits, dim=1)).softmax(-1)
    out = layer.proj((layer.head_mix.weights(weights) @ value).transpose(1, 2).flatten(2))
    assert_close("output", layer(x), out)


@pytest.mark.parametrize("bias", ["key", "map"])
def test_a_bias_is_resampled_as_keys_are(bias):
    """On another grid a call, a rebuilt layer and a loaded state agree, and a bias that is one number stays that."""
    layer = make(dynamic_heads=(1,), bias=bias, num_prefix_tokens=1)
    state = layer.state_dict()
    x = torch.randn(2, 1 + 5 * 4, DIM, dtype=torch.float64)
    expected = layer(x, (5, 4))
    other = PartlyStaticAttention(
        DIM, HEADS, feat_size=(5, 4), dynamic_heads=(1,), bias=bias, num_prefix_tokens=1, dtype=torch.float64
    )
    with pytest.raises(StaticKeyError, match="built for"):
        other.load_state_dict(state)
    state = other.resample_state(state, GRID)
    state["_extra_state"] = other.get_extra_state()
    other.load_state_dict(state)
    assert_close("loaded", other(x), expected)
    layer.set_input_size((5, 4))
    assert_close("rebuilt", layer(x), expected)
    tensor = getattr(layer, f"{bias}_bias")
    assert tensor.shape[1:] == ((21,) if bias == "key" else (21, 21))
    assert f"{bias}_bias" in layer.no_weight_decay()


def test_keys_on_a_grid_of_their_own_are_those_of_cells():
    layer = make(dynamic_heads=(1,), bias="map", key_size=(3, 1))
    assert layer.static_key.shape == (3, 3, 3)
    full = make(dynamic_heads=(1,), bias="map")
    cells = torch.tensor([0, 0, 1, 1, 2, 2])
    with torch.no_grad():
        for part in ("qv", "k", "proj"):
            getattr(full, part).load_state_dict(getattr(layer, part).state_dict())
        full.static_key.copy_(layer.static_key[:, cells])
        full.map_bias.copy_(layer.map_bias[:, cells][:, :, cells])
    x = tokens(layer)
    assert_close("output", layer(x), full(x))


REFUSED = {
    "no list": ({"dynamic_heads": "0"}, r"dynamic_heads='0' must be a list of heads, such as \[0, 3\]"),
    "no such head": ({"dynamic_heads": (4,)}, "dynamic_heads has 4; the layer has heads 0 to 3"),
    "no number": ({"dynamic_heads": (True,)}, "dynamic_heads has True; the layer has heads 0 to 3"),
    "twice": ({"dynamic_heads": (1, 1)}, r"dynamic_heads=\[1, 1\] names a head twice"),
    "bias": ({"bias": "row"}, "bias='row' must be None, 'key' or 'map'"),
    "windows": ({"dynamic_heads": (1,), "off_grid": "window"}, "off_grid='window' with dynamic heads or bias='map'"),
    "windows of a map": ({"bias": "map", "off_grid": "window"}, "off_grid='window' with dynamic heads or bias='map'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    arguments, message = REFUSED[case]
    with pytest.raises(StaticKeyError, match=message):
        make(**arguments)


def test_windows_are_refused_on_a_built_layer_too():
    layer = make(dynamic_heads=(1,))
    with pytest.raises(StaticKeyError, match="off_grid='window' with dynamic heads"):
        layer.set_off_grid("window")
    assert layer.off_grid == "resample"


def test_the_swap_carries_every_projection_over():
    """With all heads dynamic a converted host computes what it did; with some, those heads' keys are the host's."""
    model = create_model("vit_tiny_patch16_224", img_size=32, depth=2, qk_norm=True, num_classes=3).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before, weight = model(x), model.blocks[0].attn.qkv.weight.detach().clone()
    convert(model, "partly_static", layers=1, mixer_args={"dynamic_heads": [0, 1, 2]})
    assert_close("output", model(x), before)
    convert(model, "partly_static", layers=0, mixer_args={"dynamic_heads": [2], "bias": "map"})
    assert torch.equal(model.blocks[0].attn.k.weight, weight[192 + 128 : 384])
    assert isinstance(model.blocks[0].attn.k_norm, nn.LayerNorm)
    model.set_input_size((48, 64))
    assert model(torch.randn(2, 3, 48, 64, dtype=torch.float64)).shape == (2, 3)


def test_a_partly_static_layer_is_converted_again():
    """To its own kind with all it has; its dynamic keys cannot be had where there are none, nor let go unsaid."""
    model = create_model("vit_tiny_patch16_224", img_size=32, depth=1, qk_norm=True, num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    args = {"dynamic_heads": [1], "bias": "map"}
    convert(model, "partly_static", mixer_args=args)
    nn.init.normal_(model.blocks[0].attn.map_bias)
    before = model(x)
    report = convert(model, "partly_static", mixer_args=args)
    assert report.modules[0].key_carried
    assert_close("output", model(x), before)
    with pytest.raises(StaticKeyError, match=r"has keys of the input for heads \[1\], not for dynamic_heads=\[0\]"):
        convert(model, "partly_static", mixer_args={"dynamic_heads": [0]})
    assert not convert(model, "ska").modules[0].key_carried
    with pytest.raises(StaticKeyError, match=r"has keys of the input for heads \[\], not for"):
        convert(model, "partly_static", mixer_args={"dynamic_heads": [0]})
