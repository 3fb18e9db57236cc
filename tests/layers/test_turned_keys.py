import pytest
import torch

from statickey import MIXERS
from statickey.errors import StaticKeyError
from statickey.ops import reference
from tolerances import assert_close, assert_same_with_gradients

GRID, TOKENS, DIM, HEADS, WIDTH = (3, 2), 6, 12, 2, 6
TURNING = ["mhsa", "ska", "cska", "fcska", "kv_shared"]


def layer(name, prefix=0, **kwargs):
    torch.manual_seed(0)
    kwargs = {"feat_size": GRID, "num_prefix_tokens": prefix, "dtype": torch.float64} | kwargs
    return MIXERS[name](DIM, HEADS, **kwargs)


def embedding(angles):
    return torch.cat([angles.sin().repeat_interleave(2, -1), angles.cos().repeat_interleave(2, -1)], dim=-1)


def inputs(prefix=0, tokens=TOKENS, heads=()):
    x = torch.randn(2, prefix + tokens, DIM, dtype=torch.float64)
    return x, torch.randn(*heads, tokens, WIDTH // 2, dtype=torch.float64)


def turned(rows, angles, prefix):
    return reference.rotate(rows, angles, half=False, num_prefix_tokens=prefix)


def plain(mixer, name, x, angles, prefix):
    """The attention token by token, on queries and keys that were turned pair by pair."""
    heads = [
        x_.unflatten(2, (HEADS, WIDTH)).transpose(1, 2)
        for x_ in getattr(mixer, "qkv" if name == "mhsa" else "qv")(x).split(DIM, 2)
    ]
    query, value = heads[0], heads[-1]
    if name == "mhsa":
        key = turned(heads[1], angles, prefix)
    elif name == "kv_shared":
        key = turned(value, angles, prefix)
    elif name in ("ska", "fcska"):
        key = turned(mixer.static_key, angles, prefix)
    if name == "fcska":
        maps = query[:, :, prefix:].transpose(2, 3).reshape(x.shape[0], DIM, *GRID)
        convolved = mixer.query_conv(maps).reshape(x.shape[0], HEADS, WIDTH, TOKENS).transpose(2, 3)
        query = torch.cat([query[:, :, :prefix], convolved], dim=2)
    query = turned(query, angles, prefix)
    if name == "cska":
        filters = [[turned(mixer.conv_key[..., i, j], angles, prefix) for j in range(3)] for i in range(3)]
        filters = torch.stack([torch.stack(row, -1) for row in filters], -2)
        out = reference.conv_static_key_attention(
            query[:, :, prefix:], filters, mixer.conv_bias, value, feat_size=GRID, scale=mixer.scale
        )
        if prefix:
            key = turned(mixer.prefix_key, angles, prefix)
            out = torch.cat([reference.static_key_attention(query[:, :, :prefix], key, value), out], dim=2)
    elif name in ("mhsa", "kv_shared"):
        weights = (query @ key.transpose(2, 3) * mixer.scale).softmax(-1)
        out = weights @ value
    else:
        out = reference.static_key_attention(query, key, value)
    return mixer.proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("heads", [(), (HEADS,)], ids=["shared", "each head"])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("name", TURNING)
def test_turns_queries_and_keys_by_their_places(name, prefix, heads):
    mixer = layer(name, prefix)
    assert_same_with_gradients(
        lambda x, angles: mixer(x, rope=embedding(angles)),
        lambda x, angles: plain(mixer, name, x, angles, prefix),
        inputs(prefix, heads=heads),
    )
    x, angles = inputs(prefix, heads=heads)
    weights = mixer.attention_weights(x, rope=embedding(angles))
    values = (mixer.qkv if name == "mhsa" else mixer.qv)(x)[..., -DIM:].unflatten(2, (HEADS, WIDTH)).transpose(1, 2)
    out = mixer.proj((weights @ values).transpose(1, 2).flatten(2))
    assert_close("map", out, mixer(x, rope=embedding(angles)))


@pytest.mark.parametrize("name", ["ska", "cska", "fcska"])
@pytest.mark.parametrize("key", ["grid", "continuous"])
def test_an_angle_of_zero_and_a_common_one_change_nothing(name, key):
    mixer = layer(name, key=key)
    x, angles = inputs()
    assert_close("zero", mixer(x, rope=embedding(torch.zeros_like(angles))), mixer(x))
    together = angles[:1].expand_as(angles)
    assert_close("common", mixer(x, rope=embedding(together)), mixer(x))
    assert not torch.allclose(mixer(x, rope=embedding(angles)), mixer(x))


@pytest.mark.parametrize("name", ["ska", "cska", "fcska"])
def test_keys_are_resampled_unturned_on_another_grid(name):
    mixer, twin = layer(name), layer(name)
    x, angles = inputs(tokens=20)
    twin.set_input_size((5, 4))
    expected = twin(x, rope=embedding(angles))
    assert_close("other grid", mixer(x, (5, 4), rope=embedding(angles)), expected)


@pytest.mark.parametrize("name", TURNING)
def test_channels_may_be_paired_by_halves(name):
    mixer = layer(name)
    x, angles = inputs()
    half = torch.cat([torch.cat([part, part], -1) for part in (angles.sin(), angles.cos())], -1)
    neighbours = mixer(x, rope=embedding(angles))
    mixer.rotate_half = True
    order = torch.tensor([0, 2, 4, 1, 3, 5])
    rows = torch.cat([order + 6 * head for head in range(HEADS)])
    with torch.no_grad():  # the same pairs in the other order of channels
        projection = mixer.qkv if name == "mhsa" else mixer.qv
        parts = list(projection.weight.split(DIM))
        moved = [part[rows] for part in parts]
        if name != "kv_shared":
            moved[-1] = parts[-1]
        projection.weight.copy_(torch.cat(moved))
        if name == "kv_shared":
            mixer.proj.weight.copy_(mixer.proj.weight[:, rows])
        for key in ("static_key", "conv_key"):
            if hasattr(mixer, key):
                getattr(mixer, key).copy_(getattr(mixer, key)[:, :, order])
        if name == "fcska":
            weight = mixer.query_conv.weight.unflatten(0, (HEADS, WIDTH))
            mixer.query_conv.weight.copy_(weight[:, order][:, :, order].flatten(0, 1))
            mixer.query_conv.bias.copy_(mixer.query_conv.bias[rows])
    assert_close("halves", mixer(x, rope=half), neighbours)


REFUSED = {
    "no queries": ("constant", {}, GRID, "ConstantAttention has no query and key"),
    "a pool": ("pool", {}, GRID, "PoolMixer has no query and key"),
    "a perceptron": ("synthesizer", {}, GRID, "SynthesizerAttention has no query and key"),
    "coarser keys": ("ska", {"key_size": (2, 2)}, GRID, r"on a grid of \(2, 2\); use key_size=None"),
    "pooled off the grid": ("cska", {"off_grid": "pool"}, (5, 4), r"on feat_size=\(5, 4\) keys are on"),
    "windows": ("fcska", {"off_grid": "window"}, (5, 4), "use key_size=None and off_grid='resample'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_cannot_be_turned(case):
    name, kwargs, grid, message = REFUSED[case]
    mixer = layer(name, **kwargs)
    x, angles = inputs(tokens=grid[0] * grid[1])
    with pytest.raises(StaticKeyError, match=message):
        mixer(x, grid, rope=embedding(angles))
    if hasattr(mixer, "attention_weights") and name != "constant":
        with pytest.raises(StaticKeyError):
            mixer.attention_weights(x, grid, rope=embedding(angles))


@pytest.mark.parametrize("off_grid", ["pool", "window"])
def test_any_choice_runs_on_the_built_grid(off_grid):
    x, angles = inputs()
    expected = layer("ska")(x, rope=embedding(angles))
    assert torch.equal(layer("ska", off_grid=off_grid)(x, rope=embedding(angles)), expected)


@pytest.mark.parametrize("heads", [(), (HEADS,)], ids=["shared", "each head"])
@pytest.mark.parametrize("dynamic", [(), (0,), (0, 1)], ids=str)
def test_static_and_dynamic_heads_of_a_layer_turn_alike(dynamic, heads):
    """Each head is the one of a layer whose heads are all of its kind."""
    mixer = layer("partly_static", 1, dynamic_heads=dynamic, bias="map")
    static, mhsa = layer("ska", 1), layer("mhsa", 1)
    x, angles = inputs(1, heads=heads)
    with torch.no_grad():
        query, value = mixer.qv.weight.chunk(2)
        rows = [head * WIDTH + channel for head in dynamic for channel in range(WIDTH)]
        mhsa.qkv.weight[:DIM], mhsa.qkv.weight[2 * DIM :] = query, value
        static.qv.weight.copy_(mixer.qv.weight)
        if dynamic:
            mhsa.qkv.weight[DIM : 2 * DIM][rows] = mixer.k.weight
        if len(dynamic) < HEADS:
            static.static_key[[head for head in range(HEADS) if head not in dynamic]] = mixer.static_key
    rope = embedding(angles)
    weights = mixer.attention_weights(x, rope=rope)
    for head in range(HEADS):
        twin = mhsa if head in dynamic else static
        assert_close(f"head {head}", weights[:, head], twin.attention_weights(x, rope=rope)[:, head])
