"""timm's hosts of other kinds than plain transformers: each keeps its function, trains, loads, follows its size."""

import copy

import pytest
import timm
import torch
from timm.models import byobnet, vision_transformer

from conversions import follows_size, keeps_function, trains_static_keys, unsettle
from statickey import Calibration, convert
from statickey.convert import token_mixers
from statickey.convert.calibration.reading import change, outputs
from statickey.convert.hiera import UnrolledMixer
from statickey.convert.wrappers import find_host
from statickey.errors import StaticKeyError, UnsupportedHostError
from statickey.layers import PartlyStaticAttention
from tolerances import assert_close

models = timm.models
RECT = (96, 64)
SMALL = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 4}


def sized(size, make):
    """A host of maps, told the size of its input, which it does not ask for."""
    model = make()
    models._input.update_model_input_size(model, size)
    return model


def byob(block, stride=2, **args):
    stem = byobnet.ByoBlockCfg(type="bottle", d=1, c=16, s=2, gs=0, br=0.5)
    blocks = (stem, byobnet.ByoBlockCfg(type=block, d=1, c=32, s=stride, gs=0, br=0.5, **args))
    cfg = byobnet.ByoModelCfg(blocks=blocks, stem_chs=16, stem_pool="", downsample="")
    return byobnet.ByobNet(cfg, num_classes=5, img_size=64)


FOUR = {"depths": (1, 1, 1, 1), "embed_dims": (16, 24, 32, 40)}
HOSTS = {
    "maxvit": (lambda: timm.create_model("test_maxvit", img_size=64, num_classes=5), 64, RECT),
    "coatnet": (lambda: timm.create_model("test_coatnet", img_size=64, num_classes=5), 64, RECT),
    "maxvit, parallel": (
        lambda: timm.create_model(
            "maxvit_tiny_pm_256",
            img_size=64,
            num_classes=5,
            embed_dim=(32, 64),
            depths=(1, 1),
            block_type=("PM", "PM"),
        ),
        64,
        RECT,
    ),
    "levit": (lambda: levit(), 64, None),
    "levit, maps": (lambda: levit(use_conv=True), 64, None),
    "efficientformer": (
        lambda: models.EfficientFormer(**FOUR, num_vit=1, num_classes=5),
        224,
        None,
    ),
    "tinyvit": (
        lambda: sized(
            64, lambda: models.TinyVit(**FOUR, num_heads=(1, 2, 2, 2), window_sizes=(7, 3, 4, 2), num_classes=5)
        ),
        64,
        RECT,
    ),
    "volo": (
        lambda: models.VOLO(
            img_size=64, layers=(1, 1, 1, 1), embed_dims=(32, 48, 48, 48), num_heads=(2, 4, 4, 4), num_classes=5
        ),
        64,
        None,
    ),
    "fastvit": (
        lambda: sized(
            64,
            lambda: models.FastVit(
                layers=(1, 1, 1, 1),
                embed_dims=(16, 32, 32, 64),
                token_mixers=("repmixer", "repmixer", "attention", "attention"),
                num_classes=5,
            ),
        ),
        64,
        RECT,
    ),
    "visformer": (
        lambda: models.Visformer(img_size=64, init_channels=8, embed_dim=48, depth=(1, 1, 1), num_classes=5),
        64,
        None,
    ),
    "davit": (
        lambda: sized(64, lambda: models.DaVit(**FOUR, num_heads=(1, 2, 2, 2), window_size=3, num_classes=5)),
        64,
        RECT,
    ),
    "nest": (
        lambda: models.Nest(
            img_size=64, embed_dims=(16, 24, 32), num_heads=(2, 2, 4), depths=(1, 1, 1), num_classes=5
        ),
        64,
        None,
    ),
    "pit": (
        lambda: models.PoolingVisionTransformer(
            img_size=64, base_dims=(12, 12, 12), depth=(1, 1, 1), heads=(1, 2, 4), num_classes=5
        ),
        64,
        None,
    ),
    "tnt": (
        lambda: models.TNT(
            img_size=64, embed_dim=48, inner_dim=16, depth=2, num_heads_inner=2, num_heads_outer=4, num_classes=5
        ),
        64,
        None,
    ),
    "crossvit": (
        lambda: models.CrossVit(
            img_size=48, patch_size=(12, 16), embed_dim=(24, 48), depth=((1, 2, 0),), num_heads=(2, 4), num_classes=5
        ),
        48,
        None,
    ),
    "relpos": (
        lambda: models.VisionTransformerRelPos(
            **SMALL, class_token=True, rel_pos_type="bias", qk_norm=True, num_classes=5
        ),
        64,
        RECT,
    ),
    "relpos, shared": (
        lambda: models.VisionTransformerRelPos(**SMALL, shared_rel_pos=True, num_classes=5),
        64,
        RECT,
    ),
    "swin v2 cr": (
        lambda: models.SwinTransformerV2Cr(
            img_size=64, embed_dim=16, depths=(2, 1), num_heads=(2, 4), window_size=4, num_classes=5
        ),
        64,
        RECT,
    ),
    "gcvit": (
        lambda: models.GlobalContextVit(
            img_size=64, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_ratio=(4, 8), num_classes=5
        ),
        64,
        None,
    ),
    "convit": (
        lambda: models.ConVit(img_size=64, embed_dim=12, depth=2, num_heads=4, local_up_to_layer=1, num_classes=5),
        64,
        None,
    ),
    "sam": (
        lambda: models.VisionTransformerSAM(
            **SMALL, patch_size=8, use_rel_pos=True, window_size=3, global_attn_indexes=(1,)
        ),
        64,
        None,
    ),
    "hiera": (lambda: hiera(), 64, None),
    "sam 2": (
        lambda: sized(
            64,
            lambda: models.hieradet_sam2.HieraDet(
                embed_dim=16, stages=(1, 2, 1, 1), window_spec=(8, 4, 4, 2), global_att_blocks=(2,), num_classes=5
            ),
        ),
        64,
        RECT,
    ),
    "one projection": (
        lambda: models.VisionTransformer(
            **SMALL, block_fn=vision_transformer.ParallelScalingBlock, qk_norm=True, qkv_bias=False, num_classes=5
        ),
        64,
        RECT,
    ),
    "botnet": (lambda: byob("self_attn", self_attn_layer="bottleneck", self_attn_kwargs={"num_heads": 2}), 64, None),
    "cascade": (
        lambda: models.EfficientVitMsra(
            img_size=96, embed_dim=(32, 48), depth=(1, 1), num_heads=(2, 3), window_size=(3, 3), num_classes=5
        ),
        96,
        (160, 192),
    ),
    "pvt": (
        lambda: sized(64, lambda: models.PyramidVisionTransformerV2(**FOUR, num_heads=(1, 2, 2, 2), num_classes=5)),
        64,
        RECT,
    ),
    "pvt, pooled": (
        lambda: sized(
            64, lambda: models.PyramidVisionTransformerV2(**FOUR, num_heads=(1, 2, 2, 2), linear=True, num_classes=5)
        ),
        64,
        RECT,
    ),
    "twins": (
        lambda: sized(
            64,
            lambda: models.Twins(
                img_size=64,
                embed_dims=(16, 24),
                num_heads=(1, 2),
                depths=(2, 1),
                sr_ratios=(4, 2),
                wss=(3, 3),
                mlp_ratios=(2, 2),
                num_classes=5,
            ),
        ),
        64,
        RECT,
    ),
    "shvit": (
        lambda: sized(
            128,
            lambda: models.SHViT(
                embed_dim=(32, 48, 64),
                partial_dim=(8, 16, 16),
                qk_dim=(4, 8, 8),
                depth=(1, 1, 1),
                types=("i", "s", "s"),
                num_classes=5,
            ),
        ),
        128,
        (192, 128),
    ),
    "cpubone": (
        lambda: timm.create_model("cpubone_nano", num_classes=5, pretrained_cfg_overlay={"input_size": (3, 64, 64)}),
        64,
        (96, 128),
    ),
    "mobilevit": (
        lambda: sized(
            64,
            lambda: byob(
                "mobilevit",
                stride=1,
                block_kwargs={"transformer_dim": 24, "transformer_depth": 1, "patch_size": 4, "num_heads": 2},
            ),
        ),
        64,
        None,
    ),
}
FEWER_QUERIES = {"hiera", "sam 2"}


def levit(**args):
    return models.Levit(
        img_size=64, embed_dim=(32, 48), key_dim=8, depth=(1, 1), num_heads=(2, 3), num_classes=5, **args
    )


def hiera():
    return models.Hiera(img_size=(64, 64), embed_dim=16, stages=(1, 2, 1, 1), num_classes=5)


def made(name):
    make, size, _ = HOSTS[name]
    model = make().eval()
    unsettle(model)
    return model, torch.randn(2, 3, size, size)


@pytest.mark.parametrize("name", HOSTS)
def test_function_size_and_state(name):
    """Self-attention changes nothing, at any size; static keys train, load, and follow the size too."""
    make, size, other_size = HOSTS[name]
    model = make().eval()
    unsettle(model)
    images = torch.randn(2, 3, size, size)
    keeps_function(model, images)
    static = trains_static_keys(model, images)
    fresh = make()
    convert(fresh, "ska")
    fresh.load_state_dict(static.state_dict())
    assert torch.equal(fresh.eval()(images), static.eval()(images))
    grids = [mixer.feat_size for mixer in token_mixers(static).values()]
    assert hasattr(static, "set_input_size") == (other_size is not None)
    if other_size is not None:
        follows_size(model, static, other_size)
        kept = name in ("tinyvit", "davit", "cascade")  # windows of one size
        assert ([mixer.feat_size for mixer in token_mixers(static).values()] == grids) == kept


@pytest.mark.parametrize("name", sorted(set(HOSTS) - FEWER_QUERIES))
def test_convolved_keys_train(name):
    model, images = made(name)
    convert(model, "fcska")
    out = model.train()(images)
    out.square().mean().backward()
    assert all(p.grad.isfinite().all() for key, p in model.named_parameters() if "query_conv" in key)
    assert out.isfinite().all()


def test_batch_norms_behind_projections_train_as_in_the_host():
    torch.manual_seed(0)
    host = levit()
    model = copy.deepcopy(host)
    convert(model, "mhsa")
    images = torch.randn(4, 3, 64, 64)
    for net in (host, model):
        net.train()(images)
    norm, own = host.stages[0].blocks[0].attn.proj.ln.bn, model.stages[0].blocks[0].attn.mixer.proj.norm
    assert_close("running mean", own.running_mean, norm.running_mean)
    assert_close("logits", model.eval()(images), host.eval()(images))


def test_hiera_hands_its_mixers_tokens_row_by_row():
    model, images = made("hiera")
    seen = {}
    convert(model, "mhsa")
    for index, block in enumerate(model.blocks):
        block.attn.mixer.register_forward_pre_hook(lambda _, args, index=index: seen.update({index: args[0]}))
    inputs = {}
    for index, block in enumerate(model.blocks):
        block.norm1.register_forward_hook(lambda *args, index=index: inputs.update({index: args[2]}))
    model(images)
    reroll = model.reroll
    for index, block in enumerate(model.blocks):
        assert isinstance(block.attn, UnrolledMixer)
        before = index - 1 if block.attn.q_stride > 1 else index  # pooled within the block: its tokens are the last's
        rows = reroll(inputs[index], max(before, 0))
        if block.attn.num_windows == 1:
            assert torch.equal(seen[index], rows.flatten(1, 2))
        else:
            height, width = block.attn.mixer.feat_size
            windows = rows.unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3)
            assert torch.equal(seen[index], windows.flatten(0, 2).flatten(1, 2))


def test_the_heads_of_a_cascade_are_places_of_their_own():
    model, images = made("cascade")
    before = model(images)
    names = [m.name for m in convert(model, "mhsa", layers=[0, -1]).modules]
    assert [name.rpartition(".attn.")[2] for name in names] == ["qkvs.0", "qkvs.2"]
    assert_close("some heads", model(images), before)
    convert(model, "mhsa")
    assert_close("all heads", model(images), before)
    assert not any("attention_biases" in name and "rel_pos" not in name for name, _ in model.named_parameters())


def test_keys_of_fewer_tokens_have_the_grid_the_host_makes():
    model, images = made("pvt")
    convert(model, "ska")
    attn = model.stages[0].blocks[0].attn
    assert attn.feat_size == (16, 16)
    assert attn.static_key.shape == (1, 4, 16)
    assert attn.attention_weights(torch.randn(2, 256, 16)).shape == (2, 1, 256, 4)
    with pytest.raises(StaticKeyError, match=r"key_size: the host reduces keys to \(2, 2\) by itself"):
        model.set_key_size((4, 4))
    assert model.set_key("continuous")
    assert model(images).isfinite().all()


def test_what_has_no_place_for_another_width():
    model, _ = made("levit")
    with pytest.raises(UnsupportedHostError, match=r"heads of 8 with values of 16 .* for which mixer 'constant'"):
        convert(model, "constant")
    model, _ = made("pvt")
    with pytest.raises(UnsupportedHostError, match="takes keys from fewer tokens, for which mixer 'pool'"):
        convert(model, "pool")
    model, _ = made("hiera")
    with pytest.raises(UnsupportedHostError, match="one query of 4 tokens, for which mixer 'cska' has no place"):
        convert(model, "cska")


REFUSED = {
    "xcit_nano_12_p16_224": "XCA weighs channels by channels",
    "edgenext_xx_small": "CrossCovarianceAttn weighs channels by channels",
    "coat_lite_tiny": "FactorAttnConvRelPosEnc multiplies keys by values before queries",
    "efficientvit_b0": "LiteMLA multiplies keys by values before queries",
    "swiftformer_xs": "EfficientAdditiveAttention sums its queries up",
    "mobilevitv2_050": "LinearSelfAttention sums its keys up",
    "mobilenetv4_hybrid_medium": "MultiQueryAttention2d shares one key and value among all heads",
    "lambda_resnet26t": "LambdaLayer makes a linear function",
    "vit_dwee_patch16_reg1_gap_256": "DiffAttention weighs a value by the difference of two maps",
    "resnet26t": "ResNet is not a host .*attention classes in it: none",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(UnsupportedHostError, match=REFUSED[name]):
        convert(model, "ska")


@pytest.mark.parametrize("host", ["levit", "coatnet", "pit", "volo", "tinyvit", "relpos", "one projection"])
def test_heads_that_stay_dynamic_keep_the_function(host):
    """With every head of a layer dynamic, whatever norms and widths its projections have, nothing changes."""
    make, size, _ = HOSTS[host]
    model = make().eval()
    unsettle(model)
    model.eval()
    x = torch.randn(2, 3, size, size)
    before = model(x)
    for name, site in find_host(model).sites.items():
        if site.is_attention:
            heads = list(range(site.num_heads))
            convert(model, "partly_static", layers=[name], mixer_args={"dynamic_heads": heads})
    model.eval()
    assert any(isinstance(mixer, PartlyStaticAttention) for mixer in token_mixers(model).values())
    assert_close("output", model(x), before)


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("sam", "a position bias that queries make"),
        ("hiera", "one query of 4 tokens"),
        ("pvt", "fewer keys than tokens"),
    ],
)
def test_maps_of_pairs_are_refused_where_there_are_none(host, reason):
    make, size, _ = HOSTS[host]
    model = make().eval()
    with pytest.raises(UnsupportedHostError, match=f"has {reason}, which dynamic_heads and bias='map' have no place"):
        convert(model, "partly_static", mixer_args={"bias": "map"})
    with pytest.raises(UnsupportedHostError, match="convert it without calibration, or name other layers"):
        convert(model, "ska", calibration=torch.randn(8, 3, size, size))
    assert not token_mixers(model)


@pytest.mark.parametrize("host", ["levit", "pit", "gcvit", "crossvit"])
def test_keys_are_fitted_in_other_families_too(host):
    make, size, _ = HOSTS[host]
    model = make().eval()
    unsettle(model)
    model.eval()
    x = torch.randn(1, 3, size, size) + 0.7 * torch.randn(12, 3, size, size)
    before = outputs(model, x[3::4])
    report = convert(model, "ska", calibration=Calibration(x, fraction=0.5, bias="map", criterion="kl"))
    moved = change(before, outputs(model, x[3::4]))
    assert min(stage.change for stage in report.stages[1:]) == pytest.approx(moved, abs=1e-6)


def test_a_key_size_where_a_host_mixes_in_a_map_of_positions():
    model, images = made("convit")
    convert(model, "ska", mixer_args={"key_size": (2, 2)})
    assert model(images).isfinite().all()
