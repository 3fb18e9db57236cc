import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from statickey import (
    ConvStaticKeyAttention,
    FactorizedConvStaticKeyAttention,
    StaticKeyAttention,
)
from statickey.errors import FeatSizeError, StaticKeyError
from statickey.ops import reference, resample_static_key
from tolerances import assert_close, assert_same_with_gradients

LAYERS = [StaticKeyAttention, ConvStaticKeyAttention, FactorizedConvStaticKeyAttention]
GRID, DIM, HEADS = (7, 5), 12, 3


def make(cls, **kwargs):
    layer = cls(DIM, HEADS, feat_size=GRID, dtype=torch.float64, **kwargs)
    with torch.no_grad():  # keys large enough that every path shows in the output
        for name in layer.grid_parameters:
            if getattr(layer, name) is not None:
                getattr(layer, name).normal_()
    return layer


def tokens(layer, batch=2, feat_size=GRID):
    num_tokens = layer.num_prefix_tokens + feat_size[0] * feat_size[1]
    return torch.randn(batch, num_tokens, layer.dim, dtype=torch.float64)


def naive(layer, x):
    """The layer by its formula: one token, one head at a time where it matters."""
    heads, width, prefix = layer.num_heads, layer.head_dim, layer.num_prefix_tokens

    def split(y):
        return y.reshape(*y.shape[:2], heads, width).transpose(1, 2)

    if layer.query_proj:
        query, value = (split(part) for part in layer.qv(x).chunk(2, dim=2))
    else:
        query, value = split(x), split(layer.v(x))
    scale = layer.scale if layer.log_temperature is None else layer.log_temperature.exp()
    common = {"scale": scale, "mask_diagonal": layer.mask_diagonal}
    first, grid = query[:, :, :prefix], query[:, :, prefix:]
    if isinstance(layer, ConvStaticKeyAttention):
        unfolded = reference.unfold_queries(grid, GRID, layer.kernel_size)
        key = layer.conv_key.permute(0, 1, 3, 4, 2).flatten(2)
        out = reference.static_key_attention(
            unfolded, key, value, key_bias=layer.conv_bias, query_offset=prefix, **common
        )
        if prefix:
            out = torch.cat([reference.static_key_attention(first, layer.prefix_key, value, **common), out], 2)
    else:
        if isinstance(layer, FactorizedConvStaticKeyAttention):
            convs = layer.query_conv.weight.chunk(heads), layer.query_conv.bias.chunk(heads)
            maps = grid.transpose(2, 3).unflatten(3, GRID)
            per_head = [F.conv2d(maps[:, h], convs[0][h], convs[1][h], padding="same") for h in range(heads)]
            grid = torch.stack(per_head, dim=1).flatten(3).transpose(2, 3)
        out = reference.static_key_attention(torch.cat([first, grid], 2), layer.static_key, value, **common)
    return layer.proj(out.transpose(1, 2).flatten(2))


OPTIONS = {
    "plain": {},
    "one prefix": {"num_prefix_tokens": 1},
    "five prefix": {"num_prefix_tokens": 5, "qkv_bias": True},
    "temperature": {"learned_temperature": True, "num_prefix_tokens": 1},
    "no diagonal": {"mask_diagonal": True, "num_prefix_tokens": 1},
    "own query": {"query_proj": False, "num_prefix_tokens": 1},
    "odd head": {"head_dim": 5, "scale": 0.3},
    "no bias": {"proj_bias": False},
}


@pytest.mark.parametrize("backend", ["sdpa", "math"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("cls", LAYERS)
def test_matches_naive_twin(cls, options, backend):
    layer = make(cls, **OPTIONS[options])
    layer.backend = backend
    for batch in (1, 3):
        x = tokens(layer, batch)
        names, parameters = zip(*layer.named_parameters(), strict=True)

        def call(forward, *values, names=names):
            arguments = dict(zip(names, values[1:], strict=True))
            return torch.func.functional_call(Wrapped(layer, forward), prefixed(arguments), (values[0],))

        assert_same_with_gradients(
            lambda *v, call=call: call(layer_forward, *v), lambda *v, call=call: call(naive, *v), [x, *parameters]
        )


class Wrapped(nn.Module):
    def __init__(self, layer, forward):
        super().__init__()
        self.layer, self.call = layer, forward

    def forward(self, x):
        return self.call(self.layer, x)


def prefixed(arguments):
    return {f"layer.{name}": value for name, value in arguments.items()}


def layer_forward(layer, x):
    return layer(x)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
def test_cska_is_grouped_convolution_softmax_product(kernel_size):
    layer = make(ConvStaticKeyAttention, kernel_size=kernel_size)

    def by_convolution(module, x):
        query, value = (
            part.reshape(*x.shape[:2], HEADS, -1).transpose(1, 2) for part in module.qv(x).chunk(2, dim=2)
        )
        out = reference.conv_static_key_attention(
            query, module.conv_key, module.conv_bias, value, feat_size=GRID, scale=module.scale
        )
        return module.proj(out.transpose(1, 2).flatten(2))

    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(forward, x, *values):
        arguments = dict(zip(names, values, strict=True))
        return torch.func.functional_call(Wrapped(layer, forward), prefixed(arguments), (x,))

    assert_same_with_gradients(
        lambda *v: call(layer_forward, *v), lambda *v: call(by_convolution, *v), [tokens(layer), *parameters]
    )


def test_attributes_and_shapes():
    ska = StaticKeyAttention(12, 3, feat_size=GRID, num_prefix_tokens=2)
    assert ska.static_key.shape == (3, 37, 4)
    assert ska.qv.weight.shape == (24, 12)
    assert ska.qv.bias is None
    assert ska.proj.weight.shape == (12, 12)
    assert ska.log_temperature is None
    cska = ConvStaticKeyAttention(12, 3, feat_size=GRID, num_prefix_tokens=2, kernel_size=5)
    assert cska.conv_key.shape == (3, 37, 4, 5, 5)
    assert cska.conv_bias.shape == (3, 37)
    assert cska.prefix_key.shape == (3, 37, 4)
    assert not hasattr(cska, "static_key")
    assert ConvStaticKeyAttention(12, 3, feat_size=GRID).prefix_key is None
    fcska = FactorizedConvStaticKeyAttention(12, 3, feat_size=GRID, head_dim=6)
    assert fcska.query_conv.weight.shape == (18, 6, 3, 3)
    assert fcska.static_key.shape == (3, 35, 6)
    assert fcska.proj.weight.shape == (12, 18)
    plain = StaticKeyAttention(12, 3, feat_size=GRID, query_proj=False, learned_temperature=True)
    assert plain.v.weight.shape == (12, 12)
    assert not hasattr(plain, "qv")
    assert plain.log_temperature.shape == ()
    assert plain.log_temperature.exp().item() == pytest.approx(0.5)


@pytest.mark.parametrize("cls", LAYERS)
def test_query_rows_come_first_in_qv(cls):
    layer = make(cls)
    x = tokens(layer)
    with torch.no_grad():
        layer.qv.weight[:DIM] = 0  # queries vanish: CSKA and fcska keep their biases, maps stay constant
    first, second = layer.attention_weights(x), layer.attention_weights(tokens(layer))
    if cls is not StaticKeyAttention:
        assert_close("middle row", first[:, :, 17], second[:, :, 17])
    else:
        assert_close("maps", first, torch.full_like(first, 1 / 35))


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("cls", LAYERS)
def test_set_input_size_resamples_every_key(cls, prefix):
    layer = make(cls, num_prefix_tokens=prefix)
    before = {name: getattr(layer, name) for name in layer.grid_parameters}
    layer.set_input_size((4, 6))
    assert layer.feat_size == (4, 6)
    for name, old in before.items():
        if old is None:
            assert getattr(layer, name) is None
            continue
        new = getattr(layer, name)
        assert isinstance(new, nn.Parameter)
        assert_close(name, new, resample_static_key(old, GRID, (4, 6), num_prefix_tokens=prefix))
    assert layer(tokens(layer, feat_size=(4, 6))).shape == (2, prefix + 24, DIM)


@pytest.mark.parametrize("cls", LAYERS)
def test_set_input_size_to_the_same_grid_changes_nothing(cls):
    layer = make(cls, num_prefix_tokens=1)
    x = tokens(layer)
    before, parameters = layer(x), list(layer.parameters())
    layer.set_input_size(GRID)
    assert torch.equal(layer(x), before)
    assert all(a is b for a, b in zip(parameters, layer.parameters(), strict=True))


@pytest.mark.parametrize("cls", LAYERS)
def test_resampling_in_forward_equals_set_input_size(cls):
    layer = make(cls, num_prefix_tokens=1)
    x = tokens(layer, feat_size=(4, 6))
    out = layer(x, (4, 6))
    layer.set_input_size((4, 6))
    assert_close("output", out, layer(x))


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("feat_size", [(14, 10), (9, 8), (3, 4), (7, 6)], ids=str)
def test_windows_give_each_token_the_keys_of_its_window(cls, feat_size, prefix):
    layer = make(cls, num_prefix_tokens=prefix, off_grid="window")
    x = tokens(layer, feat_size=feat_size)
    out = layer(x, feat_size)

    heads = [part.reshape(*x.shape[:2], HEADS, -1).transpose(1, 2) for part in layer.qv(x).chunk(2, dim=2)]
    segments = layer._segments(heads[0], feat_size, partial(layer.key_rows, layer.feat_size), lambda rows: rows)
    height, width = feat_size
    y, col = torch.arange(height).repeat_interleave(width), torch.arange(width).repeat(height)
    rows = torch.cat([torch.arange(prefix), prefix + (y % GRID[0]) * GRID[1] + col % GRID[1]])
    window = torch.cat([torch.full((prefix,), -1), (y // GRID[0]) * width + col // GRID[1]])
    parts = []
    for seg in segments:
        last = seg.first_token + seg.query.shape[2]
        query = seg.query if seg.unfold is None else reference.unfold_queries(seg.query, *seg.unfold)
        logits = query @ seg.key[:, rows].transpose(1, 2)
        if seg.key_bias is not None:
            logits = logits + seg.key_bias[:, rows].unsqueeze(1)
        own = window[seg.first_token : last].unsqueeze(1)
        visible = (own == -1) | (window == -1) | (own == window)
        weights = (logits * layer.scale).masked_fill(~visible, float("-inf")).softmax(-1)
        parts.append(weights @ heads[1])
    assert_close("output", out, layer.proj(torch.cat(parts, dim=2).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("cls", LAYERS)
def test_windows_on_the_built_grid_are_the_plain_layer(cls):
    layer = make(cls, num_prefix_tokens=1)
    x = tokens(layer)
    before = layer(x)
    layer.off_grid = "window"
    assert torch.equal(layer(x, GRID), before)


@pytest.mark.parametrize("cls", LAYERS)
def test_windows_have_no_single_map(cls):
    layer = make(cls, off_grid="window")
    with pytest.raises(FeatSizeError, match=r"off_grid='window' has no single attention map on feat_size=\(4, 6\)"):
        layer.attention_weights(tokens(layer, feat_size=(4, 6)), (4, 6))


@pytest.mark.parametrize("cls", LAYERS)
def test_windows_without_the_diagonal(cls):
    layer = make(cls, off_grid="window", mask_diagonal=True)
    assert layer(tokens(layer, feat_size=(14, 8)), (14, 8)).isfinite().all()
    with pytest.raises(FeatSizeError, match=r"windows of \(7, 5\) leave one of a single token on feat_size=\(8, 6\)"):
        layer(tokens(layer, feat_size=(8, 6)), (8, 6))


@pytest.mark.parametrize("cls", LAYERS)
def test_attention_weights_reproduce_the_output(cls):
    layer = make(cls, num_prefix_tokens=2, mask_diagonal=True)
    x = tokens(layer)
    weights = layer.attention_weights(x)
    assert_close("rows", weights.sum(-1), torch.ones(2, HEADS, 37, dtype=torch.float64))
    assert weights.diagonal(dim1=-2, dim2=-1).eq(0).all()
    value = layer.qv(x).chunk(2, dim=2)[1].reshape(2, 37, HEADS, -1).transpose(1, 2)
    assert_close("output", layer.proj((weights @ value).transpose(1, 2).flatten(2)), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("autocast", [False, True], ids=["module in half", "autocast"])
def test_half_precision(cls, dtype, autocast):
    layer = cls(32, 4, feat_size=GRID, num_prefix_tokens=1, learned_temperature=True)
    with torch.no_grad():
        for name in layer.grid_parameters:
            getattr(layer, name).normal_(std=500.0)
    x = torch.randn(2, 36, 32)
    if not autocast:
        layer, x = layer.to(dtype), x.to(dtype)
    x.requires_grad_()
    with torch.autocast("cpu", dtype, enabled=autocast):
        out = layer(x)
    assert out.dtype == dtype
    out.float().sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("cls", LAYERS)
def test_every_parameter_gets_a_gradient(cls):
    layer = make(cls, num_prefix_tokens=1, learned_temperature=True, qkv_bias=True)
    layer(tokens(layer)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("cls", LAYERS)
def test_dropout_acts_in_training_only(cls):
    layer = make(cls, attn_drop=0.5, proj_drop=0.2)
    x = tokens(layer)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("cls", LAYERS)
def test_meta_device_then_reset(cls):
    layer = cls(12, 3, feat_size=GRID, num_prefix_tokens=1, device="meta")
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert layer(torch.randn(1, 36, 12)).isfinite().all()


@pytest.mark.parametrize("cls", LAYERS)
def test_copies_and_pickles(cls):
    layer = make(cls, num_prefix_tokens=1)
    x = tokens(layer)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("cls", LAYERS)
def test_exports(cls):
    layer = make(cls, num_prefix_tokens=1).eval()
    x = tokens(layer)
    exported = torch.export.export(layer, (x,)).module()
    assert_close("exported", exported(x), layer(x))


@pytest.mark.parametrize("off_grid", ["resample", "window"])
@pytest.mark.parametrize("cls", LAYERS)
def test_no_image_is_a_batch_too(cls, off_grid):
    layer = make(cls, num_prefix_tokens=1, off_grid=off_grid)
    for feat_size in (GRID, (8, 12)):
        x = tokens(layer, batch=0, feat_size=feat_size).requires_grad_()
        out = layer(x, feat_size)
        out.sum().backward()
        assert out.shape == x.shape == x.grad.shape


@pytest.mark.parametrize("cls", [ConvStaticKeyAttention, FactorizedConvStaticKeyAttention])
def test_windows_export_for_any_batch_and_compile_whole(cls):
    layer = make(cls, off_grid="window", num_prefix_tokens=1).eval()
    x = tokens(layer, feat_size=(8, 12))
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(layer, (x, (8, 12)), dynamic_shapes=({0: batch}, (None, None))).module()
    more = torch.cat([x, -x])
    assert_close("exported", exported(more, (8, 12)), layer(more, (8, 12)))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert_close("compiled", compiled(x, (8, 12)), layer(x, (8, 12)))
    torch.compiler.reset()


WRONG = {
    "heads": ({"num_heads": 5}, r"dim=12 is not divisible by num_heads=5; use num_heads in \[3, 4, 6\]"),
    "grid": ({"feat_size": (7,)}, "must be a pair"),
    "empty grid": ({"feat_size": (0, 5)}, "two positive integers"),
    "prefix": ({"num_prefix_tokens": -1}, "num_prefix_tokens=-1"),
    "off grid": ({"off_grid": "crop"}, "off_grid='crop'"),
    "own query": ({"query_proj": False, "head_dim": 5}, "num_heads\\*head_dim=15 must equal dim=12"),
    "drop": ({"attn_drop": 1.0}, "attn_drop=1.0"),
    "temperature": ({"learned_temperature": True, "scale": -1.0}, "positive scale"),
    "one token": ({"feat_size": (1, 1), "mask_diagonal": True}, "nothing to attend to"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("cls", LAYERS)
def test_constructor_refuses(cls, case):
    options, message = WRONG[case]
    with pytest.raises(StaticKeyError, match=message):
        cls(**{"dim": 12, "num_heads": 3, "feat_size": GRID} | options)


@pytest.mark.parametrize("cls", LAYERS[1:])
def test_even_kernel_is_refused(cls):
    with pytest.raises(StaticKeyError, match="kernel_size=2"):
        cls(12, 3, feat_size=GRID, kernel_size=2)


@pytest.mark.parametrize("cls", LAYERS)
def test_forward_refuses(cls):
    layer = make(cls, num_prefix_tokens=1)
    with pytest.raises(FeatSizeError, match=r"x has 25 tokens, but feat_size=\(7, 5\) with 1 prefix tokens makes 36"):
        layer(torch.zeros(2, 25, 12, dtype=torch.float64))
    with pytest.raises(FeatSizeError, match="expected"):
        layer(torch.zeros(2, 36, 13, dtype=torch.float64))
    with pytest.raises(StaticKeyError, match="is_causal=True"):
        layer(tokens(layer), is_causal=True)
    windowed = make(cls, off_grid="window")
    with pytest.raises(FeatSizeError, match=r"off_grid='window' tiles feat_size=\(9, 8\)"):
        windowed(torch.zeros(2, 72, 12, dtype=torch.float64), (9, 8), attn_mask=torch.zeros(72, 72))
