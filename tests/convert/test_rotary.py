import copy
import pickle

import pytest
import timm
import torch
from timm.layers import Attention, AttentionRope
from torch import nn

from statickey import convert
from statickey.convert import token_mixers
from statickey.errors import StaticKeyError
from statickey.models import checkpoint_filter_fn
from statickey.viz import capture_attention
from tolerances import assert_close, assert_same_with_gradients

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 5}


def gated_eva():
    model = timm.models.eva.Eva(**TINY, img_size=32, patch_size=8, use_rot_pos_emb=True, attn_type="rope")
    for block in model.blocks:
        block.attn = AttentionRope(32, 4, gated=True, num_prefix_tokens=1)
    return model


def gated_vit():
    model = timm.models.VisionTransformer(**TINY, img_size=32, patch_size=8)
    for block in model.blocks:
        block.attn = Attention(32, 4, gated=True, qkv_bias=True)
    return model


def named(name, size, **kwargs):
    return lambda: timm.create_model(name, **TINY | kwargs, img_size=size)


def encoder(name, size):
    kwargs = {"embed_dim": 32, "depth": 2, "num_heads": 4, "global_pool": "avg"}
    return lambda: timm.create_model(name, img_size=size, **kwargs)


def naflex(**kwargs):
    return lambda: timm.create_model("naflexvit_base_patch16_gap", **TINY | kwargs)


SEPARATE = {"qkv_fused": False, "attn_type": "rope"}
HOSTS = {
    "eva02": named("eva02_tiny_patch14_224", (42, 28)),
    "eva02, separate projections": named("eva02_base_patch14_224", (42, 28)),
    "dinov3": named("vit_small_patch16_dinov3", (48, 32)),
    "dinov3, biases": named("vit_small_patch16_dinov3_qkvb", (48, 32)),
    "dinov3, one size": named("vit_small_patch16_dinov3", (48, 32), dynamic_img_size=False),
    "rope of each head": named("vit_small_patch16_rope_mixed_ape_224", (48, 32)),
    "registers": named("vit_betwixt_patch16_rope_reg4_gap_256", (48, 32)),
    "perception encoder": named("vit_pe_core_tiny_patch16_384", (48, 32)),
    "norm after": named("eva02_enormous_patch14_clip_224", (42, 28), mlp_ratio=2.0, use_rot_pos_emb=True),
    "grouped keys": named("vit_base_patch16_sapiens2", (48, 32), num_kv_heads=(4, 2)),
    "grouped keys, no bias": named("eva02_base_patch14_224", (42, 28), num_kv_heads=1, qkv_bias=False, **SEPARATE),
    "gate": gated_eva,
    "gate, no rope": gated_vit,
    "deepseek": encoder("deepseek_vit_412m_enc", (42, 28)),
    "qwen": encoder("qwen3_vit_88m_enc", (48, 32)),
    "naflex": naflex(pos_embed="factorized", reg_tokens=1),
    "naflex, rope and gate": naflex(rope_type="axial", attn_gated=True),
    "naflex, rope of each head": naflex(rope_type="mixed"),
}


def made(name):
    """A host in double precision, no parameter at a value that hides a mistake, and images for it."""
    torch.manual_seed(0)
    model = HOSTS[name]().double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.5 if parameter.ndim == 1 else 0.0, std=0.3)
    size = model.patch_embed.img_size if hasattr(model, "patch_embed") else (48, 32)
    return model, torch.randn(2, 3, *size, dtype=torch.float64)


@pytest.mark.parametrize("name", HOSTS)
def test_self_attention_keeps_the_function_and_its_gradients(name):
    model, images = made(name)
    twin = copy.deepcopy(model)
    report = convert(model, "mhsa")
    assert len(report.modules) == 2
    if "grouped" in name:
        assert report.macs_after > report.macs_before
    else:
        assert report.macs_after == report.macs_before
    assert_same_with_gradients(model, twin, [images])
    own, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    shared = own.keys() & theirs.keys()
    assert {"blocks.0.norm1.weight", "blocks.1.mlp.fc2.weight"} <= shared
    for net in (model, twin):
        net(images).square().mean().backward()
    for parameter in shared:
        assert_close(parameter, own[parameter].grad, theirs[parameter].grad)


@pytest.mark.parametrize("mixer", ["ska", "cska", "fcska"])
@pytest.mark.parametrize("name", HOSTS)
def test_static_keys_train(name, mixer):
    model, images = made(name)
    convert(model, mixer)
    torch.manual_seed(1)  # some hosts move their coordinates in training
    model.train()(images).square().mean().backward()
    without = [parameter for parameter, value in model.named_parameters() if value.grad is None]
    assert not without
    keys = {parameter for parameter in model.no_weight_decay() if parameter.endswith(("_key", "conv_bias"))}
    assert len(keys) == 2 * {"ska": 1, "fcska": 1}.get(mixer, 2 + bool(model.num_prefix_tokens))
    model.set_grad_checkpointing()
    before = {parameter: value.grad.clone() for parameter, value in model.named_parameters()}
    model.zero_grad()
    torch.manual_seed(1)
    model(images).square().mean().backward()
    for parameter, value in model.named_parameters():
        assert_close(parameter, value.grad, before[parameter])


@pytest.mark.parametrize(
    "name", ["dinov3", "dinov3, one size", "rope of each head", "perception encoder", "qwen", "naflex"]
)
def test_other_sizes_follow_the_host(name):
    model, _ = made(name)
    host = copy.deepcopy(model)
    convert(model, "mhsa")
    size = (64, 80)
    images = torch.randn(1, 3, *size, dtype=torch.float64)
    if name in ("dinov3", "qwen", "naflex"):
        assert_close("at a call", model(images), host(images))
    if hasattr(host, "set_input_size"):
        host.set_input_size(size)
    model.set_input_size(size)
    assert_close("rebuilt", model(images), host(images))
    assert all(mixer.feat_size == (4, 5) for mixer in token_mixers(model).values())


@pytest.mark.parametrize("mixer", ["ska", "cska", "fcska"])
def test_a_static_key_is_resampled_before_it_is_turned(mixer):
    model, _ = made("dinov3")  # no absolute positions: both ways are the same function
    convert(model, mixer)
    images = torch.randn(1, 3, 64, 80, dtype=torch.float64)
    before = model(images)
    model.set_input_size((64, 80))
    assert_close("other size", model(images), before)


@pytest.mark.parametrize("mixer", ["cska", "fcska"])
@pytest.mark.parametrize("name", ["dinov3, one size", "rope of each head"])
def test_checkpoints_load_across_sizes(name, mixer):
    model, _ = made(name)
    other, _ = made(name)
    other.set_input_size((64, 80))
    for net in (model, other):
        convert(net, mixer)
    with pytest.raises(StaticKeyError, match="img_size"):
        other.load_state_dict(model.state_dict())
    other.load_state_dict(checkpoint_filter_fn(model.state_dict(), other))
    model.set_input_size((64, 80))
    images = torch.randn(1, 3, 64, 80, dtype=torch.float64)
    assert_close("other size", other(images), model(images))


def test_the_rotation_counts():
    model, images = made("dinov3")
    convert(model, "ska")
    before = model(images)
    model.rope.periods.mul_(3.0)
    assert (model(images) - before).abs().max() > 1e-3 * before.std()


def test_copies_and_a_second_swap():
    model, images = made("dinov3, biases")
    twin = copy.deepcopy(model)
    convert(twin, "ska")
    convert(model, "mhsa")
    convert(model, "ska")
    assert_close("twice", model(images), twin(images))
    assert torch.equal(pickle.loads(pickle.dumps(model))(images), model(images))
    twin.load_state_dict(model.state_dict())


def test_maps_are_those_of_turned_queries_and_keys():
    model, images = made("rope of each head")
    convert(model, "mhsa")
    seen = {}

    def look(module, args, kwargs, output):
        seen[module] = (args[0], kwargs["rope"])

    mixer = model.blocks[0].attn.mixer
    handle = mixer.register_forward_hook(look, with_kwargs=True)
    maps = capture_attention(model, images, ["blocks.0.attn.mixer"])["blocks.0.attn.mixer"]
    handle.remove()
    x, rope = seen[mixer]
    assert_close("map", maps, mixer.attention_weights(x, rope=rope))
    assert (maps - mixer.attention_weights(x)).abs().max() > 1e-3


def every_name():
    modules = ("eva", "deepseek_vit", "qwen3_vit", "naflexvit")
    return [
        name
        for name in timm.list_models()
        if timm.models.model_entrypoint(name).__module__.rpartition(".")[2] in modules
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", every_name())
def test_every_name_of_timm(name):
    torch.manual_seed(0)
    patch = 14 if "patch14" in name or "deepseek" in name else 16
    size = 4 * patch
    kwargs = {"embed_dim": 64, "depth": 2, "num_heads": 4}
    if "sapiens2" in name:
        kwargs["num_kv_heads"] = (4, 2)
    if "naflex" not in name:
        kwargs["img_size"] = size
    model = timm.create_model(name, **kwargs).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    twin = copy.deepcopy(model)
    convert(twin, "mhsa")
    assert_close("logits", twin(images), model(images))
    convert(model, "ska")
    model(images).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    getattr(model, "encoder", model).set_input_size((2 * size, size))
    model(torch.randn(1, 3, 2 * size, size, dtype=torch.float64))


REFUSED = {
    "a map of positions": ("constant", {}, "a rotary position embedding, for which mixer 'constant' has no place"),
    "a perceptron": ("synthesizer", {}, "a rotary position embedding, for which mixer 'synthesizer' has no place"),
    "coarser keys": ("ska", {"key_size": (2, 1)}, "takes key_size=None and off_grid='resample'"),
    "pooled": ("ska", {"off_grid": "pool"}, "not None and 'pool'"),
    "other heads": ("ska", {"head_dim": 16}, "a rotary position embedding for 4 heads of 8, the mixer has 2 of 16"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_what_has_nothing_to_turn(case):
    mixer, args, message = REFUSED[case]
    model, _ = made("dinov3")
    with pytest.raises(StaticKeyError, match=message):
        convert(model, mixer, mixer_args=args, keep_weights=False)
    assert not token_mixers(model)


def test_a_grid_for_each_image_is_refused():
    model, _ = made("naflex")
    convert(model, "ska")
    patches = torch.zeros(1, 6, 768, dtype=torch.float64)
    with pytest.raises(StaticKeyError, match=r"patch_coord gives each image a grid of its own.*pass images"):
        model(patches, patch_coord=torch.zeros(1, 6, 2, dtype=torch.long), patch_valid=torch.ones(1, 6).bool())
    with pytest.raises(StaticKeyError, match="keeps that of its embedding"):
        model.set_input_size(patch_size=(8, 8))


def test_a_host_without_a_place_says_why():
    with torch.device("meta"):
        model = timm.create_model("gemma4_vit_167m", depth=1)
    with pytest.raises(StaticKeyError, match="Gemma4Attention norms its values"):
        convert(model, "ska")


@pytest.mark.parametrize("mixer", ["mhsa", "ska", "cska", "fcska"])
def test_autocast(mixer):
    model, images = made("dinov3, biases")
    model, images = model.float(), images.float()
    convert(model, mixer)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images)
    assert out.isfinite().all()
    assert (out.float() - expected).abs().mean() < 0.05 * expected.std() + 0.02


def test_controls_stand_where_nothing_turns():
    model = timm.models.eva.Eva(**TINY, img_size=32, patch_size=8)
    convert(model, "constant")
    assert model(torch.randn(1, 3, 32, 32)).shape == (1, 5)
