import copy
import json
import pickle

import pytest
import torch
from torch import nn

from statickey import Calibration, convert
from statickey.convert import token_mixers
from statickey.convert.calibration import calibrate as calibrate_module
from statickey.errors import StaticKeyError, UnsupportedHostError
from tolerances import assert_close

transformers = pytest.importorskip("transformers")
from statickey.convert.hugging_face import from_pretrained  # noqa: E402

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 2}
TEXT = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "vocab_size": 50,
}


def classifier(name, **kwargs):
    config = getattr(transformers, f"{name}Config")(**SIZES | kwargs, num_labels=5)
    return getattr(transformers, f"{name}ForImageClassification")(config)


def tower(name, kind="Model", **kwargs):
    config = getattr(transformers, f"{name}Config")(**SIZES | kwargs)
    return getattr(transformers, f"{name.removesuffix('Vision')}{kind}")(config)


HOSTS = {
    "vit": lambda: classifier("ViT"),
    "vit alone, without bias": lambda: tower("ViT", qkv_bias=False),
    "deit": lambda: classifier("DeiT"),
    "dinov2": lambda: classifier("Dinov2"),
    "dinov2 backbone": lambda: tower("Dinov2", "Backbone", out_features=["stage1", "stage2"]),
    "dinov2 with registers": lambda: classifier("Dinov2WithRegisters", num_register_tokens=3),
    "dinov3": lambda: tower("DINOv3ViT", num_register_tokens=2),
    "ijepa": lambda: classifier("IJepa"),
    "siglip": lambda: tower("SiglipVision", "VisionModel"),
    "clip": lambda: tower("CLIPVision", "VisionModel"),
    "beit": lambda: classifier("Beit", use_relative_position_bias=True),
    "beit, shared bias": lambda: classifier("Beit", use_shared_relative_position_bias=True),
    "segformer": lambda: transformers.SegformerForSemanticSegmentation(
        transformers.SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            hidden_sizes=[16, 24],
            num_attention_heads=[2, 3],
            sr_ratios=[2, 1],
            patch_sizes=[7, 3],
            strides=[4, 2],
            mlp_ratios=[2, 2],
            image_size=32,
            decoder_hidden_size=8,
            num_labels=5,
        )
    ),
    "rf-detr": lambda: tower("RfDetrDinov2", "Backbone", out_features=["stage2"], num_windows=2),
    "lw-detr": lambda: tower(
        "LwDetrViT", "Backbone", out_features=["stage2"], num_windows=4, window_block_indices=[0]
    ),
    "swin": lambda: transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN, num_labels=5)),
}
FIXED = {"beit", "beit, shared bias", "swin"}
"""Whose windows, or position bias, are not the subject of the test of grids."""

POSITIONS_ON_REQUEST = ("vit", "vit alone", "deit", "ijepa", "siglip", "clip")


def randomised(model):
    """A model with no parameter at a value that hides a mistake."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 or any(part in name for part in ("bias_table", "token", "position")):
            nn.init.normal_(parameter, mean=0.3, std=0.3)
    return model.double().eval()


def build(name):
    torch.manual_seed(0)
    return randomised(HOSTS[name]())


def images(height=32, width=32):
    return torch.randn(2, 3, height, width, dtype=torch.float64)


def output(result):
    found = [result.get(key) for key in ("logits", "pooler_output", "last_hidden_state")]
    found = [tensor for tensor in found if tensor is not None] or list(result.feature_maps)
    return torch.cat([tensor.flatten(1) for tensor in found], dim=1)


def num_states(name):
    """Recorded hidden states: of SegFormer not the input of its first stage."""
    return 2 if name == "segformer" else 3


def without_gradient(model, x):
    output(model.train()(x)).square().mean().backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}


@pytest.mark.parametrize("name", HOSTS)
class TestEveryHost:
    def test_self_attention_keeps_the_function(self, name):
        model, x = build(name), images()
        before = model(x, output_hidden_states=True)
        model.set_attn_implementation("eager")
        maps = model(x, output_attentions=True).attentions
        report = convert(model, "mhsa")
        after = model(x, output_hidden_states=True, output_attentions=True)
        assert_close("output", output(after), output(before))
        assert len(after.hidden_states) == len(before.hidden_states) == num_states(name)
        for ours, theirs in zip(after.hidden_states, before.hidden_states, strict=True):
            assert_close("hidden state", ours, theirs)
        assert len(after.attentions) == len(maps) == 2
        for ours, theirs in zip(after.attentions, maps, strict=True):
            assert_close("map", ours.float(), theirs.float())  # the host's softmax is in float32
        assert report.macs_before == report.macs_after > 0
        assert not any(module.training for module in model.modules())

    @pytest.mark.parametrize("mixer", ["ska", "cska"])
    def test_trains_saves_and_loads(self, name, mixer, tmp_path):
        model, x = build(name), images()
        theirs = without_gradient(copy.deepcopy(model), x)
        convert(model, mixer)
        assert without_gradient(model, x) == theirs
        assert any(name.endswith("_key") for name in model.no_weight_decay())
        model.eval()
        recorded = model(x, output_hidden_states=True, output_attentions=True)
        assert (len(recorded.hidden_states), len(recorded.attentions)) == (num_states(name), 2)
        model.save_pretrained(tmp_path)
        assert not list(tmp_path.glob("*.bin"))
        again = from_pretrained(tmp_path, dtype=torch.float64)
        assert (type(again), again.training) == (type(model), False)
        assert_close("loaded", output(again(x)), output(model(x)))
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            getattr(transformers, type(model).__name__).from_pretrained(tmp_path)


@pytest.mark.parametrize("name", sorted(HOSTS.keys() - FIXED))
def test_grids_with_as_many_tokens(name):
    model = build(name)
    convert(model, "cska")
    told = {"interpolate_pos_encoding": True} if name.split(",")[0] in POSITIONS_ON_REQUEST else {}
    for height, width in ((32, 48), (48, 32), (32, 32), (48, 48)):
        x = images(height, width)
        built = copy.deepcopy(model)
        for mixer in token_mixers(built).values():
            rows, columns = mixer.feat_size
            mixer.set_input_size((rows * height // 32, columns * width // 32))
        assert_close("output", output(model(x, **told)), output(built(x, **told)))


KIN = {
    "ViTMSN": "Model",
    "AltCLIPVision": "VisionModel",
    "ChineseCLIPVision": "VisionModel",
    "CLIPSegVision": "VisionModel",
    "MetaClip2Vision": "VisionModel",
    "OwlViTVision": "VisionModel",
    "Owlv2Vision": "VisionModel",
    "Aimv2Vision": "VisionModel",
    "Tipsv2Vision": "VisionModel",
    "Pixio": "Model",
}


@pytest.mark.parametrize("name", KIN)
def test_kin_of_these(name):
    torch.manual_seed(0)
    model, x = randomised(tower(name, KIN[name])), images()
    before = model(x).last_hidden_state
    convert(model, "mhsa")
    assert_close("tokens", model(x).last_hidden_state, before)
    convert(model, "ska")
    recorded = model(x, output_hidden_states=True, output_attentions=True)
    assert (len(recorded.hidden_states), len(recorded.attentions)) == (3, 2)


def test_position_bias_of_another_grid():
    model = build("beit")
    convert(model, "ska")
    wide, tall = images(32, 48), images(48, 32)
    outs = [output(model(x)) for x in (wide, tall)]
    for x, grid, out in ((wide, (4, 6), outs[0]), (tall, (6, 4), outs[1])):
        built = copy.deepcopy(model)
        for mixer in token_mixers(built).values():
            mixer.set_input_size(grid)
        assert_close("output", output(built(x)), out)


def test_recomputed_blocks_see_the_grid_of_their_own_input():
    model = build("dinov2")
    convert(model, "ska")
    wide, tall = images(32, 48), images(48, 32)
    gradients = []
    for checkpointing in (False, True):
        twin = copy.deepcopy(model).train()
        if checkpointing:
            twin.activation_checkpointing_enable()
        loss = output(twin(wide)).square().sum()
        twin(tall)  # another grid of as many tokens, before the backward pass
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None]))
    assert_close("gradients", gradients[1], gradients[0])


def test_a_conversion_that_fails_is_not_in_the_config(monkeypatch):
    model = build("vit")
    kind, real = type(model), calibrate_module.swap

    def interrupted(target, *args, **kwargs):
        real(target, *args, **kwargs)
        if target is model:
            raise KeyboardInterrupt

    monkeypatch.setattr(calibrate_module, "swap", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(model, "ska", calibration=Calibration(images().repeat(8, 1, 1, 1), criterion="kl"))
    assert type(model) is kind
    assert not getattr(model.config, "statickey", None)


def test_masked_tokens():
    model, x = build("vit alone, without bias"), images()
    mask = torch.rand(2, 17) > 0.3
    before = model(x, attention_mask=mask)
    convert(model, "mhsa")
    assert_close("output", output(model(x, attention_mask=mask)), output(before))
    assert not torch.allclose(output(model(x)), output(before))
    attention, tokens = model.layers[0].attention, torch.randn(2, 17, 24, dtype=torch.float64)
    outs = [attention(tokens, form, feat_size=(4, 4))[0] for form in (mask, mask.int(), mask[:, None, None])]
    assert_close("two axes", outs[0], outs[2])
    assert_close("numbers", outs[1], outs[2])


def vision_language(name, **kwargs):
    vision = getattr(transformers, f"{name}VisionConfig")(**SIZES | kwargs)
    text = getattr(transformers, f"{name}TextConfig")(**TEXT | {"max_position_embeddings": 8})
    config = getattr(transformers, f"{name}Config")(text_config=text.to_dict(), vision_config=vision.to_dict())
    return randomised(getattr(transformers, f"{name}Model")(config))


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_the_vision_tower_of_a_vision_language_model(name, tmp_path):
    model = vision_language(name)
    told = {"input_ids": torch.randint(50, (2, 8)), "pixel_values": images()}
    before = model(**told).logits_per_image
    report = convert(model, "mhsa")
    assert all(module.name.startswith("vision_model.") for module in report.modules)
    assert_close("logits", model(**told).logits_per_image, before)
    convert(model, "ska")
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, getattr(transformers, f"{name}Model"), dtype=torch.float64)
    assert_close("loaded", again(**told).logits_per_image, model(**told).logits_per_image)


def test_a_vision_language_model_is_calibrated_by_its_tower():
    model = vision_language("CLIP")
    pixels = torch.randn(16, *images().shape[1:])
    with pytest.raises(
        StaticKeyError, match=r"CLIPModel does not run on these images \(.*\); .* in it, model.vision_mod"
    ):
        convert(model, "ska", calibration=Calibration(pixels, fit="mean"))
    assert not token_mixers(model)
    report = convert(model.vision_model, "ska", calibration=Calibration(pixels, fit="mean"))
    assert len(report.modules) == len(token_mixers(model)) > 0
    told = {"input_ids": torch.randint(50, (2, 8)), "pixel_values": images()}
    assert model(**told).logits_per_image.isfinite().all()


def siglip2():
    torch.manual_seed(0)
    sizes = {key: value for key, value in SIZES.items() if key != "image_size"}
    return randomised(transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**sizes, num_patches=16)))


def patches(*grids, length):
    shapes = torch.tensor(grids)
    mask = torch.arange(length) < shapes.prod(1, keepdim=True)
    pixels = torch.randn(len(grids), length, 3 * 64, dtype=torch.float64)
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}


@pytest.mark.parametrize("grids", [((4, 4), (4, 4)), ((3, 5), (5, 3)), ((2, 4), (4, 2), (5, 3))], ids=str)
def test_a_grid_for_each_image(grids, tmp_path):
    model, told = siglip2(), patches(*grids, length=16)
    before = model(**told)
    report = convert(model, "mhsa")
    assert report.modules[0].feat_size == (4, 4)
    after = model(**told, output_attentions=True)
    real = told["pixel_attention_mask"]
    assert_close("tokens", after.last_hidden_state[real], before.last_hidden_state[real])
    assert_close("pooled", after.pooler_output, before.pooler_output)
    assert after.attentions[0].shape == (len(grids), 3, 16, 16)
    convert(model, "ska")
    together = model(**told).pooler_output
    for index, (height, width) in enumerate(grids):
        count = height * width
        one = {name: value[index : index + 1] for name, value in told.items()}
        alone = model(
            one["pixel_values"][:, :count], one["pixel_attention_mask"][:, :count], one["spatial_shapes"]
        ).pooler_output
        assert_close("alone", together[index : index + 1], alone)
    model.save_pretrained(tmp_path)
    assert_close("loaded", from_pretrained(tmp_path, dtype=torch.float64)(**told).pooler_output, together)


def depth_estimator():
    backbone = transformers.Dinov2Config(
        **SIZES | {"num_hidden_layers": 4},
        out_features=[f"stage{i}" for i in range(1, 5)],
        reshape_hidden_states=False,
    )
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=8,
        reassemble_hidden_size=24,
        neck_hidden_sizes=[8] * 4,
        fusion_hidden_size=8,
        head_hidden_size=4,
    )
    return transformers.DepthAnythingForDepthEstimation(config)


def segmenter():
    backbone = transformers.SwinConfig(
        **SWIN | {"depths": [1] * 4, "num_heads": [2] * 4}, out_features=[f"stage{i}" for i in range(1, 5)]
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=8, num_labels=3, auxiliary_in_channels=64, auxiliary_channels=8
    )
    return transformers.UperNetForSemanticSegmentation(config)


def detector():
    backbone = transformers.RfDetrDinov2Config(
        **SIZES | {"num_hidden_layers": 4}, num_windows=2, out_features=["stage2", "stage4"]
    )
    config = transformers.RfDetrConfig(
        backbone_config=backbone,
        d_model=16,
        decoder_layers=1,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=2,
        decoder_ffn_dim=16,
        num_queries=5,
        group_detr=1,
    )
    return transformers.RfDetrForObjectDetection(config)


@pytest.mark.parametrize("build_whole", [depth_estimator, segmenter, detector])
def test_what_wraps_a_tower(build_whole, tmp_path):
    torch.manual_seed(0)
    model, x = randomised(build_whole()), images(64, 64)
    before = model(x)[0]
    convert(model, "mhsa")
    assert_close("output", model(x)[0], before)
    convert(model, "ska")
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, dtype=torch.float64)
    assert_close("loaded", again(x)[0], model(x)[0])


def test_each_layer_its_own_mixer(tmp_path):
    model, x = build("vit"), images()
    convert(model, "cska", layers=[0], mixer_args={"kernel_size": 5})
    convert(model, "ska", layers=[1], mixer_args={"key": "continuous", "key_size": (2, 2)})
    model.set_off_grid("pool")
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["statickey"]
    assert [saved[f"vit.layers.{i}.attention"]["mixer"] for i in range(2)] == ["cska", "ska"]
    again = from_pretrained(tmp_path, dtype=torch.float64)
    assert [str(m) for m in token_mixers(again).values()] == [str(m) for m in token_mixers(model).values()]
    for size in (32, 48):
        x = images(size, size)
        outs = [output(m(x, interpolate_pos_encoding=True)) for m in (again, model)]
        assert_close("loaded", *outs)
    plain = build("vit")
    convert(plain, "ska", layers=[-1])
    plain.save_pretrained(tmp_path)
    assert len(token_mixers(from_pretrained(tmp_path))) == 1


def test_a_part_that_was_converted_and_a_whole_that_was_saved(tmp_path):
    model, x = build("vit"), images()
    convert(model.vit, "ska")
    model.save_pretrained(tmp_path / "whole")
    again = from_pretrained(tmp_path / "whole", dtype=torch.float64)
    assert_close("whole", output(again(x)), output(model(x)))
    again.save_pretrained(tmp_path / "again")
    part = from_pretrained(tmp_path / "again", transformers.ViTModel, dtype=torch.float64, add_pooling_layer=False)
    assert_close("part", output(part(x)), output(model.vit(x)))


def test_a_key_on_another_grid_is_saved_with_its_grid(tmp_path):
    model, x = build("dinov2"), images(48, 48)
    convert(model, "ska")
    for mixer in token_mixers(model).values():
        mixer.set_input_size((6, 6))
    model.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path, dtype=torch.float64)
    assert {mixer.feat_size for mixer in token_mixers(again).values()} == {(6, 6)}
    assert_close("loaded", output(again(x)), output(model(x)))


def test_copies_and_other_types():
    model, x = build("vit"), images()
    convert(model, "ska")
    out = output(model(x))
    assert torch.equal(output(pickle.loads(pickle.dumps(model))(x)), out)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    twin.load_state_dict(model.state_dict())
    assert output(twin.to(torch.bfloat16)(x.bfloat16())).dtype == torch.bfloat16


def test_layers_may_stay_as_they_are():
    model, x = build("vit"), images()
    convert(model, "ska", layers=[0])
    recorded = model(x, output_attentions=True)
    assert recorded.attentions[0].shape == (2, 3, 17, 17)
    assert type(model.vit.layers[1].attention).__name__ == "ViTAttention"
    model.set_attn_implementation("eager")
    assert len(model(x, output_attentions=True).attentions) == 2


def test_maps_follow_the_config_too():
    model = build("vit")
    convert(model, "ska")
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    maps = model(images()).attentions
    assert len(maps) == 2
    assert_close("rows", maps[0].sum(-1), torch.ones(2, 3, 17, dtype=torch.float64))


@pytest.mark.parametrize("name", ["dinov3", pytest.param("dinov2", marks=pytest.mark.slow)])
def test_exports_with_free_height_and_width(name):
    model, x = build(name), images(32, 40)
    convert(model, "ska")
    height, width = (8 * torch.export.Dim(side, min=3, max=8) for side in ("height", "width"))
    exported = torch.export.export(
        model, (), {"pixel_values": x}, dynamic_shapes={"pixel_values": {2: height, 3: width}}
    )
    for size in ((40, 32), (32, 48)):
        x = images(*size)
        assert_close("exported", output(exported.module()(pixel_values=x)), output(model(x)))


def test_trains_on_several_processes_without_unused_parameters(tmp_path):
    model = build("vit")
    convert(model, "ska")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model.train())
        for _ in range(2):  # the second step finds what the first left without gradient
            wrapped(pixel_values=images(), labels=torch.tensor([0, 1])).loss.backward()
    finally:
        torch.distributed.destroy_process_group()


def test_fresh_weights_are_drawn_as_the_host_draws_them():
    model, twin = build("vit"), build("vit")
    convert(model, "ska", keep_weights=False)
    convert(twin, "ska", keep_weights=False)
    own, other = (token_mixers(m)["vit.layers.0.attention.mixer"] for m in (model, twin))
    assert torch.equal(own.qv.weight, other.qv.weight)
    assert 0.01 < own.qv.weight.std() < 0.03  # initializer_range
    assert not own.qv.bias.any()


def test_converts_again():
    model, x = build("dinov2"), images()
    convert(model, "ska")
    out = output(model(x))
    report = convert(model, "ska")
    assert all(module.key_carried for module in report.modules)
    assert_close("output", output(model(x)), out)
    convert(model, "cska")
    assert {type(m).__name__ for m in token_mixers(model).values()} == {"ConvStaticKeyAttention"}
    assert [entry["mixer"] for entry in model.config.statickey.values()] == ["cska", "cska"]


class TestRefuses:
    def test_models_without_a_vision_tower(self):
        model = transformers.BertModel(transformers.BertConfig(**TEXT))
        with pytest.raises(UnsupportedHostError, match=r"BertModel has no vision tower.*BertSelfAttention.*ViTModel"):
            convert(model, "ska")

    def test_a_mixer_that_has_no_place_for_a_position_bias(self):
        model = build("beit")
        with pytest.raises(UnsupportedHostError, match="a position bias, for which mixer 'constant'"):
            convert(model, "constant")
        assert not token_mixers(model)

    def test_a_mixer_that_does_not_turn(self):
        with pytest.raises(UnsupportedHostError, match="a rotary position embedding, for which mixer 'synthesizer'"):
            convert(build("dinov3"), "synthesizer")

    def test_tokens_without_a_grid(self):
        model = build("vit")
        convert(model, "ska")
        with pytest.raises(StaticKeyError, match="without the grid of its tokens"):
            model.vit.layers[0](torch.zeros(1, 17, 24, dtype=torch.float64))

    def test_files_of_another_model(self, tmp_path):
        build("vit").save_pretrained(tmp_path)
        with pytest.raises(StaticKeyError, match="holds no converted model"):
            from_pretrained(tmp_path)
        with pytest.raises(StaticKeyError, match="'ViT' is no model class of transformers; pass one as model_class"):
            from_pretrained(tmp_path, "ViT")
        config = transformers.ViTConfig.from_pretrained(tmp_path)
        config.architectures = ["OwnViT"]
        with pytest.raises(StaticKeyError, match="'OwnViT' is no model class"):
            from_pretrained(tmp_path, config=config)

    def test_files_that_lack_a_key(self, tmp_path):
        model = build("vit")
        convert(model, "ska")
        state = model.state_dict()
        del state["vit.layers.1.attention.mixer.static_key"]
        model.save_pretrained(tmp_path, state_dict=state)
        with pytest.raises(StaticKeyError, match=r"lacks vit.layers.1.attention.mixer.static_key"):
            from_pretrained(tmp_path)

    def test_a_config_that_names_other_layers(self, tmp_path):
        model = build("vit")
        convert(model, "ska")
        model.save_pretrained(tmp_path)
        config = transformers.ViTConfig.from_pretrained(tmp_path)
        config.statickey = {"vit.layers.7.attention": config.statickey["vit.layers.1.attention"]}
        with pytest.raises(StaticKeyError, match=r"names vit\.layers\.7\.attention, which ViTForImageClassification"):
            from_pretrained(tmp_path, config=config)
