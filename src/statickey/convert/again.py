"""What a mixer hands on to the one that takes its place."""

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from ..errors import StaticKeyError
from ..layers import ContinuousKey, PartlyStaticAttention, StaticKeyAttention


@torch.no_grad()
def carry_between(name: str, old: Any, new: Any) -> bool:
    """Copy projections and keys of a ``TokenMixer``, not one with a key of the input, to another in its place.

    Args:
        name: The place, for messages.
        old: The mixer that stood there.
        new: The mixer that will.

    Returns:
        Whether the whole key of ``new`` comes from ``old``.

    Raises:
        StaticKeyError: ``new`` needs a projection that ``old`` does not have, or of another shape.
    """
    for projection in ("qkv", "qv", "v", "proj"):
        wanted = getattr(new, projection, None)
        if wanted is None:
            continue
        found = getattr(old, projection, None)
        if found is None and projection == "v" and hasattr(old, "qv"):
            found = _last_rows(old.qv, wanted.weight.shape[0])
        if found is None:
            raise StaticKeyError(
                f"{name} is a {type(old).__name__}, which has no {projection} for the {type(new).__name__} to carry "
                "over; build the host again, or pass keep_weights=False for fresh weights"
            )
        if _shapes(found) != _shapes(wanted):
            raise StaticKeyError(
                f"{name}.{projection}: {_shapes(found)} in the {type(old).__name__}, {_shapes(wanted)} in the "
                f"{type(new).__name__}; keep its heads and biases in mixer_args, or pass keep_weights=False"
            )
        setattr(new, projection, deepcopy(found))
    dynamic = new.dynamic_heads if isinstance(new, PartlyStaticAttention) else ()
    if dynamic:
        found = old.dynamic_heads if isinstance(old, PartlyStaticAttention) else ()
        if dynamic != found:
            raise StaticKeyError(
                f"{name} has keys of the input for heads {list(found)}, not for dynamic_heads={list(dynamic)}; build "
                "the host again, or pass keep_weights=False for fresh weights"
            )
        new.k = deepcopy(old.k)
    if not isinstance(old, StaticKeyAttention) or not isinstance(new, StaticKeyAttention):
        return False
    if _shapes(getattr(old, "query_conv", None)) == _shapes(getattr(new, "query_conv", None)) != {}:
        new.query_conv = deepcopy(old.query_conv)
    whole = True
    for key in new.key_names:
        whole = _carry_key(key, old, new) and whole
    for bias in ("key_bias", "map_bias"):
        found, wanted = getattr(old, bias, None), getattr(new, bias, None)
        if found is None:
            continue
        if wanted is None or wanted.shape != found.shape or old.key_grid != new.key_grid:
            whole = False
        else:
            wanted.copy_(found)
    return whole


def _last_rows(linear: nn.Linear, count: int) -> nn.Linear:
    """The last outputs of a layer as a layer."""
    part = deepcopy(linear)
    part.out_features = count
    for tensor in ("weight", "bias"):
        whole = getattr(linear, tensor)
        if whole is not None:
            setattr(part, tensor, nn.Parameter(whole[-count:].clone(), requires_grad=whole.requires_grad))
    return part


def _carry_key(key: str, old: StaticKeyAttention, new: StaticKeyAttention) -> bool:
    """Copy one key, rows or function; whether it could be."""
    if key not in old.key_names:
        return False
    found, wanted = getattr(old, key), getattr(new, key)
    if found is None or wanted is None:
        return found is wanted
    if isinstance(wanted, ContinuousKey):
        if not isinstance(found, ContinuousKey) or _shapes(found) != _shapes(wanted):
            return False
        setattr(new, key, deepcopy(found))
        return True
    rows = old.key_rows(new.key_grid, key)
    if rows.shape != wanted.shape:
        return False
    trainable = all(parameter.requires_grad for parameter in old.parameters() if parameter is found)
    setattr(new, key, nn.Parameter(rows.clone(), requires_grad=trainable))
    return True


def _shapes(module: nn.Module | None) -> dict[str, tuple[int, ...]]:
    if module is None:
        return {}
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
