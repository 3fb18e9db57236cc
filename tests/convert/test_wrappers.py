"""``convert`` on what wraps a model."""

import pytest
import timm
import torch
from torch import nn

from statickey import convert
from statickey.convert import token_mixers
from statickey.errors import StaticKeyError, UnsupportedHostError

SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "img_size": 56, "window_size": 7}


def vit(**kwargs):
    return timm.create_model("vit_tiny_patch16_224", depth=2, embed_dim=24, num_heads=3, img_size=32, **kwargs)


def swin(**kwargs):
    return timm.create_model("swin_tiny_patch4_window7_224", features_only=True, **SWIN, **kwargs)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleDict({"backbone": vit(), "head": nn.Linear(1000, 2)})

    def forward(self, x):
        return self.parts["head"](self.parts["backbone"](x))


def timm_wrapper():
    transformers = pytest.importorskip("transformers")
    args = {"depth": 2, "embed_dim": 24, "num_heads": 3, "img_size": 32}
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=args, num_labels=3)
    return transformers.TimmWrapperModel(config)


WRAPPERS = {
    "data parallel": (lambda: nn.DataParallel(vit()), "module.blocks.0.attn", 32),
    "features": (
        lambda: vit(features_only=True, out_indices=(0, 1)),
        "model.blocks.0.attn",
        32,
    ),
    "features of windows": (lambda: swin(feature_cls="getter"), "model.layers.0.blocks.0.attn", 56),
    "a model of one's own": (Net, "parts.backbone.blocks.0.attn", 32),
    "transformers": (timm_wrapper, "timm_model.blocks.0.attn", 32),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_the_model_inside_is_converted(name):
    make, first, size = WRAPPERS[name]
    model, images = make().eval(), torch.randn(1, 3, size, size)
    model(images)
    report = convert(model, "ska")
    assert report.modules[0].name == first
    assert model.get_submodule(first) is not None
    assert report.params_after == sum(p.numel() for p in model.parameters())
    assert len(token_mixers(model)) == len(report.modules) == 2
    model(images)
    assert [m.name for m in convert(model, "fcska", layers=first).modules] == [first]


def test_a_compiled_model_runs_what_stands_in_it_now():
    model, images = vit().eval(), torch.randn(1, 3, 32, 32)
    compiled = torch.compile(model, backend="eager")
    before = compiled(images)
    assert convert(compiled, "ska").modules[0].name == "_orig_mod.blocks.0.attn"
    assert torch.equal(compiled(images), model(images))
    assert not torch.equal(compiled(images), before)


class DistributedDataParallel(nn.Module):
    """Stands for torch's, which wants a process group."""

    def __init__(self):
        super().__init__()
        self.module = vit()


REFUSED = {
    "flattened": (swin, "FeatureListNet holds the layers of a model.*feature_cls='getter'"),
    "flattened, further inside": (lambda: nn.Sequential(swin()), "feature_cls='getter'"),
    "two models": (
        lambda: nn.ModuleDict({"left": vit(), "right": vit()}),
        r"holds 2 models: left \(VisionTransformer\), right .*model.get_submodule\('left'\)",
    ),
    "shared over processes": (DistributedDataParallel, "convert model.module, then wrap it again"),
    "what is inside says why": (lambda: nn.Sequential(vit(patch_drop_rate=0.2)), "patch_drop_rate > 0"),
    "nothing": (lambda: nn.Sequential(nn.Linear(2, 2)), "Sequential is not a host this can convert"),
    "no model": (lambda: "vit", "convert takes a model, got 'vit'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_words_that_help(case):
    make, message = REFUSED[case]
    with pytest.raises(UnsupportedHostError, match=message):
        convert(make(), "ska")


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused_by_name():
    converted = vit()
    convert(converted, "ska")
    with pytest.raises(StaticKeyError, match=r"cannot be scripted: TorchScript is not supported; use torch\.export"):
        torch.jit.script(converted)
    with pytest.raises(UnsupportedHostError, match="is TorchScript, whose modules cannot be replaced"):
        convert(torch.jit.trace(vit().eval(), torch.randn(1, 3, 32, 32)), "ska")
