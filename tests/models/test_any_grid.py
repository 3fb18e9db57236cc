"""Models whose keys are functions of position, or have a grid of their own."""

import json

import pytest
import timm
import torch

from statickey import StaticKeyAttention, convert
from statickey.convert import token_mixers
from statickey.errors import StaticKeyError
from statickey.models import Swap, build_model, checkpoint_filter_fn

NANO = {"num_classes": 4, "img_size": 64}
CONTINUOUS = {
    "skaformer_continuous_nano": {**NANO},
    "ska_continuous_vit_tiny_patch16_224": {**NANO, "depth": 2},
}


def static_mixers(model):
    return [mixer for mixer in token_mixers(model).values() if mixer.no_weight_decay()]


def create(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **CONTINUOUS[name] | kwargs).eval()


@pytest.mark.parametrize("name", CONTINUOUS)
def test_weights_load_at_any_size(name):
    """Only a position embedding is resampled; the keys are the very same."""
    model = create(name)
    larger = create(name, img_size=96)
    larger.load_state_dict(checkpoint_filter_fn(model.state_dict(), larger))
    for mine, other in zip(static_mixers(model), static_mixers(larger), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters(), strict=True))
    model.set_input_size((96, 96))
    x = torch.randn(2, 3, 96, 96)
    assert torch.equal(model(x), larger(x))
    former = "former" in name
    if former:
        plain = create(name, img_size=96)
        plain.load_state_dict(model.state_dict())
        assert torch.equal(plain(x), larger(x))


@pytest.mark.parametrize("name", CONTINUOUS)
def test_key_size_is_a_knob_of_a_trained_model(name):
    model = create(name)
    x = torch.randn(2, 3, 64, 64)
    whole = model(x)
    model.set_key_size((2, 2))
    assert all(mixer.key_size == (2, 2) for mixer in static_mixers(model))
    assert not torch.equal(model(x), whole)
    model.set_key_size(None)
    assert torch.equal(model(x), whole)


@pytest.mark.parametrize("name", CONTINUOUS)
def test_keys_of_a_model_turn_into_rows_and_back(name):
    model = create(name)
    x = torch.randn(2, 3, 64, 64)
    whole = model(x)
    errors = model.set_key("grid")
    assert set(errors.values()) == {0.0}
    assert len(errors) == len(static_mixers(model))
    torch.testing.assert_close(model(x), whole, rtol=1e-4, atol=1e-5)
    errors = model.set_key("continuous")
    assert all(0 <= error < 1 for error in errors.values())


def test_a_model_without_static_keys_has_none_to_set():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2)
    convert(model, "mhsa")
    for call in (lambda: model.set_key_size((2, 2)), lambda: model.set_key("grid")):
        with pytest.raises(StaticKeyError, match="has no static key; convert its attention to ska"):
            call()


@pytest.mark.parametrize("name", ["skaformer_nano", "ska_vit_tiny_patch16_224", "ska_lsa_vit_small_patch4_32"])
def test_key_arguments_of_models(name):
    depth = {} if "former" in name else {"depth": 1}
    size = {"img_size": 32} if "lsa" in name else {"img_size": 64}
    with torch.device("meta"):
        model = timm.create_model(name, key="continuous", key_size=(2, 3), num_classes=2, **size, **depth)
    assert {(mixer.key, mixer.key_size) for mixer in static_mixers(model)} == {("continuous", (2, 3))}
    with pytest.raises(StaticKeyError, match="key_size=2 must be"):
        timm.create_model(name, key_size=2, **size, **depth)


def test_key_arguments_without_a_static_key_are_refused():
    caformer = ("sepconv", "sepconv", "mhsa", "mhsa")
    for name, kwargs in {
        "lsa_vit_small_patch4_32": {},
        "small_vit": {},
        "skaformer_nano": {"mixers": caformer},
        "ska_vit_tiny_patch16_224": {"mixer": "mhsa"},
    }.items():
        with pytest.raises(StaticKeyError, match=r"\{'key': 'continuous'\} is for static keys, which"):
            timm.create_model(name, key="continuous", **kwargs)


def test_swaps_of_keys():
    """As ``compare`` and ``train`` read them; shared weights stay bit-identical."""
    texts = ["ska", "ska:key=continuous", "cska:key=continuous,key_size=[2,3]", "fcska:off_grid=pool"]
    models = [build_model("small_vit", Swap.parse(text), img_size=16, num_classes=3) for text in texts]
    keys = [(mixer.key, mixer.key_grid) for mixer in (static_mixers(model)[0] for model in models)]
    assert keys == [("grid", (4, 4)), ("continuous", (4, 4)), ("continuous", (2, 3)), ("grid", (4, 4))]
    weights = [model.state_dict()["blocks.1.attn.qv.weight"] for model in models]
    assert all(torch.equal(weight, weights[0]) for weight in weights)
    assert str(Swap.parse(texts[2])) == "cska:key=continuous,key_size=[2,3]"


def test_converted_hosts_take_continuous_keys_and_cells():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=3, dynamic_img_size=True)
    convert(model, "ska", mixer_args={"key": "continuous", "key_size": (2, 2)})
    assert model.eval()(torch.randn(1, 3, 96, 64)).shape == (1, 3)
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), num_classes=3)
    convert(swin, "ska", mixer_args={"key": "continuous"})
    assert swin.eval()(torch.randn(1, 3, 224, 224)).shape == (1, 3)


@pytest.mark.parametrize("kwargs", [{}, {"key": "continuous"}], ids=str)
def test_pooled_weights_of_another_size(kwargs):
    """Keys with a grid of their own are not resampled with the image, but when that grid differs."""
    common = {"num_classes": 3, "depth": 1, "key_size": (2, 3), **kwargs}
    model = timm.create_model("ska_vit_tiny_patch16_224", img_size=(64, 96), **common)
    larger = timm.create_model("ska_vit_tiny_patch16_224", img_size=(96, 64), **common).eval()
    larger.load_state_dict(checkpoint_filter_fn(model.state_dict(), larger))
    assert torch.equal(*(static_mixers(m)[0].key_rows() for m in (model, larger)))
    x = torch.randn(1, 3, 96, 64)
    model.set_input_size((96, 64))
    assert torch.equal(model.eval()(x), larger(x))
    finer = timm.create_model("ska_vit_tiny_patch16_224", img_size=(96, 64), **common | {"key_size": (4, 4)}).eval()
    finer.load_state_dict(checkpoint_filter_fn(model.state_dict(), finer))
    model.set_key_size((4, 4))
    assert torch.equal(model(x), finer(x))


@pytest.mark.parametrize(("saved", "built"), [("grid", "continuous"), ("continuous", "grid")])
def test_a_checkpoint_of_the_other_kind_of_key_is_refused(saved, built):
    common = {"num_classes": 3, "depth": 1, "img_size": 64}
    states = timm.create_model("cska_vit_tiny_patch16_224", key=saved, **common)
    model = timm.create_model("cska_vit_tiny_patch16_224", key=built, **common)
    with pytest.raises(StaticKeyError, match=f"conv_key is a key='{saved}' in the checkpoint, key='{built}' in"):
        model.load_state_dict(states.state_dict())
    states.set_key(built)
    model.load_state_dict(states.state_dict())


def test_key_size_is_set_on_all_layers_or_none():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=2)
    convert(model, "ska", layers=0)
    convert(model, "ska", layers=[-1], mixer_args={"off_grid": "window"})
    with pytest.raises(StaticKeyError, match="off_grid='window'"):
        model.set_key_size((2, 2))
    assert [mixer.key_size for mixer in static_mixers(model)] == [None, None]


def create_small(name, **kwargs):
    depth = {} if "former" in name else {"depth": 1}
    size = {"img_size": 32} if "lsa" in name or name == "small_vit" else {"img_size": 64}
    return timm.create_model(name, num_classes=2, **{**size, **depth} | kwargs)


NAMED = ["skaformer_nano", "ska_vit_tiny_patch16_224", "ska_lsa_vit_small_patch4_32", "small_vit"]


@pytest.mark.parametrize("name", NAMED)
def test_arguments_of_keys_and_of_mixers_are_merged_once(name):
    """Said twice they must agree; said once they count, wherever."""
    extra = {"mixer": "ska"} if name == "small_vit" else {}

    def args(**own):
        return {"mixer_args": {"ska": own} if "former" in name else own} | extra

    with torch.device("meta"):
        model = create_small(name, key="continuous", key_size=(2, 3), **args(off_grid="pool", key_size=[2, 3]))
        (mixer,) = {(m.key, m.key_size, m.off_grid) for m in static_mixers(model)}
        assert mixer == ("continuous", (2, 3), "pool")
        for given, own in {
            "key": ("grid", "continuous"),
            "key_size": ((2, 2), [2, 3]),
            "off_grid": ("pool", "window"),
        }.items():
            with pytest.raises(StaticKeyError) as caught:
                create_small(name, **{given: own[0]}, **args(**{given: own[1]}))
            assert f"{given}={own[0]!r}, but mixer_args of ska has {given}={own[1]!r}; leave {given} out of" in str(
                caught.value
            )
            assert "\n" not in str(caught.value)


def test_a_saved_model_and_an_argument_that_differ(tmp_path):
    """``local-dir:`` brings mixer_args of its own, which an explicit key must not lose to."""
    card = {"architecture": "ska_vit_tiny_patch16_224", "num_classes": 2, "pretrained_cfg": {}}
    args = {"depth": 1, "img_size": 64, "mixer_args": {"key": "continuous", "key_size": [2, 2]}}
    (tmp_path / "config.json").write_text(json.dumps(card | {"model_args": args}))
    name = f"local-dir:{tmp_path}"
    assert static_mixers(timm.create_model(name, off_grid="pool"))[0].off_grid == "pool"
    with pytest.raises(
        StaticKeyError, match=r"key='grid', but mixer_args of ska has key='continuous'.*mixer_args=\{\}"
    ):
        timm.create_model(name, key="grid")
    model = timm.create_model(name, key="grid", mixer_args={})
    assert [mixer.key for mixer in static_mixers(model)] == ["grid"]


@pytest.mark.parametrize("name", NAMED)
def test_off_grid_of_models(name):
    extra = {"mixer": "ska"} if name == "small_vit" else {}
    model = create_small(name, off_grid="pool", **extra)
    assert {mixer.off_grid for mixer in static_mixers(model)} == {"pool"}
    model.set_off_grid("window")
    assert {mixer.off_grid for mixer in static_mixers(model)} == {"window"}
    model.set_off_grid("resample")
    model.set_key_size((2, 2))
    with pytest.raises(StaticKeyError, match=r"key_size=\(2, 2\) with off_grid='window'"):
        model.set_off_grid("window")
    assert {mixer.off_grid for mixer in static_mixers(model)} == {"resample"}


def test_options_of_keys_are_refused_by_name():
    with pytest.raises(StaticKeyError, match=r"which sepconv, mhsa do not have; leave it out"):
        create_small("skaformer_nano", mixers=("sepconv", "sepconv", "mhsa", "mhsa"), off_grid="pool")
    with pytest.raises(StaticKeyError, match="which mhsa does not have"):
        create_small("small_vit", mixer="mhsa", key_size=(2, 2))
    with pytest.raises(StaticKeyError, match="which self-attention of timm does not have"):
        create_small("small_vit", off_grid="pool")
    with pytest.raises(
        StaticKeyError, match="mixer 'mhsa' has no static key, so no key; leave it out, or choose ska"
    ):
        build_model("small_vit", "mhsa:key=continuous", img_size=16, num_classes=3)
    with pytest.raises(StaticKeyError, match=r"key_size='7x7' must be a pair of positive whole numbers"):
        build_model("small_vit", "ska:key_size=7x7", img_size=16, num_classes=3)
    with pytest.raises(StaticKeyError, match=r"key_size=\[4, 0\] must hold two positive integers"):
        build_model("small_vit", "ska:key_size=[4,0]", img_size=16, num_classes=3)


def test_a_model_of_another_key_size():
    """What fits loads; what does not is refused with what to do, and that works."""
    common = {"img_size": 64, "mixers": ("sepconv", "sepconv", "ska", "mhsa")}
    small = {"img_size": 48, "mixers": common["mixers"]}
    saved = timm.create_model("skaformer_nano", key_size=(3, 3), **common)
    fits = timm.create_model("skaformer_nano", **small)  # its stage has 3 x 3 tokens
    fits.load_state_dict(saved.state_dict())
    assert torch.equal(*(static_mixers(model)[0].static_key for model in (saved, fits)))
    saved = timm.create_model("skaformer_continuous_nano", key_size=(2, 2), **common)
    for key_size in ((3, 3), None):
        model = timm.create_model("skaformer_continuous_nano", key_size=key_size, **common)
        with pytest.raises(
            StaticKeyError, match=r"key belongs to key_size=\(2, 2\).*build the model with key_size=\(2, 2\)"
        ):
            model.load_state_dict(saved.state_dict())
        model.load_state_dict(checkpoint_filter_fn(saved.state_dict(), model))
        model.set_key_size((2, 2))
        model.load_state_dict(saved.state_dict())


def test_a_fit_leaves_the_random_state_alone():
    model = create_small("ska_vit_tiny_patch16_224", depth=2)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    model.set_key("continuous")
    assert torch.equal(torch.rand(4), expected)
    frequencies = [mixer.static_key.frequencies for mixer in static_mixers(model)]
    assert not torch.equal(*frequencies)


@pytest.mark.parametrize("name", NAMED[:2])
def test_keys_of_a_feature_extractor_are_set_layer_by_layer(name):
    """timm's wrapper has none of the model's methods; its layers do."""
    extractor = create_small(name, features_only=True, out_indices=(0,) if "vit" in name else (0, 1, 2, 3)).eval()
    x = torch.randn(1, 3, 64, 64)
    before = extractor(x)[-1]
    for layer in extractor.modules():
        if isinstance(layer, StaticKeyAttention):
            layer.set_key_size((2, 2))
    assert not torch.equal(extractor(x)[-1], before)
