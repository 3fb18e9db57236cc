"""Exported with free height and width, a model serves every size that its host serves."""

import pytest
import timm
import torch

from statickey import convert
from tolerances import assert_close

TINY = {"embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 5}


def vit(mixer, **mixer_args):
    model = timm.create_model("vit_tiny_patch16_224", **TINY, img_size=64, dynamic_img_size=True)
    convert(model, mixer, mixer_args=mixer_args)
    return model


MODELS = {
    "mhsa": (lambda: vit("mhsa"), 16, (64, 64)),
    "ska, from the built size": (lambda: vit("ska"), 16, (64, 64)),
    "cska": (lambda: vit("cska"), 16, (96, 64)),
    "fcska, continuous": (lambda: vit("fcska", key="continuous"), 16, (96, 64)),
    "a named model": (
        lambda: timm.create_model("skaformer_nano", num_classes=5, depths=(1, 1, 1, 1), img_size=64),
        32,
        (64, 96),
    ),
}


SLOW = ("cska", "a named model")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS]
)
def test_export_with_any_size(name):
    torch.manual_seed(0)
    make, stride, traced = MODELS[name]
    model = make().eval()
    height, width = (stride * torch.export.Dim(axis, min=2, max=20) for axis in ("rows", "columns"))
    images = torch.randn(1, 3, *traced)
    exported = torch.export.export(model, (images,), dynamic_shapes={"x": {2: height, 3: width}}).module()
    for size in (traced, (64, 64), (4 * stride, 2 * stride), (2 * stride, 7 * stride)):
        images = torch.randn(1, 3, *size)
        assert_close(str(size), exported(images), model(images))
