"""The named models work unchanged in the libraries that take timm's backbones."""

import json
from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.feature_extraction import create_feature_extractor

import statickey
from statickey.errors import StaticKeyError

FORMERS = ["skaformer_nano", "cskaformer_nano", "fcskaformer_nano"]
TRANSFORMERS = ["ska_vit_tiny_patch16_224", "cska_vit_tiny_patch16_224", "fcska_vit_tiny_patch16_224"]
SMALL = [*(f"{prefix}lsa_vit_small_patch4_32" for prefix in ("", "ska_", "cska_", "fcska_")), "small_vit"]
VIT = {"depth": 3, "embed_dim": 32, "num_heads": 2, "dynamic_img_size": True}
FAMILIES = [*FORMERS, *SMALL, *TRANSFORMERS]


@pytest.mark.capability("smp: UPerNet, Unet, FPN, Segformer")
@pytest.mark.parametrize(
    ("name", "decoder"), [(n, d) for n in FORMERS for d in ("UPerNet", "Unet", "FPN", "Segformer")]
)
def test_segmentation_models_pytorch(name, decoder):
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = getattr(smp, decoder)(f"tu-{name}", encoder_weights=None, classes=4, in_channels=4)
    assert model(torch.randn(2, 4, 96, 128)).shape == (2, 4, 96, 128)
    model(torch.randn(2, 4, 64, 64)).mean().backward()


def test_segmentation_models_pytorch_by_the_names_of_the_paper():
    smp = pytest.importorskip("segmentation_models_pytorch")
    with torch.device("meta"):
        model = smp.UPerNet("tu-skaformer_s18", encoder_weights=None, classes=19)
    assert model.encoder.out_channels[-4:] == [64, 128, 320, 512]
    with pytest.raises(StaticKeyError, match=r"no weights are published for skaformer_s18.*encoder_weights=None"):
        smp.UPerNet("tu-skaformer_s18")


@pytest.mark.capability("Hugging Face backbone")
@pytest.mark.parametrize("name", FAMILIES)
def test_hugging_face_backbone(name):
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmBackboneConfig(backbone=name, out_indices=[1, 2])
    backbone = transformers.AutoBackbone.from_config(config)
    size = 32 if name in SMALL else 224
    sizes = (8, 8) if name in SMALL else (28, 14) if name in FORMERS else (14, 14)
    maps = backbone(torch.randn(1, 3, size, size)).feature_maps
    assert [m.shape[1:] for m in maps] == [(c, s, s) for c, s in zip(backbone.channels, sizes, strict=True)]


def static_keys(model):
    return [module for module in model.modules() if isinstance(module, statickey.StaticKeyAttention)]


@pytest.mark.parametrize("wrapper", ["features_only", "Hugging Face"])
@pytest.mark.parametrize("name", ["skaformer_nano", "cska_vit_tiny_patch16_224"])
def test_a_wrapped_backbone_is_told_of_its_keys_in_one_line(name, wrapper):
    transformers = pytest.importorskip("transformers")

    def backbone(**told):
        torch.manual_seed(0)
        if wrapper == "features_only":
            return timm.create_model(name, features_only=True, img_size=64, out_indices=[1, 2], **told).eval()
        config = transformers.TimmBackboneConfig(backbone=name, out_indices=[1, 2])
        return transformers.TimmBackbone(config, img_size=64, **told).eval()

    def maps(model, size):
        out = model(torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1)))
        return list(getattr(out, "feature_maps", out))

    free = {"depths": (1, 1, 1, 1), "dims": (8, 32, 64, 96)} if "former" in name else VIT
    told, built, usual = backbone(**free), backbone(off_grid="pool", **free), backbone(**free)
    statickey.set_off_grid(told, "pool")
    assert {layer.off_grid for layer in static_keys(told)} == {"pool"}
    for size in (64, 96):
        for own, other in zip(maps(told, size), maps(built, size), strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=0)
    assert not torch.equal(maps(told, 96)[-1], maps(usual, 96)[-1])
    statickey.set_key_size(told, (2, 2))
    assert {layer.key_grid for layer in static_keys(told)} == {(2, 2)}
    assert [a.shape for a in maps(told, 96)] == [a.shape for a in maps(usual, 96)]
    assert set(statickey.set_key(told, "continuous")) == {
        n for n, m in told.named_modules() if m in static_keys(told)
    }


def test_a_model_without_static_keys_has_nothing_to_choose():
    model = timm.create_model("resnet10t", features_only=True)
    for call in (statickey.set_off_grid, statickey.set_key_size, statickey.set_key):
        with pytest.raises(StaticKeyError, match="FeatureListNet has no static key"):
            call(model, "pool")


SMALL_DETR = {
    "d_model": 16,
    "encoder_hidden_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "decoder_in_channels": [16] * 3,
    "encoder_in_channels": [64, 160, 256],
    "decoder_layers": 2,
    "num_queries": 10,
    "num_labels": 3,
}


@pytest.fixture
def pooled(tmp_path):
    """A folder that a configuration of any library on timm can name: what the model is, its arguments with it."""
    args = {"img_size": 64, "off_grid": "pool", "mixer_args": {"ska": {"scale": 0.5}}}
    config = {"architecture": "skaformer_nano", "model_args": args, "pretrained_cfg": {"input_size": [3, 64, 64]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return f"local-dir:{tmp_path}"


@pytest.mark.capability("Hugging Face RT-DETRv2, UPerNet")
@pytest.mark.parametrize("way", ["told", "configured"])
@pytest.mark.parametrize("kind", ["RTDetrV2ForObjectDetection", "UperNetForSemanticSegmentation"])
def test_hugging_face_models_on_a_backbone_whose_keys_pool(kind, way, pooled):
    transformers = pytest.importorskip("transformers")
    name = pooled if way == "configured" else "skaformer_nano"
    indices = [1, 2, 3] if "Detr" in kind else [0, 1, 2, 3]
    backbone = transformers.TimmBackboneConfig(backbone=name, out_indices=indices)
    if "Detr" in kind:
        config = transformers.RTDetrV2Config(backbone_config=backbone, **SMALL_DETR)
    else:
        config = transformers.UperNetConfig(
            backbone_config=backbone, num_labels=4, hidden_size=16, use_auxiliary_head=False
        )
    model = getattr(transformers, kind)(config).eval()
    if way == "told":
        statickey.set_off_grid(model, "pool")
    (layer,) = static_keys(model)
    assert layer.off_grid == "pool"
    assert (layer.scale, layer.key_grid) == ((0.5, (8, 8)) if way == "configured" else (32**-0.5, (28, 28)))
    for height, width in ((64, 64), (96, 128)):
        out = model(torch.randn(1, 3, height, width))
        assert out.logits.isfinite().all()
        assert out.logits.shape == ((1, 10, 3) if "Detr" in kind else (1, 4, height, width))


def test_hugging_face_classifier(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmWrapperConfig(architecture="fcskaformer_nano", num_labels=5)
    model = transformers.TimmWrapperForImageClassification(config).eval()
    model.save_pretrained(tmp_path)
    again = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(again(images).logits, model(images).logits)
    assert model(images).logits.shape == (2, 5)


@pytest.mark.capability("fx (torchvision)")
@pytest.mark.parametrize("name", FAMILIES)
def test_torchvision_feature_extractor(name):
    model = timm.create_model(name, img_size=64).eval()
    node = "stages.1" if name in FORMERS else "blocks.1"
    taken = []
    model.get_submodule(node).register_forward_hook(lambda module, args, out: taken.append(out))
    images = torch.randn(1, 3, 64, 64)
    model(images)
    extracted = create_feature_extractor(model, {node: "out"})(images)["out"]
    torch.testing.assert_close(extracted, taken[0])


def test_torchvision_detector():
    host = timm.create_model("skaformer_nano", img_size=64)
    stages = [(str(i), stage) for i, stage in enumerate(host.stages)]
    body = nn.Sequential(OrderedDict([("stem", host.stem), *stages]))
    channels = [info["num_chs"] for info in host.feature_info]
    backbone = BackboneWithFPN(body, {name: name for name, _ in stages}, channels, 32)
    detector = FasterRCNN(
        backbone,
        3,
        min_size=64,
        max_size=96,
        rpn_anchor_generator=AnchorGenerator(sizes=((8,), (16,), (32,), (64,), (128,)), aspect_ratios=((1.0,),) * 5),
    )
    target = {"boxes": torch.tensor([[5.0, 5.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    losses = detector([torch.rand(3, 64, 80)], [target])
    sum(losses.values()).backward()
    assert host.stages[1].blocks[0].token_mixer.static_key.grad is not None


@pytest.mark.capability("peft LoRA")
@pytest.mark.parametrize("name", FAMILIES)
def test_peft_lora(name):
    peft = pytest.importorskip("peft")
    model = timm.create_model(name, img_size=64, num_classes=3).eval()
    if name == "small_vit":
        nn.init.normal_(model.head.weight)  # it starts at zero
    images = torch.randn(2, 3, 64, 64)
    before = model(images)
    targets = sorted({n.rpartition(".")[2] for n, _ in model.named_modules()} & {"qv", "v", "qkv", "proj"})
    config = peft.LoraConfig(target_modules=targets, modules_to_save=["head"], r=2, init_lora_weights=False)
    if "proj" in dict(model.named_modules()).get("patch_embed", torch.nn.Identity())._modules:
        config.exclude_modules = r"patch_embed\.proj"
    tuned = peft.get_peft_model(model, config)
    trainable = {n for n, p in tuned.named_parameters() if p.requires_grad}
    assert all(any(f"{target}.lora_A" in n for n in trainable) for target in targets)
    assert not any(n.endswith(("static_key", "conv_key")) for n in trainable)
    out = tuned.eval()(images)
    assert not torch.allclose(out, before)
    torch.testing.assert_close(tuned.merge_and_unload()(images), out, rtol=1e-4, atol=1e-5)
