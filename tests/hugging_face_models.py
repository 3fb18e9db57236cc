"""Small models of Hugging Face's transformers, and what the tests of their conversion share."""

from importlib import import_module

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
}
SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 32, "patch_size": 2}


def classifier(name, **kwargs):
    config = getattr(transformers, f"{name}Config")(**SIZES | kwargs, num_labels=5)
    return getattr(transformers, f"{name}ForImageClassification")(config)


def tower(name, kind="Model", **kwargs):
    config = getattr(transformers, f"{name}Config")(**SIZES | kwargs)
    models = import_module(type(config).__module__.replace("configuration_", "modeling_"))
    return getattr(models, f"{name.removesuffix('Vision')}{kind}")(config)


def pvt_v2_config(**kwargs):
    sizes = {"image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 24]}
    strides = {"patch_sizes": [7, 3], "strides": [4, 2], "sr_ratios": [2, 1], "num_attention_heads": [2, 3]}
    return transformers.PvtV2Config(**sizes | strides | kwargs, mlp_ratios=[2, 2], num_labels=5)


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
    "dpt": lambda: tower("DPT"),
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
    "pvtv2": lambda: transformers.PvtV2ForImageClassification(pvt_v2_config()),
    "pvtv2, linear": lambda: transformers.PvtV2ForImageClassification(pvt_v2_config(linear_attention=True)),
    "yolos": lambda: transformers.YolosForObjectDetection(
        transformers.YolosConfig(**SIZES | {"image_size": [32, 32]}, num_detection_tokens=3, num_labels=5)
    ),
    "hiera": lambda: transformers.HieraForImageClassification(
        transformers.HieraConfig(
            embed_dim=12,
            image_size=[32, 32],
            depths=[2, 2],
            num_heads=[1, 2],
            masked_unit_size=[2, 2],
            masked_unit_attention=[True, False],
            num_query_pool=1,
            num_labels=5,
        )
    ),
    "swinv2": lambda: transformers.Swinv2ForImageClassification(transformers.Swinv2Config(**SWIN, num_labels=5)),
    "swin": lambda: transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN, num_labels=5)),
}
FIXED = {"beit", "beit, shared bias", "swin", "swinv2", "hiera"}
"""Whose windows, or position bias, are not the subject of the test of grids, or that have one."""

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
    """Recorded hidden states: of pyramids not the input of the first stage."""
    return 2 if name.split(",")[0] in ("segformer", "pvtv2") else 3


def flat(maps):
    """Maps in one tuple, where a host has one for each stage."""
    return [own for each in maps for own in (each if isinstance(each, tuple) else [each])]


def without_gradient(model, x):
    output(model.train()(x)).square().mean().backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}
