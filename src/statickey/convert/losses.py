"""Losses by which a converted model follows the one it was made of, whatever it was trained for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import StaticKeyError
from ..layers import StaticKeyAttention
from .keys import token_mixers


def layer_loss(student: nn.Module, teacher: nn.Module, images: Tensor) -> Tensor:
    """How far each static layer is from the teacher's at its place, both on what the teacher's layer gets.

    One layer's loss does not depend on another's weights, so it suits keys that are trained alone; see
    ``key_parameters``.

    Args:
        student: The converted model.
        teacher: What it was made of, as ``as_mixers`` gives it, in evaluation mode.
        images: (B, C, H, W), or what else both models take.

    Returns:
        The mean over layers of ``relative_error`` of their outputs, a scalar; gradients reach the student alone.

    Raises:
        StaticKeyError: The student has no static key, or the teacher nothing at a place of one.
    """
    names = [name for name, mixer in token_mixers(student).items() if isinstance(mixer, StaticKeyAttention)]
    if not names:
        raise StaticKeyError(f"{type(student).__name__} has no static key; give a converted model")
    losses = []
    with _recorded(teacher, names) as calls:
        with torch.no_grad():
            teacher(images)
        for name in names:
            args, kwargs, wanted = calls[name]
            losses.append(relative_error(student.get_submodule(name)(*args, **kwargs), wanted))
    return torch.stack(losses).mean()


def feature_loss(student: nn.Module, teacher: nn.Module, images: Tensor) -> Tensor:
    """How far the student's last features are from the teacher's.

    Args:
        student: The converted model.
        teacher: What it was made of, in evaluation mode.
        images: (B, C, H, W), or what else both models take.

    Returns:
        ``relative_error`` of what ``forward_features`` gives, or, of a model without it, the model itself; a scalar,
        with gradients for the student alone.

    Raises:
        StaticKeyError: That is not one tensor.
    """
    with torch.no_grad():
        wanted = _features(teacher, images)
    return relative_error(_features(student, images), wanted)


def relative_error(said: Tensor, wanted: Tensor) -> Tensor:
    """Mean square error, as a share of the mean square of what is wanted; a scalar in float32."""
    wanted = wanted.float()
    return F.mse_loss(said.float(), wanted) / wanted.square().mean().clamp_min(1e-12)


def key_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What is static in a converted model: its keys, and what is added to their logits."""
    found = [mixer for mixer in token_mixers(model).values() if isinstance(mixer, StaticKeyAttention)]
    return [dict(mixer.named_parameters())[name] for mixer in found for name in sorted(mixer.no_weight_decay())]


def _features(model: Any, images: Tensor) -> Tensor:
    features = model.forward_features(images) if hasattr(model, "forward_features") else model(images)
    features = getattr(features, "last_hidden_state", features)
    if not isinstance(features, Tensor):
        raise StaticKeyError(
            f"{type(model).__name__} gives a {type(features).__name__}, not one tensor; give the "
            "backbone in it, or compare parts by relative_error"
        )
    return features


@contextmanager
def _recorded(teacher: nn.Module, names: list[str]) -> Iterator[dict[str, tuple[Any, Any, Tensor]]]:
    """What modules are called with, and what they give."""
    calls: dict[str, tuple[Any, Any, Tensor]] = {}
    handles = []
    for name in names:

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor, name: str = name) -> None:
            calls[name] = (args, kwargs, output)

        try:
            place = teacher.get_submodule(name)
        except AttributeError as error:
            raise StaticKeyError(f"the teacher has no {name}; give what the student was converted of") from error
        handles.append(place.register_forward_hook(hook, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
