"""The named models work unchanged in the libraries that take timm's backbones."""

from collections import OrderedDict

import pytest
import timm
import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.feature_extraction import create_feature_extractor

import statickey  # noqa: F401  (registers the models)
from statickey.errors import StaticKeyError

FORMERS = ["skaformer_nano", "cskaformer_nano", "fcskaformer_nano"]
TRANSFORMERS = ["ska_vit_tiny_patch16_224", "cska_vit_tiny_patch16_224", "fcska_vit_tiny_patch16_224"]
SMALL = [*(f"{prefix}lsa_vit_small_patch4_32" for prefix in ("", "ska_", "cska_", "fcska_")), "small_vit"]
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
