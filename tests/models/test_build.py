import pytest
import timm
import torch

from statickey import convert
from statickey.convert import token_mixers
from statickey.errors import StaticKeyError, UnknownNameError
from statickey.models import build_model, count_macs


def closed_form_macs(mixer, dim, heads, tokens, depth, hidden, patch_inputs, classes):
    width = dim // heads
    logits = {"mhsa": width, "ska": width, "cska": 9 * width, "fcska": width}[mixer] * heads * tokens**2
    projections = (4 if mixer == "mhsa" else 3) * dim * dim * tokens
    query_conv = 9 * width * dim * tokens if mixer == "fcska" else 0
    block = projections + query_conv + logits + dim * tokens**2 + 2 * dim * hidden * tokens
    return depth * block + patch_inputs * dim * tokens + dim * classes


@pytest.mark.parametrize("mixer", ["mhsa", "ska", "cska", "fcska"])
def test_macs_match_the_closed_form(mixer):
    model = build_model("small_vit", mixer, img_size=32, num_classes=10)
    expected = closed_form_macs(mixer, 96, 4, 64, 4, 192, 48, 10)
    assert count_macs(model, (3, 32, 32)) == expected
    assert model.training
    assert {m.backend for m in model.modules() if hasattr(m, "backend")} == {"sdpa"}


def test_small_vit_sizes_follow_the_image():
    digits = timm.create_model("small_vit", img_size=8, num_classes=10, in_chans=1)
    assert digits.patch_embed.grid_size == (4, 4)
    assert digits.embed_dim == 64
    assert timm.create_model("small_vit").patch_embed.grid_size == (8, 8)
    assert timm.create_model("small_vit", img_size=(32, 64)).patch_embed.grid_size == (8, 16)
    given = timm.create_model("small_vit", img_size=8, patch_size=4, embed_dim=32)
    assert given.patch_embed.grid_size == (2, 2)
    assert given.embed_dim == 32


def test_small_vit_takes_a_mixer_as_the_other_names_do():
    torch.manual_seed(3)
    named = timm.create_model("small_vit", mixer="cska", mixer_args={"kernel_size": 5}, num_classes=2)
    assert named.blocks[0].attn.kernel_size == 5
    built = build_model("small_vit", "cska", img_size=32, num_classes=2, seed=3)
    assert torch.equal(named.blocks[3].attn.qv.weight, built.blocks[3].attn.qv.weight)
    assert type(timm.create_model("small_vit").blocks[0].attn) is timm.layers.Attention
    with pytest.raises(StaticKeyError, match=r"mixer_args={'kernel_size': 5} without a mixer; name one"):
        timm.create_model("small_vit", mixer_args={"kernel_size": 5})


@pytest.mark.parametrize("mixer", [None, "ska"])
@pytest.mark.parametrize(("img_size", "in_chans", "width", "patch"), [(8, 1, 64, 2), (32, 3, 96, 4)])
def test_small_vit_starts_as_it_did_in_version_0_1(mixer, img_size, in_chans, width, patch):
    torch.manual_seed(7)
    sizes = {"img_size": img_size, "patch_size": patch, "in_chans": in_chans, "num_classes": 5, "embed_dim": width}
    plain = {"depth": 4, "num_heads": 4, "mlp_ratio": 2.0, "class_token": False, "global_pool": "avg"}
    expected = timm.models.VisionTransformer(**sizes, **plain, weight_init="jax")
    torch.nn.init.trunc_normal_(expected.pos_embed, std=0.3)
    if mixer is not None:
        convert(expected, mixer)
    model = build_model("small_vit", mixer, img_size=img_size, in_chans=in_chans, num_classes=5, seed=7)
    assert list(model.state_dict()) == list(expected.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def test_any_timm_vision_transformer_by_name():
    model = build_model("vit_tiny_patch16_224", "ska", img_size=32, num_classes=3, model_args={"depth": 1})
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)
    assert model.blocks[0].attn.feat_size == (2, 2)
    assert model.blocks[0].attn.num_prefix_tokens == 1


def test_one_seed_one_set_of_weights():
    first, second, other = (build_model("small_vit", "ska", img_size=8, num_classes=2, seed=s) for s in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.pos_embed, other.pos_embed)


@pytest.mark.parametrize(
    ("name", "args", "error", "message"),
    [
        ("smal_vit", {}, UnknownNameError, "unknown model 'smal_vit'; did you mean small_vit"),
        (
            "small_vit",
            {"patch_size": 5},
            StaticKeyError,
            r"patch_size=5 does not divide img_size=32; use one of \[2, 4, 8\]",
        ),
        ("small_vit", {"embed_dim": 50}, StaticKeyError, "dim=50 is not divisible by num_heads=4; use num_heads in"),
        ("small_vit", {"widht": 50}, StaticKeyError, "widht"),
        (
            "vit_tiny_patch16_224",
            {"patch_size": 12},
            StaticKeyError,
            "patch size 12 .* does not divide img_size=32; resize to img_size=24",
        ),
        (
            "small_vit",
            {"num_classes": 7},
            StaticKeyError,
            "num_classes=7 in model_args: it comes from the data; leave",
        ),
        ("vit_tiny_patch16_224", {"in_chans": 1}, StaticKeyError, "in_chans=1 in model_args: it comes from the data"),
        ("skaformer_nano", {"img_size": 64}, StaticKeyError, "img_size=64 in model_args: it is an option of its own"),
        ("resnet18", {}, StaticKeyError, "ResNet is not a host this can convert"),
    ],
)
def test_refuses(name, args, error, message):
    with pytest.raises(error, match=message):
        build_model(name, "ska", img_size=32, num_classes=2, model_args=args)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("small_vit", {"drop_path_rate": 5}, r"drop_path_rate=5 must be in \[0, 1\)"),
        ("small_vit", {"drop_path_rate": "x"}, r"drop_path_rate='x' must be in \[0, 1\)"),
        ("skaformer_nano", {"attn_drop": -1}, r"attn_drop=-1 must be in"),
        ("vit_tiny_patch16_224", {"num_heads": 0}, "num_heads=0 must be a positive integer"),
        ("ska_vit_tiny_patch16_224", {"num_heads": 0}, "num_heads=0 must be a positive integer"),
        ("vit_tiny_patch16_224", {"embed_dim": 0}, "embed_dim=0 must be a positive integer"),
        ("vit_tiny_patch16_224", {"depth": -1}, "depth=-1 must be a positive integer"),
        ("vit_tiny_patch16_224", {"depth": "x"}, "depth='x' must be a positive integer"),
        ("vit_tiny_patch16_224", {"depth": 10**9}, "depth=1000000000 is more than 1,000; choose a smaller"),
        ("small_vit", {"embed_dim": 10**9 + 1}, "embed_dim=1000000001 is more than 1,000,000; choose a smaller"),
        ("small_vit", {"embed_dim": 10**6}, r"takes [\d,]+ GiB, this machine has \d+; choose a smaller"),
        ("vit_tiny_patch16_224", {"embed_dim": 10**6}, "dim should be divisible by num_heads"),
        ("skaformer_nano", {"depths": (1, 1, 0, 1)}, "depths=0 must be a positive integer"),
        ("ska_lsa_vit_small_patch4_32", {"head_dim": 0}, "head_dim=0 must be a positive integer"),
        ("small_vit", {"mixer_args": {"head_dim": 0}}, "head_dim=0 must be a positive integer"),
        ("vit_tiny_patch16_224", {"norm_layer": "nope"}, "refuses img_size=32, .*'norm_layer': 'nope'.*: 'nope'"),
        ("vit_tiny_patch16_224", {5: 6}, "model_args has the key 5, which is no name"),
        ("vit_tiny_patch16_224", 7, "model_args is 7; it must map names to values"),
        ("vit_tiny_patch16_224", {"checkpoint_path": "nowhere.pt"}, "no weights file 'nowhere.pt'; give a"),
        ("vit_tiny_patch16_224", {"checkpoint_path": __file__}, "cannot read weights from .*test_build.py: "),
    ],
)
def test_impossible_arguments_are_refused_in_one_line(name, args, message):
    with pytest.raises(StaticKeyError, match=message) as caught:
        build_model(name, "ska", img_size=32, num_classes=2, model_args=args)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_classes": 0}, "num_classes=0 must be a positive integer"),
        ({"num_classes": 2.5}, "num_classes=2.5 must be a positive integer"),
        ({"num_classes": 10**10}, "GiB, this machine has"),
        ({"in_chans": -1}, "in_chans=-1 must be a positive integer"),
        ({"img_size": "x"}, "img_size='x' must be a positive integer"),
        ({"img_size": 10**9}, "img_size=1000000000"),
    ],
)
def test_impossible_sizes_are_refused_in_one_line(sizes, message):
    with pytest.raises(StaticKeyError, match=message) as caught:
        build_model("small_vit", "ska", **{"img_size": 32, "num_classes": 2} | sizes)
    assert "\n" not in str(caught.value)


def test_logits_in_float32_are_the_math_backend():
    model = build_model("small_vit", "ska", img_size=8, num_classes=2, fp32_logits=True)
    assert {mixer.backend for mixer in token_mixers(model).values()} == {"math"}
    former = build_model("skaformer_nano", "pool", img_size=32, num_classes=2, fp32_logits=True)
    assert {getattr(mixer, "backend", "none") for mixer in token_mixers(former).values()} == {"math", "none"}


TINY = {"depth": 1, "embed_dim": 24, "num_heads": 3}


def test_a_tag_of_timm():
    tagged = build_model("vit_tiny_patch16_224.augreg_in21k", "ska", img_size=32, num_classes=3, model_args=TINY)
    plain = build_model("vit_tiny_patch16_224", "ska", img_size=32, num_classes=3, model_args=TINY)
    assert tagged.pretrained_cfg["tag"] == "augreg_in21k"
    assert all(torch.equal(a, b) for a, b in zip(tagged.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "vit_tiny_patch16_224.augreg_in22k",
            UnknownNameError,
            "unknown tag of vit_tiny_patch16_224 'augreg_in22k'; did you mean augreg_in21k",
        ),
        ("vit_tiny_patch16_22.augreg_in21k", UnknownNameError, "unknown model 'vit_tiny_patch16_22'; did you mean"),
        ("small_vit.x", UnknownNameError, "small_vit has no tags; leave out '.x'"),
        ("runs/first", UnknownNameError, "Use 'hf-hub:runs/first' to load from the Hub or 'local-dir:runs/first'"),
        ("ftp:nowhere", UnknownNameError, "Unknown model source 'ftp'"),
        (
            "local-dir:nowhere",
            StaticKeyError,
            "cannot read the model 'local-dir:nowhere': .*; give a folder with the",
        ),
        (
            "hf-hub:no/model",
            StaticKeyError,
            "cannot read the model 'hf-hub:no/model': .*; connect to the network once",
        ),
        (None, UnknownNameError, "model=None must be a name"),
    ],
)
def test_names_that_stand_for_nothing(name, error, message, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(error, match=message) as caught:
        build_model(name, "ska", img_size=32, num_classes=3)
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        StaticKeyError, match=r"cannot get the weights of model 'vit_tiny_.*: .*; connect to the network once"
    ) as caught:
        cached = {"pretrained": True, "cache_dir": str(tmp_path)}
        build_model("vit_tiny_patch16_224", "ska", img_size=32, num_classes=3, model_args=cached)
    assert "\n" not in str(caught.value)


def test_a_folder_that_timm_saved(tmp_path):
    torch.manual_seed(1)
    saved = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3, **TINY)
    timm.models.save_for_hf(saved, tmp_path, safe_serialization=True)
    loaded = build_model(f"local-dir:{tmp_path}", "ska", img_size=32, num_classes=3, model_args={"pretrained": True})
    assert torch.equal(loaded.blocks[0].mlp.fc1.weight, saved.blocks[0].mlp.fc1.weight)
    assert torch.equal(loaded.blocks[0].attn.qv.weight[:24], saved.blocks[0].attn.qkv.weight[:24])
    assert loaded.blocks[0].attn.feat_size == (2, 2)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(StaticKeyError, match="No suitable checkpoints found"):
        build_model(f"local-dir:{tmp_path}", None, img_size=32, num_classes=3, model_args={"pretrained": True})


def test_a_host_that_holds_mixers_does_not_swallow_a_swap(monkeypatch, tmp_path):
    """The rows of a comparison would be one network under several names."""
    args = {"img_size": 8, "num_classes": 3, "in_chans": 1}
    model = build_model("small_vit", "cska@-1", model_args={"mixer": "ska"}, **args)
    kinds = [type(mixer).__name__ for mixer in token_mixers(model).values()]
    assert set(kinds[:-1]) == {"StaticKeyAttention"}
    assert kinds[-1] == "ConvStaticKeyAttention"
    model = build_model("small_vit", "cska:kernel_size=5@-1", **args)
    assert model.mixer_text == "cska:kernel_size=5@-1"
    assert build_model("small_vit", None, **args).mixer_text is None


def test_a_swap_brings_arguments_and_layers():
    args = {"img_size": 8, "num_classes": 3, "in_chans": 1}
    wide = build_model("small_vit", "cska:kernel_size=5", **args)
    assert {mixer.kernel_size for mixer in token_mixers(wide).values()} == {5}
    some = build_model("small_vit", "ska@-2,-1", **args)
    assert list(token_mixers(some)) == ["blocks.2.attn", "blocks.3.attn"]
    whole = build_model("small_vit", "ska", **args)
    torch.testing.assert_close(some.blocks[3].attn.static_key, whole.blocks[3].attn.static_key, rtol=0, atol=0)
    former = build_model("skaformer_nano", "cska:kernel_size=5", img_size=32, num_classes=3)
    stage = [type(mixer).__name__ for name, mixer in token_mixers(former).items() if name.startswith("stages.1")]
    assert stage == ["ConvStaticKeyAttention"]
    assert former.stages[1].blocks[0].token_mixer.kernel_size == 5
    with pytest.raises(
        StaticKeyError, match=r"mixer 'ska@0' names layers, but 'skaformer_nano' has its mixer in all"
    ):
        build_model("skaformer_nano", "ska@0", img_size=32, num_classes=3)
