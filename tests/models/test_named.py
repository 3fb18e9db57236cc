"""Sizes, patterns and weights of the named models."""

import copy
import itertools

import pytest
import timm
import torch

from statickey import MIXERS, convert
from statickey import models as models_package
from statickey.convert import token_mixers
from statickey.errors import StaticKeyError, UnknownNameError
from statickey.models import build_model, checkpoint_filter_fn, count_macs, warm_start

CAFORMER = {"mixers": ("sepconv", "sepconv", "mhsa", "mhsa")}
FIGURES = [
    ("skaformer_s18", CAFORMER, 26.34, 4.107),
    ("skaformer_s18", {}, 26.51, 4.47),
    ("cskaformer_s18", {}, 28.98, 6.40),
    ("cskaformer_b36", {}, 119.5, 41.2),
    ("fcskaformer_s18", {}, 26.61, 4.55),
    ("lsa_vit_small_patch4_32", {}, 9.62, 0.647),
    ("cska_lsa_vit_small_patch4_32", {}, 10.05, None),
    ("ska_lsa_vit_small_patch4_32", {"num_heads": 10}, 9.5, None),
]


@pytest.mark.parametrize(("name", "kwargs", "params", "macs"), FIGURES)
def test_recomputed_figures(name, kwargs, params, macs):
    with torch.device("meta"):
        model = timm.create_model(name, **kwargs)

    def digits(figure):
        return len(str(figure).partition(".")[2])

    assert round(sum(p.numel() for p in model.parameters()) / 1e6, digits(params)) == params
    if macs is not None:
        counted = count_macs(model, model.pretrained_cfg["input_size"])
        assert round(counted / 1e9, digits(macs)) == macs


def test_same_function_as_timms_caformer():
    torch.manual_seed(0)
    peer = timm.create_model("caformer_s18", num_classes=5).eval()
    model = timm.create_model("skaformer_s18", num_classes=5, **CAFORMER).eval()
    report = warm_start(model, peer.state_dict())
    assert report.fresh == report.unused == ()
    images = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(images), peer(images), rtol=1e-4, atol=1e-5)


NANO = {"num_classes": 4, "img_size": 64}


@pytest.mark.parametrize("mixer", ["mhsa", "ska", "cska", "fcska", "sepconv", "pool", "identity", "constant"])
@pytest.mark.parametrize("stage", range(4))
def test_any_mixer_in_any_stage(mixer, stage):
    mixers = ["sepconv", "sepconv", "mhsa", "mhsa"]
    mixers[stage] = mixer
    model = timm.create_model("skaformer_nano", mixers=tuple(mixers), **NANO)
    found = [type(m) for n, m in token_mixers(model).items() if n.startswith(f"stages.{stage}.")]
    assert set(found) == {MIXERS[mixer]}
    out = model(torch.randn(2, 3, 64, 64))
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "proj"),
    [
        ("skaformer_nano", "stages.1.blocks.0.token_mixer.proj.weight"),
        ("ska_vit_tiny_patch16_224", "blocks.1.attn.proj.weight"),
        ("lsa_vit_small_patch4_32", "blocks.1.attn.proj.weight"),
    ],
)
def test_shared_weights_are_bit_identical_across_mixers(name, proj):
    """One seed, one set of shared weights: outside the swapped attention, and inside it where two mixers agree."""
    states = {}
    for mixer in ("mhsa", "ska", "cska", "fcska", "sepconv" if "former" in name else "synthesizer"):
        if (name, mixer) == ("lsa_vit_small_patch4_32", "synthesizer"):
            continue
        args = {"depths": (1, 1, 1, 1)} if "former" in name else {"depth": 2}
        states[mixer] = build_model(name, mixer, img_size=32, num_classes=4, seed=5, model_args=args).state_dict()
        states[mixer]["next draw"] = torch.rand(3)
    for first, second in itertools.combinations(states, 2):
        shared = [
            n for n in states[first] if n in states[second] and states[first][n].shape == states[second][n].shape
        ]
        assert len(shared) > 20
        assert (proj in shared) == ("sepconv" not in (first, second))
        for key in shared:
            if "synthesizer" in (first, second) and "static_key" in key:
                continue  # of another scale
            assert torch.equal(states[first][key], states[second][key]), (first, second, key)
    queries = [n for n in states["cska"] if n.endswith("qv.weight")]
    assert queries
    assert all(torch.equal(states["cska"][n], states["fcska"][n]) for n in queries)


def test_projections_start_as_timms():
    model = timm.create_model("cskaformer_s18")
    for mixer in token_mixers(model).values():
        for name, parameter in mixer.named_parameters():
            if name.split(".")[0] in {"qv", "qkv", "proj", "pwconv1", "pwconv2", "dwconv"}:
                assert abs(parameter.std().item() - 0.02) < 0.002
            if name == "conv_key":
                assert abs(parameter.std().item() - 1 / 12 / 3**0.5) < 0.001


OVERRIDES = {
    "skaformer_nano": [
        (
            {"depths": (1, 1, 1, 1), "dims": (16, 32, 48, 64)},
            lambda m: [s.blocks[0].norm1.weight.numel() for s in m.stages] == [16, 32, 48, 64],
        ),
        ({"drop_path_rate": 0.3}, lambda m: m.stages[3].blocks[0].drop_path1.drop_prob == pytest.approx(0.3)),
        ({"proj_drop_rate": 0.2}, lambda m: m.stages[1].blocks[0].token_mixer.proj_drop.p == 0.2),
        ({"attn_drop": 0.1}, lambda m: m.stages[1].blocks[0].token_mixer.attn_drop.p == 0.1),
        ({"qkv_bias": True}, lambda m: m.stages[3].blocks[0].token_mixer.qkv.bias is not None),
        ({"mixer_args": {"ska": {"query_proj": True}}}, lambda m: hasattr(m.stages[1].blocks[0].token_mixer, "qv")),
        ({"mixer_args": {"mhsa": {"head_dim": 16}}}, lambda m: m.stages[3].blocks[0].token_mixer.num_heads == 16),
        ({"img_size": (96, 64)}, lambda m: m.stages[1].blocks[0].token_mixer.feat_size == (12, 8)),
        ({"in_chans": 1, "global_pool": "max"}, lambda m: m.stem.conv.in_channels == 1),
        (
            {"use_mlp_head": False, "drop_rate": 0.2},
            lambda m: m.head.fc.out_features == 1000 and m.head.drop.p == 0.2,
        ),
    ],
    "fcska_vit_tiny_patch16_224": [
        (
            {"embed_dim": 96, "depth": 3, "num_heads": 4, "mlp_ratio": 2},
            lambda m: m.blocks[2].mlp.fc1.out_features == 192,
        ),
        (
            {"mixer_args": {"kernel_size": 5, "off_grid": "window"}},
            lambda m: m.blocks[0].attn.query_conv.kernel_size == (5, 5),
        ),
        ({"patch_size": 32, "img_size": (64, 96)}, lambda m: m.blocks[0].attn.feat_size == (2, 3)),
        (
            {"class_token": False, "global_pool": "avg", "reg_tokens": 3},
            lambda m: m.blocks[0].attn.num_prefix_tokens == 3,
        ),
        ({"qk_norm": True, "init_values": 1e-5}, lambda m: m.blocks[0].attn.q_norm.weight.numel() == 64),
        (
            {"proj_drop_rate": 0.1, "attn_drop_rate": 0.2, "drop_path_rate": 0.3},
            lambda m: m.blocks[0].attn.attn_drop.p == 0.2,
        ),
        ({"weight_init": "jax", "fix_init": True, "qkv_bias": False}, lambda m: m.blocks[0].attn.qv.bias is None),
    ],
    "ska_lsa_vit_small_patch4_32": [
        ({"num_heads": 10}, lambda m: m.blocks[0].attn.static_key.shape == (10, 65, 64)),
        ({"head_dim": 32, "patch_size": 8}, lambda m: m.blocks[0].attn.static_key.shape == (8, 17, 32)),
        ({"num_classes": 100, "depth": 2}, lambda m: m.head.out_features == 100),
        ({"mixer_args": {"mask_diagonal": False}}, lambda m: not m.blocks[0].attn.mask_diagonal),
    ],
}


@pytest.mark.parametrize(
    ("name", "index"), [(name, i) for name, cases in OVERRIDES.items() for i in range(len(cases))]
)
def test_constructor_overrides(name, index):
    kwargs, holds = OVERRIDES[name][index]
    model = timm.create_model(name, **kwargs)
    assert holds(model)


PATTERNS = {
    "length": ({"mixers": ("ska", "mhsa")}, r"mixers=\('ska', 'mhsa'\) must hold one name per stage"),
    "text": ({"mixers": "skas"}, "mixers='skas' must hold one name per stage"),
    "depths": ({"depths": (1, 1, 1)}, r"as many as depths=\(1, 1, 1\)"),
    "unknown": ({"mixers": ("sepconv", "skaa", "mhsa", "mhsa")}, "unknown mixer 'skaa'; did you mean ska"),
    "unused": ({"mixer_args": {"cska": {}}}, "mixer_args=.* must map names of"),
    "flat": ({"mixer_args": {"kernel_size": 5}}, "mixer_args=.* must map names of"),
    "option": ({"mixer_args": {"ska": {"kernel_size": 5}}}, "mixer 'ska': .*kernel_size"),
    "heads": ({"mixer_args": {"ska": {"num_heads": 7}}}, "dim=64 is not divisible by num_heads=7"),
    "no name": ({"mixers": ("sepconv", None, "mhsa", "mhsa")}, "mixer=None must be a name"),
    "no mapping": ({"mixer_args": {"ska": [1]}}, r"mixer_args\['ska'\] is \[1\]; it must map"),
    "half a size": ({"img_size": 22.4}, "img_size=22.4 must be one side in pixels, or a pair"),
    "one of a pair": ({"img_size": (64,)}, r"img_size=\(64,\) must be one side in pixels, or a pair"),
    "too small": ({"img_size": (2, 64)}, r"img_size=\(2, 64\) leaves a grid of \(0, 16\) in stage 0"),
}


@pytest.mark.parametrize("case", PATTERNS)
def test_impossible_patterns(case):
    kwargs, message = PATTERNS[case]
    with pytest.raises(StaticKeyError, match=message) as caught:
        timm.create_model("skaformer_nano", **kwargs)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UnknownNameError) == (case in {"unknown", "no name"})


def test_warm_start_from_a_caformer_says_what_it_took():
    torch.manual_seed(1)
    peer = timm.create_model("caformer_s18")
    model = timm.create_model("cskaformer_s18", num_classes=10)
    fresh_before = {n: p.clone() for n, p in model.state_dict().items()}
    report = warm_start(model, peer.state_dict())
    assert all(
        (".token_mixer." in name and name.startswith("stages.1.")) or name.startswith("head.fc.fc2")
        for name in report.fresh
    )
    assert len(report.fresh) == 3 * 4 + 2
    assert {name.split(".")[0] for name in report.unused} == {"stages", "head"}
    state = model.state_dict()
    for name in report.fresh:
        assert torch.equal(state[name], fresh_before[name])
    assert torch.equal(
        state["stages.1.blocks.2.mlp.fc1.weight"].flatten(), peer.stages[1].blocks[2].mlp.fc1.weight.flatten()
    )
    text = str(report)
    assert "fresh 14: stages.*.blocks.*.token_mixer.conv_key (3)" in text
    assert "head.fc.fc2.weight, head.fc.fc2.bias" in text
    with pytest.raises(
        StaticKeyError, match=r"nothing fits: the model has 'stem.conv.weight'.*start with 'conv1.weight'"
    ):
        warm_start(model, timm.create_model("resnet18").state_dict())


def test_warm_start_from_a_vit_takes_queries_and_values():
    torch.manual_seed(1)
    peer = timm.create_model("vit_tiny_patch16_224")
    model = timm.create_model("ska_vit_tiny_patch16_224", img_size=(96, 128))
    larger = timm.create_model("vit_tiny_patch16_384", depth=1).state_dict()
    assert "pos_embed" in warm_start(copy.deepcopy(model), larger).taken
    report = warm_start(model, peer.state_dict())
    assert report.fresh == tuple(f"blocks.{i}.attn.static_key" for i in range(12))
    assert report.unused == ()
    query, _, value = peer.blocks[3].attn.qkv.weight.chunk(3)
    assert torch.equal(model.blocks[3].attn.qv.weight, torch.cat([query, value]))
    assert model.pos_embed.shape == (1, 1 + 6 * 8, 192)


def test_warm_start_takes_the_keys_of_heads_that_stay_dynamic():
    host = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    convert(model, "partly_static", keep_weights=False, mixer_args={"dynamic_heads": [0, 2]})
    report = warm_start(model, host.state_dict())
    keys = host.blocks[0].attn.qkv.weight[192:384]
    assert torch.equal(model.blocks[0].attn.k.weight, torch.cat([keys[:64], keys[128:]]))
    assert report.fresh == ("blocks.0.attn.static_key",)
    again = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    convert(again, "partly_static", keep_weights=False, mixer_args={"dynamic_heads": [0, 2]})
    assert warm_start(again, model.state_dict()).fresh == ()


def test_convert_after_warm_start_keeps_everything_else():
    torch.manual_seed(1)
    peer = timm.create_model("vit_tiny_patch16_224", img_size=64)
    kept = peer.state_dict()
    report = convert(peer, "ska", layers=[2, 3])
    assert [m.name for m in report.modules] == ["blocks.2.attn", "blocks.3.attn"]
    state = peer.state_dict()
    assert all(
        torch.equal(state[n], t) for n, t in kept.items() if "blocks.2.attn" not in n and "blocks.3.attn" not in n
    )


def test_warm_start_leaves_projections_of_other_heads_fresh():
    """Rows of a projection belong to heads: 5 of 32 channels are not 10 of 16."""
    torch.manual_seed(1)
    peer = timm.create_model("skaformer_nano", **NANO)
    model = timm.create_model("skaformer_nano", mixers=("sepconv", "ska", "cska", "mhsa"), **NANO)
    report = warm_start(model, peer.state_dict())
    assert {n.split(".")[1] for n in report.fresh} == {"2"}
    assert any("qv.weight" in n for n in report.fresh)
    assert not any("mlp" in n for n in report.fresh)
    same = timm.create_model(
        "skaformer_nano", mixers=("sepconv", "ska", "fcska", "mhsa"), mixer_args={"fcska": {"head_dim": 32}}, **NANO
    )
    assert "stages.2.blocks.0.token_mixer.qv.weight" in warm_start(same, peer.state_dict()).taken


UNFIT = {
    "registers": ("ska_vit_tiny_patch16_224", {}, {"reg_tokens": 4}, "pos_embed|static_key"),
    "no class token": ("ska_vit_tiny_patch16_224", {}, {"class_token": False, "global_pool": "avg"}, "class_token"),
    "patch of shifted patches": ("ska_lsa_vit_small_patch4_32", {}, {"patch_size": 8}, "patch_embed"),
    "channels of shifted patches": ("ska_lsa_vit_small_patch4_32", {"in_chans": 1}, {"in_chans": 4}, "patch_embed"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_cannot_be_adapted_is_named(case):
    name, saved, wanted, message = UNFIT[case]
    sizes = {"depth": 1, "img_size": 32, "num_classes": 3}
    state = timm.create_model(name, **sizes | saved).state_dict()
    model = timm.create_model(name, **sizes | wanted)
    with pytest.raises(StaticKeyError, match=message):
        model.load_state_dict(checkpoint_filter_fn(state, model))


def test_another_patch_size():
    torch.manual_seed(0)
    peer = timm.create_model("ska_vit_tiny_patch16_224", depth=1, img_size=64)
    model = timm.create_model("ska_vit_tiny_patch16_224", depth=1, img_size=64, patch_size=8)
    model.load_state_dict(checkpoint_filter_fn(peer.state_dict(), model))
    assert model.blocks[0].attn.feat_size == (8, 8)


@pytest.mark.parametrize("name", ["cait_xxs24_224", "beit_base_patch16_224"])
def test_filter_on_converted_hosts(name):
    extra = {"use_abs_pos_emb": True} if "beit" in name else {}
    models = [timm.create_model(name, img_size=size, depth=2, **extra) for size in (64, 96)]
    for model in models:
        convert(model, "ska")
    models[1].load_state_dict(checkpoint_filter_fn(models[0].state_dict(), models[1]))


@pytest.mark.parametrize("loader", ["load_reference_state_dict", "warm_start", "checkpoint_filter_fn"])
def test_a_path_is_not_a_state_dict(loader):
    model = timm.create_model("skaformer_nano", **NANO)
    args = ("a.pth", model) if loader == "checkpoint_filter_fn" else (model, "a.pth")
    with pytest.raises(StaticKeyError, match=r"state_dict is 'a\.pth'; it must map"):
        getattr(models_package, loader)(*args)
