"""What a host may ask of a mixer's projections, queries and keys, each against the formula written out."""

import math

import pytest
import torch
from torch import nn

from statickey import MIXERS
from statickey.errors import StaticKeyError
from statickey.layers import NormedLinear, Reduction
from tolerances import assert_close

GRID, TOKENS, DIM, HEADS, WIDTH = (4, 6), 24, 12, 3, 4


class Halved(Reduction):
    """Every other row and column."""

    def forward(self, x, feat_size):
        return x.unflatten(1, feat_size)[:, ::2, ::2].flatten(1, 2)

    def grid(self, feat_size):
        return (feat_size[0] + 1) // 2, (feat_size[1] + 1) // 2

    def macs(self, feat_size):
        return 7


class Distance(nn.Module):
    """A query's first channel times the distance of two tokens."""

    def forward(self, query):
        places = torch.arange(query.shape[2], dtype=query.dtype)
        return query[..., :1] * (places - places[:, None]).abs()


def layer(mixer="ska", **args):
    torch.manual_seed(0)
    return MIXERS[mixer](DIM, HEADS, feat_size=GRID, dtype=torch.float64, **args)


def heads(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def attention(query, key, value, bias=0.0):
    weights = (query @ key.transpose(-2, -1) / math.sqrt(WIDTH) + bias).softmax(dim=-1)
    return (weights @ value).transpose(1, 2).flatten(2)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(2, TOKENS, DIM, dtype=torch.float64)


def test_values_and_outputs_of_another_width(x):
    mixer = layer()
    narrow = mixer.macs()
    mixer.set_widths(7, 10)
    query, value = mixer.qv(x).split([HEADS * WIDTH, HEADS * 7], dim=-1)
    expected = mixer.proj(attention(heads(query), mixer.static_key, heads(value)))
    assert expected.shape == (2, TOKENS, 10)
    assert_close("output", mixer(x), expected)
    wider = TOKENS * (DIM * HEADS * 3 + HEADS * TOKENS * 3 + HEADS * 7 * 10 - HEADS * WIDTH * DIM)
    assert mixer.macs() == narrow + wider


def test_no_output_projection(x):
    mixer = layer("mhsa")
    mixer.set_widths(5, None)
    query, key, value = mixer.qkv(x).split([DIM, DIM, 15], dim=-1)
    assert_close("output", mixer(x), attention(heads(query), heads(key), heads(value)))


@pytest.mark.parametrize("mixer", ["mhsa", "ska", "cska", "fcska"])
def test_keys_of_fewer_tokens(x, mixer):
    mixer = layer(mixer)
    whole = mixer.macs()
    mixer.set_reduction(Halved())
    weights = mixer.attention_weights(x)
    assert weights.shape == (2, HEADS, TOKENS, 6)
    fewer = mixer.reduction(x, GRID)
    projection = mixer.qkv if hasattr(mixer, "qkv") else mixer.qv
    value = heads(projection(fewer)[..., -DIM:])
    assert_close("output", mixer(x), mixer.proj((weights @ value).transpose(1, 2).flatten(2)))
    assert mixer.macs() < whole
    mixer.set_input_size((6, 6))
    assert mixer.attention_weights(torch.randn(1, 36, DIM, dtype=torch.float64)).shape[-1] == 9


def test_a_static_key_of_fewer_tokens_has_their_grid():
    mixer = layer()
    mixer.set_reduction(Halved())
    assert mixer.key_grid == (2, 3)
    assert mixer.static_key.shape == (HEADS, 6, WIDTH)
    for change in (lambda: mixer.set_key_size((1, 1)), lambda: mixer.set_off_grid("pool")):
        with pytest.raises(StaticKeyError, match=r"the host reduces keys to \(2, 3\) by itself"):
            change()
    with pytest.raises(StaticKeyError, match="leave out key_size and off_grid"):
        layer(key_size=(2, 2)).set_reduction(Halved())
    with pytest.raises(
        StaticKeyError, match="SynthesizerAttention has no key to take from fewer tokens; use mhsa or a static key"
    ):
        layer("synthesizer").set_reduction(Halved())


def test_a_bias_that_the_query_makes(x):
    mixer = layer()
    mixer.query_bias = Distance()
    query, value = (heads(part) for part in mixer.qv(x).chunk(2, dim=-1))
    expected = mixer.proj(attention(query, mixer.static_key, value, mixer.query_bias(query)))
    assert_close("output", mixer(x), expected)
    mask = torch.randn(TOKENS, TOKENS, dtype=torch.float64)
    expected = mixer.proj(attention(query, mixer.static_key, value, mixer.query_bias(query) + mask))
    assert_close("with a mask", mixer(x, attn_mask=mask), expected)
    mixer.set_key_size((2, 3))
    assert mixer(x).shape == x.shape


def test_a_norm_behind_a_projection(x):
    linear, norm = nn.Linear(DIM, 5).double(), nn.BatchNorm2d(5, eps=0.1, momentum=0.5)
    normed = NormedLinear(linear, norm)
    normed.load_state_dict(linear.state_dict(), strict=False)
    out = normed(x)
    expected = nn.functional.batch_norm(linear(x).flatten(0, 1), None, None, training=True, eps=0.1)
    assert_close("in training", out, expected.reshape(out.shape))
    assert_close("mean", normed.norm.running_mean, 0.5 * linear(x).mean(dim=(0, 1)))
