"""Encoders of DETR, RT-DETR and kin: positions for queries and keys alone, padded images, grids of maps."""

import copy

import pytest
import torch

from statickey import Calibration, convert
from statickey.convert import token_mixers
from statickey.errors import StaticKeyError, UnsupportedHostError
from tolerances import assert_close

transformers = pytest.importorskip("transformers")
from hugging_face_models import images, randomised  # noqa: E402
from statickey.convert.hugging_face import from_pretrained  # noqa: E402
from statickey.viz import capture_attention  # noqa: E402

WIDTH = {"d_model": 64, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 5, "num_labels": 3}
BODY = {"embedding_size": 4, "hidden_sizes": [4, 4, 8, 8], "depths": [1] * 4, "layer_type": "basic"}
STAGES = ["stage1", "stage2", "stage3", "stage4"]
RT_DETRS = ("RTDetr", "RTDetrV2", "DFine", "Deimv2", "PPDocLayoutV2", "PPDocLayoutV3", "PPDocLayoutV4")


def detr(name, kind="ForObjectDetection", **kwargs):
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8, "encoder_layers": 2, "decoder_layers": 1}
    config = getattr(transformers, f"{name}Config")(
        backbone_config=transformers.ResNetConfig(**BODY, out_features=STAGES), **WIDTH | heads | kwargs
    )
    return getattr(transformers, f"{name}{kind}")(config)


def rt_detr(name, kind="ForObjectDetection", **kwargs):
    stages, own = STAGES[1:], {}
    if name == "PPDocLayoutV2":
        own = {"class_thresholds": [0.1] * 3, "class_order": [0, 1, 2]}
    elif name == "PPDocLayoutV3":
        stages, own = STAGES, {"x4_feat_dim": 4}
    config = getattr(transformers, f"{name}Config")(
        backbone_config=transformers.RTDetrResNetConfig(**BODY, out_features=stages),
        encoder_hidden_dim=64,
        encoder_in_channels=[4, 8, 8],
        decoder_in_channels=[64] * 3,
        decoder_layers=2,
        **WIDTH | own | kwargs,
    )
    return getattr(transformers, f"{name}{kind}")(config)


HOSTS = {
    "detr": lambda: detr("Detr"),
    "detr, learned positions": lambda: detr("Detr", position_embedding_type="learned"),
    "detr that segments": lambda: detr("Detr", "ForSegmentation"),
    "conditional detr": lambda: detr("ConditionalDetr"),
    "table detr": lambda: detr("TableTransformer"),
    "dab detr": lambda: detr("DabDetr"),
    **{name: lambda name=name: rt_detr(name) for name in RT_DETRS},
}
PADDED = [name for name in HOSTS if "detr" in name]
"""Which take a mask of padding."""


def build(name):
    torch.manual_seed(0)
    return wide_awake(HOSTS[name]())


def wide_awake(model):
    """A model whose encoder attends to some tokens more than to others."""
    for name, parameter in randomised(model).named_parameters():
        if ".self_attn." in name and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.float() if type(model).__name__.startswith("DabDetr") else model  # whose decoder knows no float64


def told(name, height=64, width=96):
    """Images, of which one is padded where the host can be told."""
    x = images(height, width).float() if name == "dab detr" else images(height, width)
    if name not in PADDED:
        return {"pixel_values": x}
    mask = torch.ones(2, height, width, dtype=torch.long)
    mask[0, height // 2 :], mask[1, :, width // 2 :] = 0, 0
    return {"pixel_values": x, "pixel_mask": mask}


def output(result):
    encoded = result.encoder_last_hidden_state
    found = [result.logits, result.pred_boxes, *(encoded if isinstance(encoded, list) else [encoded])]
    return torch.cat([tensor.flatten(1) for tensor in found if tensor is not None], dim=1)


def most_slow(*quick):
    """All hosts, of which the quick suite runs some."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in HOSTS]


class TestEveryHost:
    @pytest.mark.parametrize("name", most_slow(*[name for name in HOSTS if "DocLayout" not in name]))
    def test_self_attention_keeps_the_function(self, name):
        model, x = build(name), told(name)
        before = model(**x, output_hidden_states=True)
        model.set_attn_implementation("eager")
        maps = model(**x, output_attentions=True).encoder_attentions
        report = convert(model, "mhsa")
        after = model(**x, output_hidden_states=True, output_attentions=True)
        assert_close("output", output(after), output(before))
        assert len(after.encoder_hidden_states) == len(before.encoder_hidden_states) > 0
        for ours, theirs in zip(after.encoder_hidden_states, before.encoder_hidden_states, strict=True):
            assert_close("hidden state", ours, theirs)
        assert len(after.encoder_attentions) == len(maps) == len(report.modules)
        for ours, theirs in zip(after.encoder_attentions, maps, strict=True):
            assert_close("map", ours.float(), theirs.float())
        assert report.macs_before == report.macs_after > 0
        assert all(".encoder." in module.name for module in report.modules)

    @pytest.mark.parametrize("name", most_slow("detr", "dab detr", "RTDetrV2"))
    def test_static_keys_on_any_grid(self, name, tmp_path):
        model = build(name)
        convert(model, "ska")
        for height, width in ((64, 96), (96, 64)):
            x = told(name, height, width)
            built = copy.deepcopy(model)
            for mixer in token_mixers(built).values():
                mixer.set_input_size((height // 32, width // 32))
            assert_close("output", output(model(**x)), output(built(**x)))
        model.save_pretrained(tmp_path)
        again = from_pretrained(tmp_path, dtype=model.dtype)
        assert (type(again), again.training) == (type(model), False)
        assert_close("loaded", output(again(**x)), output(model(**x)))
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            getattr(transformers, type(model).__name__).from_pretrained(tmp_path)


@pytest.mark.parametrize(("name", "mixer"), [("detr", "cska"), ("RTDetrV2", "ska")])
def test_trains(name, mixer):
    model, x = build(name), told(name)
    ours = copy.deepcopy(model)
    convert(ours, mixer)
    theirs = unused(model, x)
    assert unused(ours, x) == theirs
    assert any(name.endswith("_key") for name in ours.no_weight_decay())


def unused(model, told):
    result = model.train()(**told)
    sum(value.square().sum() for value in result.values() if getattr(value, "requires_grad", False)).backward()
    return {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}


@pytest.mark.parametrize("name", [name for name in PADDED if "that" not in name and "," not in name])
def test_padding_is_not_attended_to(name):
    model, x = build(name), told(name)
    convert(model, "cska")
    maps = model(**x, output_attentions=True).encoder_attentions
    real = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 0]]).bool()
    for own in maps:
        by_key = own.transpose(1, 3)
        assert not by_key[~real].any()
        assert by_key[real].all()


@pytest.mark.parametrize("name", ["detr", "RTDetr"])
def test_positions_reach_queries_and_not_values(name):
    model, x = build(name), told(name)
    convert(model, "ska")
    encoder = model.model.encoder
    layer = encoder.layers[0] if name == "detr" else encoder.aifi[0].layers[0]
    seen = []
    layer.self_attn.mixer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    model(**x)
    ((tokens, grid), kwargs), mixer = seen[0], layer.self_attn.mixer
    assert grid == (2, 3)
    assert kwargs["pos_embed"].abs().max() > 0.5
    assert not torch.allclose(mixer(tokens, grid, **kwargs), mixer(tokens, grid, attn_mask=kwargs["attn_mask"]))


def test_recomputed_layers_see_the_grid_of_their_own_map():
    model = wide_awake(detr("Detr", dropout=0.0))
    convert(model, "ska")
    wide, tall = told("detr", 64, 96), told("detr", 96, 64)
    gradients = []
    for checkpointing in (False, True):
        twin = copy.deepcopy(model).train()
        if checkpointing:
            twin.activation_checkpointing_enable()
        loss = output(twin(**wide)).square().sum()
        twin(**tall)  # another grid of as many tokens, before the backward pass
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None]))
    assert_close("gradients", gradients[1], gradients[0])


def test_the_grid_is_that_of_the_map_of_this_call():
    torch.manual_seed(0)
    model = randomised(detr("Detr", "Model"))
    convert(model, "ska")
    x = told("detr", 64, 64)
    encoded = model(**x).encoder_last_hidden_state
    wide = told("detr", 32, 128)  # as many tokens; what the encoder would make is given
    model(**wide, encoder_outputs=transformers.modeling_outputs.BaseModelOutput(encoded))
    with pytest.raises(StaticKeyError, match="without the grid of its tokens"):
        model(inputs_embeds=encoded)
    with pytest.raises(StaticKeyError, match="without the grid of its tokens"):
        model.encoder(encoded)


@pytest.mark.parametrize(
    ("name", "kwargs", "grid"),
    [
        ("detr", {}, (32, 32)),
        ("detr", {"dilation": True, "image_size": (64, 90)}, (4, 6)),
        ("RTDetr", {}, (20, 20)),
        ("RTDetr", {"eval_size": 96}, (3, 3)),
        ("RTDetr", {"image_size": 64}, (2, 2)),
    ],
    ids=str,
)
def test_keys_have_the_grid_of_the_image_size_that_the_config_tells(name, kwargs, grid):
    model = build(name)
    for key, value in kwargs.items():
        setattr(model.config, key, value)
    convert(model, "ska")
    assert {mixer.feat_size for mixer in token_mixers(model).values()} == {grid}


def test_keys_are_fitted_on_images():
    model = wide_awake(rt_detr("RTDetr", encoder_attention_heads=2, image_size=64))
    report = convert(model, "ska", calibration=Calibration(torch.randn(8, 3, 64, 64), fraction=0.5, criterion="kl"))
    assert {head.static for head in report.heads} == {True, False}


def test_a_body_that_is_a_tower_converts_too():
    body = transformers.SwinConfig(
        embed_dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=2,
        image_size=32,
        patch_size=4,
        out_features=["stage2"],
    )
    torch.manual_seed(0)
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8, "encoder_layers": 1, "decoder_layers": 1}
    config = transformers.DetrConfig(backbone_config=body, **WIDTH | heads)
    model, x = randomised(transformers.DetrForObjectDetection(config)), {"pixel_values": images()}
    before = model(**x)
    assert len(convert(model, "mhsa").modules) == 3
    assert_close("output", output(model(**x)), output(before))


class TestRefuses:
    def test_a_mixer_whose_queries_are_its_values(self):
        model = build("detr")
        with pytest.raises(UnsupportedHostError, match="queries and keys alone, for which mixer 'constant'"):
            convert(model, "constant")
        assert not token_mixers(model)

    def test_attention_at_points(self):
        config = transformers.DeformableDetrConfig(
            backbone_config=transformers.ResNetConfig(**BODY, out_features=STAGES[1:]), **WIDTH
        )
        model = transformers.DeformableDetrForObjectDetection(config)
        with pytest.raises(UnsupportedHostError, match="samples values at a few points: there is no map of tokens"):
            convert(model, "ska")


def test_captured_maps_are_the_hosts_with_its_positions():
    model, x = build("detr").eval(), images(64, 96)
    maps = capture_attention(model, x)
    model.set_attn_implementation("eager")
    wanted = model(x, output_attentions=True).encoder_attentions
    assert len(maps) == len(wanted) == 2
    for found, map_ in zip(maps.values(), wanted, strict=True):
        assert_close("map", found, map_)
