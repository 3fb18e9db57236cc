"""The mixers inside any module, what is chosen for all static keys among them, and checkpoints that fit them."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_key_options
from .._typing import Key, OffGrid, Size2
from ..errors import StaticKeyError
from ..layers import GridState, StaticKeyAttention, TokenMixer


def token_mixers(model: nn.Module) -> dict[str, TokenMixer]:
    """The mixers in a model by module name, in order of depth."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TokenMixer)}


def check_shapes(model: nn.Module, state_dict: Mapping[str, Any]) -> None:
    """Refuse the first tensor of a state dict whose shape, or kind of key, differs from the model's.

    Raises:
        StaticKeyError: Names the tensor, both shapes or kinds and the remedy.
    """
    mixers = token_mixers(model).items()
    for prefix, mixer in mixers:
        for name in mixer.key_names if isinstance(mixer, StaticKeyAttention) else ():
            rows, function = f"{prefix}.{name}", f"{prefix}.{name}.weight"
            saved = "grid" if rows in state_dict else "continuous" if function in state_dict else mixer.key
            if saved != mixer.key:
                raise StaticKeyError(
                    f"{rows} is a key={saved!r} in the checkpoint, key={mixer.key!r} in the model; build the model "
                    f"with key={saved!r}, load, then call its set_key({mixer.key!r})"
                )
    tied = {f"{prefix}.{name}" for prefix, mixer in mixers for name in mixer.grid_parameters}
    for name, own in model.state_dict(keep_vars=True).items():
        other = state_dict.get(name)
        if name.endswith("_extra_state") or not isinstance(own, Tensor) or not isinstance(other, Tensor):
            continue
        if own.shape == other.shape:
            continue
        if name in tied and own.shape[:1] != other.shape[:1]:
            remedy = "build the mixer with the num_heads and dynamic_heads it was saved with"
        elif name in tied or name.endswith(("pos_embed", "relative_position_bias_table")):
            remedy = (
                "build the model with the img_size, key_size, class_token and reg_tokens it was saved with; another "
                "size is resampled by statickey.models.checkpoint_filter_fn(state_dict, model)"
            )
        elif name.startswith("head"):
            remedy = "build the model with the checkpoint's num_classes, then call reset_classifier"
        else:
            remedy = "build the model with the sizes (in_chans, dims, depths, heads) it was saved with"
        raise StaticKeyError(
            f"{name}: {tuple(other.shape)} in the checkpoint, {tuple(own.shape)} in the model; {remedy}"
        )
    for prefix, mixer in mixers:
        name = f"{prefix}._extra_state"
        if name in state_dict and isinstance(mixer, GridState):
            mixer.set_extra_state(state_dict[name])  # only compares: before anything is loaded


def set_key_size(model: nn.Module, key_size: Size2 | None) -> None:
    """Give all static keys a grid of their own: the cost of attention, chosen on a trained model.

    Values of larger maps are averaged over its cells; see ``StaticKeyAttention``. Keys with rows are resampled,
    and are new objects: create the optimizer afterwards.

    Args:
        model: Any module that holds static keys: a model, a detector on one, what another library wraps around one.
        key_size: The grid (h', w'); None for that of the tokens, or what ``off_grid`` says.

    Raises:
        StaticKeyError: The model has no static key, a layer has ``off_grid="window"``, or not a pair of positive
            integers.
    """
    mixers = _static_key_mixers(model).values()
    for mixer in mixers:  # all or none
        check_key_options(mixer.key, key_size, mixer.off_grid)
    for mixer in mixers:
        mixer.set_key_size(key_size)


def set_off_grid(model: nn.Module, off_grid: OffGrid) -> None:
    """Choose what all static keys do on another grid than the built one; see ``StaticKeyAttention``.

    The choice is no weight: a checkpoint does not hold it, and a model that is built and loaded anew must be told
    again, or be built with ``off_grid=``.

    Args:
        model: As in ``set_key_size``.
        off_grid: The choice, as ``off_grid`` of the constructor.

    Raises:
        StaticKeyError: The model has no static key, there is no such choice, or it is ``"window"`` and a key has
            a ``key_size``.
    """
    mixers = _static_key_mixers(model).values()
    for mixer in mixers:  # all or none
        check_key_options(mixer.key, mixer.key_size, off_grid)
    for mixer in mixers:
        mixer.set_off_grid(off_grid)


def set_key(model: nn.Module, key: Key) -> dict[str, float]:
    """Turn all static keys into another kind: ``"continuous"``, by least squares, or ``"grid"``, by evaluation.

    A grid key gives the same outputs where ``StaticKeyAttention.set_key`` says. The frequencies of continuous
    keys are drawn under a forked random state, as new mixers are in ``convert``.

    Args:
        model: As in ``set_key_size``.
        key: The kind.

    Returns:
        By module name, what the new key misses of the old one; see ``StaticKeyAttention.set_key``.

    Raises:
        StaticKeyError: The model has no static key, or there is no such kind.
    """
    mixers = _static_key_mixers(model)
    with forked_random(next(model.parameters())):
        return {name: mixer.set_key(key) for name, mixer in mixers.items()}


def forked_random(like: Tensor) -> AbstractContextManager[None]:
    """A random state of its own, on the CPU and on the device of ``like``; the outer one is untouched."""
    return torch.random.fork_rng(devices=[like.device] if like.is_cuda else [])


def _static_key_mixers(model: nn.Module) -> dict[str, StaticKeyAttention]:
    mixers = token_mixers(model).items()
    found = {name: mixer for name, mixer in mixers if isinstance(mixer, StaticKeyAttention)}
    if not found:
        raise StaticKeyError(f"{type(model).__name__} has no static key; convert its attention to ska, cska or fcska")
    return found
