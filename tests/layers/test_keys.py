"""Keys that are functions of position, and keys with a grid of their own."""

import copy

import pytest
import torch
from torch import nn

from statickey import ConvStaticKeyAttention, FactorizedConvStaticKeyAttention, StaticKeyAttention
from statickey.errors import FeatSizeError, StaticKeyError
from statickey.layers import ContinuousKey, HeadMix
from statickey.ops import repeat_cells
from tolerances import assert_close, assert_same_with_gradients

LAYERS = [StaticKeyAttention, ConvStaticKeyAttention, FactorizedConvStaticKeyAttention]
layers = pytest.mark.parametrize("cls", LAYERS)
kinds = pytest.mark.parametrize("key", ["grid", "continuous"])
prefixes = pytest.mark.parametrize("prefix", [0, 2])
GRID, DIM, HEADS = (7, 5), 12, 3


def make(cls, **kwargs):
    return cls(DIM, HEADS, **{"feat_size": GRID, "dtype": torch.float64} | kwargs)


def tokens(layer, feat_size=GRID, batch=2):
    count = layer.num_prefix_tokens + feat_size[0] * feat_size[1]
    return torch.randn(batch, count, DIM, dtype=next(layer.parameters()).dtype)


def with_rows_of(layer, feat_size):
    """The layer with a plain key for each token of a map: that of its cell."""
    prefix, cells = layer.num_prefix_tokens, layer._cells(feat_size)
    bias = layer.qv.bias is not None
    plain = make(type(layer), feat_size=feat_size, num_prefix_tokens=prefix, qkv_bias=bias)
    state = {name: x for name, x in layer.state_dict().items() if name.split(".")[0] not in layer.key_names}
    for name in layer.key_names:
        if getattr(layer, name) is not None:
            rows = layer.key_rows(cells, name)
            state[name] = repeat_cells(rows, cells, feat_size, num_prefix_tokens=prefix)
    plain.load_state_dict({**state, "_extra_state": torch.tensor(feat_size)})
    return plain


@layers
@kinds
@prefixes
@pytest.mark.parametrize("feat_size", [(7, 5), (6, 4), (14, 9), (2, 9), (1, 1)], ids=str)
def test_pooled_values_are_attention_to_equal_keys(cls, key, prefix, feat_size):
    """On maps larger, smaller and both than the key's grid, evenly divided or not."""
    layer = make(cls, key=key, key_size=(3, 2), num_prefix_tokens=prefix, qkv_bias=True)
    x = tokens(layer, feat_size)
    expected = with_rows_of(layer, feat_size)(x)
    assert_close("output", layer(x, feat_size), expected)
    layer.backend = "math"
    assert_close("math", layer(x, feat_size), expected)


@layers
@kinds
@prefixes
def test_gradients_of_pooled_values(cls, key, prefix):
    """A mask that hides nothing asks for each token's own key: the same function, all gradients included."""
    layer = make(cls, key=key, key_size=(3, 2), num_prefix_tokens=prefix, learned_temperature=True, qkv_bias=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def call(masks):
        def run(x, *values):
            return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x, (8, 9)), masks)

        return run

    inputs = [tokens(layer, (8, 9)), *parameters]
    nothing = {"attn_mask": torch.zeros(1, dtype=torch.float64)}
    assert_same_with_gradients(call({}), call(nothing), inputs)


@layers
@kinds
def test_maps_and_masks_see_tokens_not_cells(cls, key):
    layer = make(cls, key=key, key_size=(3, 2), num_prefix_tokens=1)
    x = tokens(layer)
    weights = layer.attention_weights(x)
    assert weights.shape == (2, HEADS, 36, 36)
    assert_close("rows", weights.sum(-1), torch.ones(2, HEADS, 36, dtype=torch.float64))
    cell = repeat_cells(torch.arange(7).view(1, -1), (3, 2), GRID, num_prefix_tokens=1)[0]
    for number in range(7):
        inside = weights[..., cell == number]
        assert_close("equal within a cell", inside, inside[..., :1].expand_as(inside))
    value = layer.qv(x).chunk(2, dim=2)[1].reshape(2, 36, HEADS, -1).transpose(1, 2)
    assert_close("output", layer.proj((weights @ value).transpose(1, 2).flatten(2)), layer(x))
    allowed = torch.rand(36, 36) > 0.4
    masked = layer.attention_weights(x, attn_mask=allowed)
    assert masked[..., ~allowed].eq(0).all()
    assert_close("masked", layer.proj((masked @ value).transpose(1, 2).flatten(2)), layer(x, attn_mask=allowed))


@layers
def test_the_diagonal_of_pooled_keys(cls):
    """A token is hidden from itself, not from its cell."""
    layer = make(cls, key_size=(3, 2), mask_diagonal=True)
    x = tokens(layer)
    weights = layer.attention_weights(x)
    assert weights.diagonal(dim1=-2, dim2=-1).eq(0).all()
    assert (weights.gt(0).sum(-1) == 34).all()
    plain = with_rows_of(layer, GRID)
    plain.mask_diagonal = True
    assert_close("output", layer(x), plain(x))


@layers
def test_talking_heads_and_pooled_values(cls):
    layer = make(cls, key_size=(3, 2), num_prefix_tokens=1)
    layer.head_mix = HeadMix(*(nn.Linear(HEADS, HEADS, dtype=torch.float64) for _ in range(2)))
    nn.init.zeros_(layer.head_mix.after.bias)  # a constant on every weight is not one on every token of a cell
    x = tokens(layer)
    assert_close("output", layer(x), layer(x, attn_mask=torch.zeros(1)))


@layers
@kinds
def test_queries_without_a_projection_and_wrapped_projections(cls, key):
    """Values are pooled before the projection where that is a plain Linear, after it where it is wrapped."""

    class Wrapped(nn.Linear):
        pass

    layer = make(cls, key=key, key_size=(3, 2), query_proj=False)
    x = tokens(layer)
    assert_close("no projection", layer(x), layer(x, attn_mask=torch.zeros(1)))
    layer = make(cls, key=key, key_size=(3, 2), qkv_bias=True)
    expected = layer(x)
    seen = []
    handle = layer.qv.register_forward_hook(lambda *args: seen.append(args))
    assert_close("hooked", layer(x), expected)
    assert len(seen) == 1
    handle.remove()
    layer.qv.__class__ = Wrapped
    assert_close("wrapped", layer(x), expected)


@layers
@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(cls, key, dtype):
    layer = make(cls, key=key, key_size=(3, 2), num_prefix_tokens=1, dtype=torch.float32)
    x = tokens(layer, (9, 8)).requires_grad_()
    expected = layer(x, (9, 8))
    with torch.autocast("cpu", dtype):
        out = layer(x, (9, 8))
    assert out.dtype == dtype
    assert_close("autocast", out, expected)
    out.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    half = copy.deepcopy(layer).to(dtype)
    assert_close("module in half", half(x.to(dtype), (9, 8)), expected)


@layers
def test_pool_is_the_built_grid_on_any_map(cls):
    layer = make(cls, off_grid="pool")
    twin = make(cls, key_size=GRID)
    twin.load_state_dict(layer.state_dict())
    for feat_size in (GRID, (15, 9), (4, 6)):
        x = tokens(layer, feat_size)
        assert torch.equal(layer(x, feat_size), twin(x, feat_size))
    layer.set_input_size((15, 9))
    assert layer.key_grid == GRID
    x = tokens(layer, (15, 9))
    assert torch.equal(layer(x), twin(x, (15, 9)))


@layers
@kinds
def test_pool_gives_way_to_key_size_and_comes_back(cls, key):
    """Its cells are those of the grid the layer was made for, whatever was set since."""
    layer = make(cls, key=key, off_grid="pool")
    assert layer.key_size is None
    x = tokens(layer, (9, 8))
    out = layer(x, (9, 8))
    layer.set_input_size((9, 8))
    layer.set_key_size((3, 2))
    assert layer.key_grid == (3, 2)
    assert not torch.allclose(layer(x), out)
    layer.set_key_size(None)
    assert layer.key_grid == GRID
    if key == "continuous":
        assert torch.equal(layer(x), out)
        maps = [(feat_size, tokens(layer, feat_size)) for feat_size in (GRID, (9, 8), (14, 5))]
        outs = [layer(x, feat_size) for feat_size, x in maps]
        layer.set_key("grid")
        for (feat_size, x), expected in zip(maps, outs, strict=True):  # on a coarser map it would be resampled
            assert_close("evaluated", layer(x, feat_size), expected)


@layers
@kinds
def test_off_grid_is_chosen_on_a_built_layer(cls, key):
    layer = make(cls, key=key, num_prefix_tokens=1)
    x = tokens(layer, (9, 8))
    for off_grid in ("pool", "window", "resample"):
        layer.set_off_grid(off_grid)
        built = make(cls, key=key, num_prefix_tokens=1, off_grid=off_grid)
        built.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x, (9, 8)), built(x, (9, 8)))
    layer.set_input_size((9, 8))
    layer.set_off_grid("pool")
    assert layer.key_grid == GRID
    assert layer(x).shape == x.shape
    with pytest.raises(StaticKeyError, match="off_grid='pooled' must be one of"):
        layer.set_off_grid("pooled")
    layer.set_key_size((3, 2))
    with pytest.raises(StaticKeyError, match=r"key_size=\(3, 2\) with off_grid='window'"):
        layer.set_off_grid("window")
    assert layer.off_grid == "pool"


@layers
def test_a_continuous_key_of_another_key_size_is_refused(cls):
    """Its tensors fit, but not the attention; what the message says to do works."""
    layer = make(cls, key="continuous", key_size=(3, 2))
    other = make(cls, key="continuous", key_size=(4, 4))
    with pytest.raises(FeatSizeError, match=r"key_size=\(3, 2\), that of this layer to \(4, 4\); build .*key_size"):
        other.load_state_dict(layer.state_dict())
    whole = make(cls, key="continuous")
    with pytest.raises(FeatSizeError, match=r"key_size=\(7, 5\), that of this layer to \(4, 4\)"):
        other.load_state_dict(whole.state_dict())
    with pytest.raises(FeatSizeError, match=r"key_size=\(3, 2\), that of this layer to \(7, 5\)"):
        whole.load_state_dict(layer.state_dict())
    fits = make(cls, key="continuous", key_size=(3, 2), feat_size=(6, 6))
    fits.load_state_dict(layer.state_dict())
    fits.set_key_size((4, 4))
    other.set_key_size((3, 2))
    other.load_state_dict(layer.state_dict())
    other.set_key_size((4, 4))
    x = tokens(layer)
    assert torch.equal(other(x), fits(x, GRID))


@layers
def test_what_is_not_default_is_printed(cls):
    assert "key" not in repr(make(cls)).split("head_dim")[1].split("\n")[0]
    layer = make(cls, key="continuous", key_size=(3, 2), off_grid="pool")
    assert "key='continuous', key_size=(3, 2), off_grid='pool'" in repr(layer)
    layer.set_key_size(None)
    layer.set_off_grid("window")
    assert "key='continuous', off_grid='window'" in repr(layer)


@layers
@kinds
def test_key_size_is_chosen_on_a_built_layer(cls, key):
    layer = make(cls, key=key, num_prefix_tokens=1)
    x = tokens(layer)
    whole = layer(x)
    layer.set_key_size(GRID)
    assert torch.equal(layer(x), whole)
    layer.set_key_size((4, 5))
    assert layer.key_grid == (4, 5)
    coarse = layer(x)
    assert not torch.allclose(coarse, whole)
    built = make(cls, key=key, key_size=(4, 5), num_prefix_tokens=1)
    built.load_state_dict(layer.state_dict())
    assert torch.equal(built(x), coarse)
    layer.set_key_size(None)
    assert layer.key_grid == GRID
    if key == "continuous":
        assert torch.equal(layer(x), whole)
    with pytest.raises(FeatSizeError, match="key_size=3 must be a pair"):
        layer.set_key_size(3)
    layer.off_grid = "window"
    with pytest.raises(StaticKeyError, match=r"key_size=\(3, 2\) with off_grid='window'"):
        layer.set_key_size((3, 2))
    assert layer.key_size is None


@layers
@pytest.mark.parametrize("key_size", [None, (3, 2)], ids=str)
@prefixes
def test_a_continuous_key_is_the_same_function_on_every_grid(cls, key_size, prefix):
    """At a place that two grids share, the key is the same; its parameters and its state do not know the grid."""
    layer = make(cls, key="continuous", key_size=key_size, num_prefix_tokens=prefix)
    fine, coarse = (layer.key_rows(grid, layer.key_names[0])[:, prefix:] for grid in ((9, 15), (3, 5)))
    fine = fine.unflatten(1, (9, 15))[:, 1::3, 1::3].flatten(1, 2)
    assert_close("shared places", fine, coarse)
    other = make(cls, key="continuous", key_size=key_size, num_prefix_tokens=prefix, feat_size=(3, 16))
    assert [p.shape for p in other.parameters()] == [p.shape for p in layer.parameters()]
    other.load_state_dict(layer.state_dict())
    x = tokens(layer, (3, 16))
    assert torch.equal(other(x), layer(x, (3, 16)))
    layer.set_input_size((3, 16))
    assert torch.equal(other(x), layer(x))


def test_a_continuous_key_is_its_formula():
    key = ContinuousKey(2, 1, (3,), dtype=torch.float64)
    rows = key((2, 3))
    assert_close("prefix", rows[:, 0], key.prefix[:, 0])
    places = [(y, x) for y in (-0.5, 0.5) for x in (-2 / 3, 0.0, 2 / 3)]
    for number, place in enumerate(places):
        angles = key.frequencies @ torch.tensor(place, dtype=torch.float64)
        expected = key.weight @ torch.cat([angles.cos(), angles.sin()])
        assert_close("row", rows[:, 1 + number], expected)


def test_fresh_continuous_keys_have_the_variance_of_free_ones():
    keys = torch.stack([ContinuousKey(8, 0, (16,))((8, 8)) for _ in range(20)])
    assert 0.95 < keys.std() < 1.05
    assert (keys.std(dim=(0, 1, 3)) - 1).abs().max() < 0.15


@layers
@prefixes
def test_keys_turn_into_functions_and_back(cls, prefix):
    """Back is exact; to few positions a function can be fitted, of many it says what it lost."""
    layer = make(cls, key="continuous", num_prefix_tokens=prefix)
    x = tokens(layer)
    out = layer(x)
    assert layer.set_key("grid") == 0.0
    assert layer.key == "grid"
    assert_close("evaluated", layer(x), out)
    assert {name for name, _ in layer.named_parameters()} == {
        name for name, _ in make(cls, num_prefix_tokens=prefix).named_parameters()
    }
    layer.set_input_size((4, 4))
    assert layer.key_rows(name=layer.key_names[0]).shape[1] == prefix + 16
    few = make(cls, num_prefix_tokens=prefix, feat_size=(4, 4))  # 32 features can be any key of 16 positions
    few.proj.requires_grad_(False)
    y = tokens(few, (4, 4))
    before = few(y)
    assert few.set_key("continuous") < 1e-6
    assert_close("fitted", few(y), before)
    assert few.set_key("continuous") == 0.0
    many = make(cls, num_prefix_tokens=prefix, feat_size=(12, 12))
    assert 0.5 < many.set_key("continuous") < 1.0
    assert many(tokens(many, (12, 12))).isfinite().all()
    with pytest.raises(StaticKeyError, match="key='smooth' must be one of"):
        many.set_key("smooth")


@layers
def test_a_frozen_key_stays_frozen(cls):
    layer = make(cls, num_prefix_tokens=1)
    for name in layer.key_names:
        getattr(layer, name).requires_grad_(False)
    layer.set_key("continuous")
    assert not any(p.requires_grad for name in layer.key_names for p in getattr(layer, name).parameters())
    layer.set_key("grid")
    assert not any(getattr(layer, name).requires_grad for name in layer.key_names)


@layers
def test_windows_of_a_continuous_key(cls):
    """Each window is evaluated on the built grid."""
    layer = make(cls, key="continuous", off_grid="window", num_prefix_tokens=1)
    plain = make(cls, off_grid="window", num_prefix_tokens=1)
    x = tokens(layer, (9, 8))
    expected = layer(x, (9, 8))
    layer.set_key("grid")
    plain.load_state_dict(layer.state_dict())
    assert_close("output", plain(x, (9, 8)), expected)


@layers
@kinds
def test_weight_decay_leaves_keys_alone(cls, key):
    layer = make(cls, key=key, num_prefix_tokens=1)
    names = {name for name, _ in layer.named_parameters()}
    keys = {name for name in names if name.split(".")[0] in layer.key_names}
    assert layer.no_weight_decay() == keys
    assert len(keys) == len(layer.key_names) * (1 + (key == "continuous"))


@layers
@kinds
def test_exports_and_compiles(cls, key):
    layer = make(cls, key=key, key_size=(3, 2), num_prefix_tokens=1, dtype=torch.float32).eval()
    x = tokens(layer, (9, 8))
    expected = layer(x, (9, 8))
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(layer, (x, (9, 8)), dynamic_shapes=({0: batch}, (None, None))).module()
    assert_close("exported", exported(torch.cat([x, x]), (9, 8))[:2], expected)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert_close("compiled", compiled(x, (9, 8)), expected)
    torch.compiler.reset()


@layers
def test_meta_device_then_reset(cls):
    layer = make(cls, key="continuous", num_prefix_tokens=1, device="meta", dtype=torch.float32)
    assert all(x.is_meta for x in [*layer.parameters(), *layer.buffers()])
    layer.to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert layer(torch.randn(1, 36, DIM)).isfinite().all()
    assert 0.3 < layer.key_rows(name=layer.key_names[-1]).std() < 1.7


@layers
def test_a_fitted_key_is_drawn_anew_as_a_fresh_one(cls):
    layer, fresh = make(cls, num_prefix_tokens=1), make(cls, key="continuous", num_prefix_tokens=1)
    layer.set_key("continuous")
    assert [getattr(layer, name).std for name in cls.key_names] == [
        getattr(fresh, name).std for name in cls.key_names
    ]
