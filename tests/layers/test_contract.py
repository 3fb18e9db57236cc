"""What every mixer of the registry must do."""

import inspect

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from statickey import MIXERS
from statickey.errors import FeatSizeError, StaticKeyError
from tolerances import assert_close

HEAD = [
    "dim",
    "num_heads",
    "feat_size",
    "num_prefix_tokens",
    "head_dim",
    "qkv_bias",
    "proj_bias",
    "attn_drop",
    "proj_drop",
    "device",
    "dtype",
]
NEEDS_A_GRID_ONLY = {"pool", "sepconv"}


class Variant(str):
    """The name of a mixer, and arguments it is made with."""

    def __new__(cls, name, **kwargs):
        made = super().__new__(cls, name)
        made.kwargs = kwargs
        return made

    @property
    def id(self):
        return ":".join([self, *(f"{k}={v}" for k, v in self.kwargs.items())])

    @property
    def continuous(self):
        return self.kwargs.get("key") == "continuous"

    @property
    def mixed(self):
        return "dynamic_heads" in self.kwargs or self.kwargs.get("bias") == "map"

    @property
    def pooled(self):
        return "key_size" in self.kwargs


STATIC = ("ska", "cska", "fcska")
VARIANTS = [
    *map(Variant, MIXERS),
    *(Variant(name, key="continuous") for name in STATIC),
    *(Variant(name, key_size=(3, 2)) for name in STATIC),
    *(Variant(name, key="continuous", key_size=(3, 2)) for name in STATIC),
    *(Variant(name, off_grid="pool") for name in STATIC),
    Variant("partly_static", dynamic_heads=(0,)),
    Variant("partly_static", dynamic_heads=(1,), bias="key"),
    Variant("partly_static", dynamic_heads=(1,), key="continuous"),
    Variant("partly_static", bias="map"),
    Variant("partly_static", bias="key", key_size=(3, 2)),
]


@pytest.fixture(params=VARIANTS, ids=lambda variant: variant.id)
def name(request):
    return request.param


def build(name, *args, **kwargs):
    return MIXERS[name](*args, **getattr(name, "kwargs", {}) | kwargs)


def make(name, feat_size=(7, 5), **kwargs):
    prefix = 0 if name in NEEDS_A_GRID_ONLY else 2
    return build(name, 12, 3, feat_size=feat_size, num_prefix_tokens=prefix, **kwargs)


def tokens(mixer, feat_size=None):
    height, width = mixer.feat_size if feat_size is None else feat_size
    return torch.randn(2, mixer.num_prefix_tokens + height * width, mixer.dim)


def test_constructor_head(name):
    parameters = inspect.signature(MIXERS[name]).parameters
    assert [p for p in parameters if p in HEAD] == HEAD
    assert parameters["num_heads"].default == 8
    assert all(p.kind is p.KEYWORD_ONLY for p in list(parameters.values())[2:])
    assert not any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    assert parameters["feat_size"].default is inspect.Parameter.empty


LOGITS = ["scale", "learned_temperature", "mask_diagonal"]
OPTIONS = {
    "mhsa": LOGITS,
    "ska": [*LOGITS, "query_proj", "key", "key_size", "off_grid"],
    "cska": [*LOGITS, "query_proj", "key", "key_size", "off_grid", "kernel_size"],
    "fcska": [*LOGITS, "query_proj", "key", "key_size", "off_grid", "kernel_size"],
    "partly_static": [*LOGITS, "key", "key_size", "off_grid", "dynamic_heads", "bias"],
}


def test_options_beyond_the_head_are_refused_where_they_mean_nothing(name):
    assert set(inspect.signature(MIXERS[name]).parameters) == {*HEAD, *OPTIONS.get(name, ())}
    for option in {*OPTIONS["cska"]} - {*OPTIONS.get(name, ())}:
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{option}'"):
            make(name, **{option: 1})


WRONG = {
    "num_heads": ({"num_heads": "3"}, "num_heads='3' must be a positive integer"),
    "head_dim": ({"head_dim": 4.0}, "head_dim=4.0 must be a positive integer"),
    "num_prefix_tokens": ({"num_prefix_tokens": True}, "num_prefix_tokens=True must be zero or a positive integer"),
    "feat_size": ({"feat_size": 7}, r"feat_size=7 must be a pair"),
    "attn_drop": ({"attn_drop": "0.1"}, r"attn_drop='0\.1' must be in"),
    "proj_drop": ({"proj_drop": float("nan")}, "proj_drop=nan must be in"),
    "complex dtype": ({"dtype": torch.complex64}, "dtype=torch.complex64 must be a floating-point torch.dtype"),
    "named dtype": ({"dtype": "float32"}, "dtype='float32' must be a floating-point torch.dtype"),
    "nan scale": ({"scale": float("nan")}, "scale=nan must be a finite number"),
    "infinite temperature": ({"scale": float("inf"), "learned_temperature": True}, "scale=inf must be a finite"),
    "key": ({"key": "grids"}, "key='grids' must be one of 'grid', 'continuous'"),
    "key_size": ({"key_size": (0, 2)}, r"key_size=\(0, 2\) must hold two positive integers"),
    "off_grid": ({"off_grid": "pooled"}, "off_grid='pooled' must be one of 'resample', 'window', 'pool'"),
    "windows of cells": ({"off_grid": "window", "key_size": (2, 2)}, r"key_size=\(2, 2\) with off_grid='window'"),
    "kernel_size": ({"kernel_size": True}, "kernel_size=True must be an odd positive integer"),
}


@pytest.mark.parametrize("case", WRONG)
def test_constructor_refuses(name, case):
    arguments, message = WRONG[case]
    if not arguments.keys() <= {*HEAD, *OPTIONS.get(name, ())} or (case == "windows of cells" and name.mixed):
        pytest.skip("has no such option")
    with pytest.raises(StaticKeyError, match=message):
        build(name, **{"dim": 12, "num_heads": 3, "feat_size": (7, 5)} | arguments)


@pytest.mark.parametrize("dim", ["12", 12.0, 0])
def test_width_of_the_wrong_type_is_refused(name, dim):
    with pytest.raises(StaticKeyError, match=f"dim={dim!r} must be a positive integer"):
        build(name, dim, 3, feat_size=(7, 5))


def test_tokens_to_tokens(name):
    mixer = make(name)
    assert mixer.layout == ("NCHW" if name in NEEDS_A_GRID_ONLY else "NLC")
    x = tokens(mixer)
    out = mixer(x)
    assert out.shape == x.shape
    assert out.isfinite().all()
    assert torch.equal(mixer(x, (7, 5)), out)


def test_other_grid(name):
    mixer = make(name)
    x = tokens(mixer, (4, 6))
    out = mixer(x, (4, 6))
    mixer.set_input_size((4, 6))
    assert mixer.feat_size == (4, 6)
    assert_close("output", mixer(x), out)


def test_wrong_token_count(name):
    mixer = make(name)
    with pytest.raises(FeatSizeError, match="tokens, but feat_size"):
        mixer(tokens(mixer, (4, 6)))


def test_every_parameter_gets_a_gradient(name):
    mixer = make(name, qkv_bias=True)
    if name not in {"identity", "pool"}:
        mixer(tokens(mixer)).square().sum().backward()
    for parameter_name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, parameter_name
        if not (name == "mhsa" and parameter_name == "qkv.bias"):
            assert parameter.grad.abs().sum() > 0, parameter_name


SECOND_DERIVATIVE_MISSING = {
    (name, "sdpa") for name in ("mhsa", "ska", "fcska", "partly_static", "synthesizer", "kv_shared")
}
"""Where torch's fused attention computes, which has none on the CPU."""


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("backend", ["sdpa", "math"])
def test_second_derivatives(name, backend, masked):
    """Right or refused; CSKA's are right on every backend, its queries unfolded a tile at a time."""
    prefix = 0 if name in {"cska", *NEEDS_A_GRID_ONLY} else 1
    mixer = build(name, 4, 2, feat_size=(2, 2), num_prefix_tokens=prefix, dtype=torch.float64)
    if (masked and name not in HAS_A_MAP_OF_THE_INPUT) or (backend == "math" and not hasattr(mixer, "backend")):
        pytest.skip("has no such choice")
    mixer.backend = backend
    names, parameters = zip(*mixer.named_parameters(), strict=True) if list(mixer.parameters()) else ((), ())
    masks = {"attn_mask": torch.randn(prefix + 4, prefix + 4, dtype=torch.float64)} if masked else {}

    def call(x, *values):
        return torch.func.functional_call(mixer, dict(zip(names, values, strict=True)), (x,), masks)

    inputs = [tokens(mixer).double()[:1].requires_grad_(), *(p.detach().requires_grad_() for p in parameters)]
    if (name, backend) in SECOND_DERIVATIVE_MISSING and name.kwargs.get(
        "bias"
    ) != "map":  # a learned mask is not fused
        grads = torch.autograd.grad(call(*inputs).sum(), inputs, create_graph=True, allow_unused=True)
        with pytest.raises(RuntimeError, match="is not implemented"):
            torch.autograd.grad(sum(grad.sum() for grad in grads if grad is not None), inputs, allow_unused=True)
        return
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True, atol=1e-4)


def test_state_dict_round_trip(name):
    mixer, twin = make(name), make(name)
    twin.load_state_dict(mixer.state_dict())
    x = tokens(mixer)
    assert torch.equal(twin(x), mixer(x))


def test_dtype_and_device(name):
    mixer = make(name, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in [*mixer.parameters(), *mixer.buffers()])


def test_no_weight_decay_names_exist(name):
    mixer = make(name)
    names = mixer.no_weight_decay()
    assert names <= set(dict(mixer.named_parameters()))
    assert bool(names) == (name in {"ska", "cska", "fcska", "partly_static", "constant", "synthesizer"})


def test_maps_are_distributions(name):
    mixer = make(name)
    if name in {"identity", "pool", "sepconv"}:
        assert not hasattr(mixer, "attention_weights")
        return
    weights = mixer.attention_weights(tokens(mixer))
    assert weights.shape == (2, 3, 37, 37)
    assert_close("rows", weights.sum(-1), torch.ones(2, 3, 37))


HAS_A_MAP_OF_THE_INPUT = {"mhsa", "ska", "cska", "fcska", "partly_static", "synthesizer", "kv_shared"}


def test_masks(name):
    """A mask hides keys from queries, added or boolean; mixers without a map of their input refuse one."""
    mixer = make(name)
    x = tokens(mixer)
    with pytest.raises(StaticKeyError, match="is_causal=True"):
        mixer(x, is_causal=True)
    if name not in HAS_A_MAP_OF_THE_INPUT:
        with pytest.raises(StaticKeyError, match="no attention map"):
            mixer(x, attn_mask=torch.zeros(1))
        return
    allowed = torch.rand(3, 37, 37) > 0.3
    added = torch.zeros(3, 37, 37).masked_fill(~allowed, float("-inf"))
    out = mixer(x, attn_mask=added)
    assert_close("boolean", mixer(x, attn_mask=allowed), out)
    assert_close("no mask", mixer(x, attn_mask=torch.zeros(1)), mixer(x))
    weights = mixer.attention_weights(x, attn_mask=added)
    assert (weights[:, ~allowed] == 0).all()
    expected = mixer.attention_weights(x).masked_fill(~allowed, 0)
    assert_close("weights", weights, expected / expected.sum(-1, keepdim=True))
    with pytest.raises(StaticKeyError, match=r"attn_mask .* must broadcast"):
        mixer(x, attn_mask=torch.zeros(5, 37))
    if hasattr(mixer, "backend"):
        mixer.backend = "math"
        assert_close("math", mixer(x, attn_mask=added), out)


def test_maps_in_either_format(name):
    """A map says its grid by its shape; the result is that of its tokens."""
    mixer = build(name, 12, 3, feat_size=(7, 5)).eval()
    maps = torch.randn(2, 6, 4, 12)
    expected = mixer(maps.flatten(1, 2), (6, 4)).reshape(maps.shape)
    mixer.input_fmt = "NHWC"
    assert_close("channels last", mixer(maps), expected)
    if hasattr(mixer, "attention_weights"):
        assert mixer.attention_weights(maps).shape == (2, 3, 24, 24)
    mixer.input_fmt = "NCHW"
    assert_close("channels first", mixer(maps.permute(0, 3, 1, 2)), expected.permute(0, 3, 1, 2))
    for wrong in (torch.randn(2, 24, 12), torch.randn(2, 11, 6, 4)):
        with pytest.raises(FeatSizeError, match=r"expected \(B, 12, H, W\)"):
            mixer(wrong)
        if hasattr(mixer, "attention_weights"):
            with pytest.raises(FeatSizeError, match=r"expected \(B, 12, H, W\)"):
                mixer.attention_weights(wrong)


@pytest.mark.parametrize("feat_size", [(7, 5), (9, 8)])
@pytest.mark.parametrize("kwargs", [{}, {"off_grid": "window"}, {"query_proj": False}], ids=str)
def test_macs_are_those_the_counter_sees(name, kwargs, feat_size):
    if kwargs and name not in STATIC:
        pytest.skip("an option of static keys")
    if "off_grid" in kwargs and name.kwargs.keys() & {"key_size", "off_grid"}:
        pytest.skip("a window's key has its grid")
    mixer = make(name, **kwargs)
    if hasattr(mixer, "backend"):
        mixer.backend = "math"
    x = tokens(mixer, feat_size)[:1]
    with FlopCounterMode(display=False) as counter:
        mixer(x, feat_size)
    assert mixer.macs(feat_size) == counter.get_total_flops() // 2
    assert mixer.macs() == mixer.macs((7, 5))


def test_grid_is_saved_beside_the_key(name):
    mixer, turned = make(name), make(name, feat_size=(5, 7))
    if name in {"mhsa", "kv_shared", "identity", "pool", "sepconv"}:
        assert "_extra_state" not in mixer.state_dict()
        return
    assert mixer.state_dict()["_extra_state"].tolist() == [7, 5, *([3, 2] if name.pooled else [])]
    if name.continuous or name.pooled:  # nothing is tied to the grid of the tokens
        turned.load_state_dict(mixer.state_dict())
        assert mixer.key_rows((4, 9), mixer.key_names[0]).equal(turned.key_rows((4, 9), mixer.key_names[0]))
        if not name.continuous:
            finer = make(name, key_size=(3, 3))
            with pytest.raises(
                FeatSizeError, match=r"key_size=\(3, 2\), that of this layer to \(3, 3\); build.* key_size=\(3, 2\)"
            ):
                finer.load_state_dict(mixer.state_dict())
        return
    with pytest.raises(FeatSizeError, match=r"feat_size=\(7, 5\), this layer is built for \(5, 7\)"):
        turned.load_state_dict(mixer.state_dict())


BROKEN_GRIDS = {
    "number": (torch.tensor(7), "is 7, but must be a grid"),
    "three": (torch.tensor([7, 5, 1]), r"is \[7, 5, 1\], but must be"),
    "many": (torch.zeros(40), r"is \(40,\) of torch.float32, but must be"),
    "zero": (torch.tensor([0, 5]), r"is \[0, 5\]"),
    "fraction": (torch.tensor([7.5, 5.0]), r"is \[7\.5, 5\.0\]"),
    "nan": (torch.tensor([float("nan"), 5.0]), r"is \[nan, 5\.0\]"),
    "boolean": (torch.tensor([True, True]), r"is \[True, True\]"),
    "complex": (torch.tensor([7 + 0j, 5]), r"is \[\(7\+0j\), \(5\+0j\)\]"),
    "text": ("7x5", "is str, but must be a grid"),
    "pair": ((7, 5), "is tuple, but must be a grid"),
    "none": (None, "is NoneType"),
}


@pytest.mark.parametrize("case", BROKEN_GRIDS)
def test_a_broken_grid_is_refused_in_one_line(name, case):
    mixer = make(name)
    if "_extra_state" not in mixer.state_dict():
        pytest.skip("saves no grid")
    state, message = BROKEN_GRIDS[case]
    with pytest.raises(FeatSizeError, match=message) as caught:
        mixer.load_state_dict(mixer.state_dict() | {"_extra_state": state})
    assert "\n" not in str(caught.value)
    own = mixer.state_dict()
    mixer.load_state_dict(own | {"_extra_state": own["_extra_state"].half()})


@pytest.mark.parametrize("grid_only", sorted(NEEDS_A_GRID_ONLY))
def test_grid_mixers_refuse_prefix_tokens(grid_only):
    with pytest.raises(StaticKeyError, match="class_token=False"):
        MIXERS[grid_only](12, 3, feat_size=(7, 5), num_prefix_tokens=1)


def test_controls_do_what_they_are_named_for():
    x = torch.randn(2, 35, 12)
    assert MIXERS["identity"](12, 3, feat_size=(7, 5))(x) is x
    frozen = MIXERS["random"](12, 3, feat_size=(7, 5))
    assert "logits" not in dict(frozen.named_parameters())
    assert "logits" in frozen.state_dict()
    learned = MIXERS["constant"](12, 3, feat_size=(7, 5))
    assert torch.equal(learned.attention_weights(x)[0], learned.attention_weights(torch.randn(2, 35, 12))[1])
    pooled = MIXERS["pool"](12, 3, feat_size=(7, 5))(torch.ones(1, 35, 12))
    assert_close("pool of a constant", pooled, torch.zeros(1, 35, 12))
    synthesizer = MIXERS["synthesizer"](12, 3, feat_size=(7, 5))
    query, value = synthesizer.qv(x).reshape(2, 35, 2, 3, 4).permute(2, 0, 3, 1, 4)
    logits = torch.einsum("bhnd,hmd->bhnm", query.relu(), synthesizer.static_key) + synthesizer.key_bias[:, None]
    out = synthesizer.proj((logits.softmax(-1) @ value).transpose(1, 2).flatten(2))
    assert_close("synthesizer", synthesizer(x), out)
    shared = MIXERS["kv_shared"](12, 3, feat_size=(7, 5))
    query, value = shared.qv(x).reshape(2, 35, 2, 3, 4).permute(2, 0, 3, 1, 4)
    weights = (0.5 * query @ value.mT).softmax(-1)
    assert_close("shared", shared(x), shared.proj((weights @ value).transpose(1, 2).flatten(2)))
