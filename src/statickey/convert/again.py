"""What a mixer hands on to the one that takes its place."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

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
            found = _rows(old.qv, range(old.qv.out_features)[-wanted.out_features :])
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
        if not {*dynamic} <= {*found}:
            raise StaticKeyError(
                f"{name} has keys of the input for heads {list(found)}, not for dynamic_heads={list(dynamic)}; build "
                "the host again, or pass keep_weights=False for fresh weights"
            )
        new.k = (
            deepcopy(old.k)
            if dynamic == found
            else _rows(old.k, [*map(old.key_channels().index, new.key_channels())])
        )
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
        if wanted is None or old.key_grid != new.key_grid:
            whole = False
        else:
            whole = _carry_heads(found, old, wanted, new) and whole
    return whole


def _rows(linear: nn.Linear, rows: Sequence[int]) -> nn.Linear:
    """Some outputs of a layer as a layer, with the part of a norm behind it that is theirs."""
    part = deepcopy(linear)
    part.out_features = len(rows)
    for module in part.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.num_features = len(rows)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.ndim:
                tensor.data, tensor.grad = tensor.data[list(rows)].clone(), None
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
    trainable = all(parameter.requires_grad for parameter in old.parameters() if parameter is found)
    wanted.requires_grad_(trainable)
    return _carry_heads(rows, old, wanted, new)


def _carry_heads(rows: Tensor, old: StaticKeyAttention, wanted: Tensor, new: StaticKeyAttention) -> bool:
    """Copy what belongs to the heads that are static in both, (h, ...); whether that is all that is wanted."""
    if rows.shape[1:] != wanted.shape[1:]:
        return False
    places = {head: place for place, head in enumerate(static_heads(old))}
    for place, head in enumerate(static_heads(new)):
        if head in places:
            wanted[place] = rows[places[head]]
    return {*static_heads(new)} <= places.keys()


def static_heads(mixer: StaticKeyAttention) -> tuple[int, ...]:
    """The heads whose keys are its own, in the order of those."""
    return mixer.static_heads if isinstance(mixer, PartlyStaticAttention) else tuple(range(mixer.num_heads))


def _shapes(module: nn.Module | None) -> dict[str, tuple[int, ...]]:
    if module is None:
        return {}
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
