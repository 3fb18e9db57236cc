import pytest
import torch
from torch import fx, nn

from statickey import MIXERS
from statickey.errors import StaticKeyError
from tolerances import assert_close, assert_same_with_gradients

GRID, DIM, HEADS = (3, 5), 12, 2
ADDING = {
    "mhsa": {},
    "ska": {},
    "ska without query projection": {"query_proj": False},
    "ska on a coarser grid": {"key_size": (2, 2)},
    "cska": {},
    "fcska": {},
    "partly_static": {"dynamic_heads": [1], "bias": "map"},
}
OTHERS = ["identity", "pool", "sepconv", "constant", "random", "synthesizer", "kv_shared"]


def layer(name, prefix=0, **kwargs):
    torch.manual_seed(0)
    kwargs = {"feat_size": GRID, "num_prefix_tokens": prefix, "dtype": torch.float64} | kwargs
    return MIXERS[name.split(" ")[0]](DIM, HEADS, **kwargs)


def inputs(prefix=0, tokens=15):
    x = torch.randn(2, prefix + tokens, DIM, dtype=torch.float64)
    return x, torch.randn_like(x)


def values(mixer, x):
    linear = next(getattr(mixer, name) for name in ("qkv", "qv", "v") if hasattr(mixer, name))
    return linear(x)[..., -DIM:].unflatten(2, (HEADS, -1)).transpose(1, 2)


def plain(mixer, x, pos_embed):
    """Maps of what sees the embedding, times values of what does not."""
    weights = mixer.attention_weights(x + pos_embed)
    return mixer.proj((weights @ values(mixer, x)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("name", ADDING)
def test_queries_and_keys_see_it_and_values_do_not(name, prefix):
    mixer = layer(name, prefix, **ADDING[name])
    assert_same_with_gradients(
        lambda x, pos: mixer(x, pos_embed=pos), lambda x, pos: plain(mixer, x, pos), inputs(prefix)
    )
    x, pos = inputs(prefix)
    assert_close("map", mixer.attention_weights(x, pos_embed=pos), mixer.attention_weights(x + pos))
    assert_close("common", mixer(x, pos_embed=pos[0]), mixer(x, pos_embed=pos[:1]))
    assert not torch.allclose(mixer(x, pos_embed=pos), mixer(x))
    assert not torch.allclose(mixer(x, pos_embed=pos), mixer(x + pos))


class Doubled(nn.Linear):
    """What stands in for a linear layer, as an adapter does."""

    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("key_size", [None, (2, 2)])
@pytest.mark.parametrize("name", ["mhsa", "ska"])
def test_with_what_stands_in_for_a_projection(name, key_size):
    mixer = layer(name, **({} if name == "mhsa" else {"key_size": key_size}))
    attribute = "qkv" if name == "mhsa" else "qv"
    old = getattr(mixer, attribute)
    adapter = Doubled(DIM, old.out_features, bias=False, dtype=torch.float64)
    adapter.load_state_dict(old.state_dict())
    setattr(mixer, attribute, adapter)
    x, pos = inputs()
    assert_close("output", mixer(x, pos_embed=pos), plain(mixer, x, pos))


def test_on_another_grid():
    mixer, twin = layer("ska"), layer("ska")
    twin.set_input_size((5, 4))
    x, pos = inputs(tokens=20)
    assert_close("output", mixer(x, (5, 4), pos_embed=pos), twin(x, pos_embed=pos))


def test_in_a_symbolic_trace():
    class Host(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = layer("ska")

        def forward(self, x, pos_embed):
            return self.mixer(x, pos_embed=pos_embed)

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return False

    host, (x, pos) = Host(), inputs()
    traced = fx.GraphModule(host, Tracer().trace(host))
    assert_close("traced", traced(x, pos), host(x, pos))


@pytest.mark.parametrize("name", OTHERS)
def test_refuses_where_no_query_is_apart_from_the_values(name):
    x, pos = inputs()
    with pytest.raises(StaticKeyError, match=r"no query beside its values.*use mhsa or a static key"):
        layer(name)(x, pos_embed=pos)


def test_no_mixer_is_forgotten():
    assert {name for name, made in MIXERS.items() if made.adds_pos_embed} == {name.split(" ")[0] for name in ADDING}
    assert {*MIXERS} == {*OTHERS} | {name.split(" ")[0] for name in ADDING}
