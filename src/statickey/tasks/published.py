"""Classifiers that timm has weights of."""

from typing import Any

import timm
from timm.data import infer_imagenet_subset
from timm.data.imagenet_info import ImageNetInfo
from torch import nn

from ..errors import OutputError, StaticKeyError
from ..models import build_model
from .weights import ModelCard


def published_model(name: str, img_size: int | None) -> tuple[nn.Module, ModelCard]:
    """A pretrained model by name, and how its images are prepared.

    Args:
        name: As timm has it, with the tag of its weights or without.
        img_size: Side of its images in pixels; default that of its weights.

    Raises:
        OutputError: timm has no such model.
        StaticKeyError: It is no classifier.
    """
    if not timm.is_model(name):
        raise OutputError(f"{name!r} is neither the folder of a run nor a model's name; see statickey summary")
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.num_classes:
        raise StaticKeyError(f"{name!r} has no classes; from Python: statickey.convert, then save_converted")
    side = cfg.input_size[-1] if img_size is None else img_size
    chans = cfg.input_size[0]
    sizes: dict[str, Any] = {"img_size": side, "num_classes": cfg.num_classes, "in_chans": chans}
    model = build_model(name, None, **sizes, model_args={"pretrained": True})
    subset = infer_imagenet_subset(cfg.to_dict())
    labels = range(cfg.num_classes)
    names = map(str, labels) if subset is None else map(ImageNetInfo(subset).index_to_description, labels)
    card = ModelCard(
        architecture=name,
        mixer=None,
        model_args={},
        img_size=side,
        in_chans=chans,
        class_names=tuple(names),
        mean=tuple(cfg.mean),
        std=tuple(cfg.std),
        streamed=True,
    )
    return model.eval(), card
