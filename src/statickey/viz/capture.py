"""Reading attention maps and keys out of a model, without changing it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .._checks import check_feat_size, check_name
from .._typing import Size2
from ..convert import as_mixers, host_attention, token_mixers
from ..errors import StaticKeyError, UnsupportedHostError

_SAME = 1e-3
"""The largest relative difference of outputs at which a twin's maps are a model's own."""


@dataclass(frozen=True)
class LayerMaps:
    """The attention maps of one layer, and the tokens that their rows and columns are."""

    weights: Tensor
    """(B, heads, queries, keys); in windows (B * windows, ...), the windows of an image one after another."""
    feat_size: Size2
    """The grid (H, W) of the queries, row-major behind the prefix tokens."""
    key_size: Size2
    """That of the keys, smaller where a host makes keys of fewer tokens."""
    num_prefix_tokens: int


def capture_attention(model: nn.Module, images: Tensor, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The attention maps that a model uses on some images, position bias and masks included.

    Mixers of this package are read as they run. For a host's own attention, a timm or transformers model as it is, a
    copy of the model is read, with self-attention of this package in its place, after its output was found the same.
    The model is not changed.

    Args:
        model: A model with mixers of this package, or one that ``convert`` takes.
        images: (B, C, H, W), normalised.
        layers: Names of the attention modules to read, such as ``["blocks.3.attn"]``; no map of another is computed.
            Default: all that have a map.

    Returns:
        For each, its module name and the map, (B, heads, queries, keys); for attention in windows, (B * windows,
        heads, queries, keys), the windows of an image one after another.

    Raises:
        UnsupportedHostError: The model has no mixer of this package, and its own attention cannot be read.
        UnknownNameError: A layer is not attention with a map.
        StaticKeyError: The copy's output is not the model's.
    """
    return {name: maps.weights for name, maps in capture_maps(model, images, layers).items()}


@torch.no_grad()
def capture_maps(model: nn.Module, images: Tensor, layers: Sequence[str] | None = None) -> dict[str, LayerMaps]:
    """What ``capture_attention`` gives, with the grids of the tokens."""
    if isinstance(layers, str):
        raise StaticKeyError(f"layers={layers!r} must be a list of names, such as [{layers!r}]")
    mixers: dict[str, Any] = dict(token_mixers(model))
    own = _own_attention(model, needed=not mixers)
    read, names = model, {name: name for name in mixers if hasattr(mixers[name], "attention_weights")}
    if own and (layers is None or not names.keys() >= set(layers)):
        read = as_mixers(copy.deepcopy(model))
        mixers = dict(token_mixers(read))
        # a mixer may stand inside a module that fits it into the host
        names |= {name: next(each for each in mixers if each == name or each.startswith(f"{name}.")) for name in own}
    wanted = list(names) if layers is None else list(layers)
    for name in wanted:
        check_name("layer with an attention map", name, list(names))
    maps: dict[str, LayerMaps] = {}
    handles = [
        mixers[names[name]].register_forward_hook(partial(_record, maps, name), with_kwargs=True)
        for name in dict.fromkeys(wanted)
    ]
    try:
        said = _run(read, images)
    finally:
        for handle in handles:
            handle.remove()
    if read is not model:
        _check_same(said, _run(model, images))
    return maps


def _own_attention(model: nn.Module, needed: bool) -> list[str]:
    """Attention that is not of this package; an error where there must be some and none can be read."""
    try:
        return host_attention(model)
    except UnsupportedHostError:
        if needed:
            raise
        return []


def _run(model: nn.Module, images: Tensor) -> Any:
    """The output in evaluation mode, which is put back."""
    modes = {module: module.training for module in model.modules()}
    try:
        return model.eval()(images)
    finally:
        for module, training in modes.items():
            module.training = training


def _check_same(said: Any, wanted: Any) -> None:
    pairs = [pair for pair in zip(tree_leaves(said), tree_leaves(wanted), strict=True) if isinstance(pair[0], Tensor)]
    apart = [float((a - b).abs().max() / b.abs().max().clamp_min(1e-9)) for a, b in pairs if b.is_floating_point()]
    if not apart or not max(apart) <= _SAME:
        raise StaticKeyError(
            f"the model's output differs by {max(apart, default=float('nan')):.1e} from that of the copy whose maps "
            "are read; give inputs that it computes the same for twice"
        )


def _record(
    maps: dict[str, LayerMaps], name: str, mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    called_with = {
        k: v for k, v in kwargs.items() if k in ("feat_size", "attn_mask", "rope", "pos_embed") and v is not None
    }
    weights = mixer.attention_weights(*args, **called_with).cpu()
    _, feat_size = mixer._tokens(args[0], args[1] if len(args) > 1 else kwargs.get("feat_size"))
    reduction = getattr(mixer, "reduction", None)
    key_size = feat_size if reduction is None else reduction.grid(feat_size)
    maps[name] = LayerMaps(weights, feat_size, key_size, mixer.num_prefix_tokens)


def key_colours(key: Tensor, num_prefix_tokens: int, feat_size: tuple[int, int]) -> Tensor:
    """A static key as pictures: the first three principal components of its rows as red, green, blue.

    Tokens of like colour have like keys, so they are attended together. Only differences between rows count
    (attention does not see a common shift), and the three components keep their relative strength.

    Args:
        key: (h, P + H*W, ...), prefix rows first.
        num_prefix_tokens: P; prefix rows have no place in a picture.
        feat_size: The grid (H, W).

    Returns:
        (h, H, W, 3) in [0, 1].

    Raises:
        StaticKeyError: The key does not have one row for each prefix token and grid position.
    """
    height, width = check_feat_size(feat_size)
    rows_wanted = num_prefix_tokens + height * width
    if key.ndim < 3 or key.shape[1] != rows_wanted or not key.is_floating_point():
        raise StaticKeyError(
            f"key {tuple(key.shape)} of {key.dtype} cannot be drawn on feat_size={feat_size} with "
            f"{num_prefix_tokens} prefix tokens, which takes floats (heads, {rows_wanted}, ...); pass the grid the "
            "key was built for"
        )
    rows = key.detach()[:, num_prefix_tokens:].flatten(2).double().cpu()
    rows = rows - rows.mean(dim=1, keepdim=True)
    left, strength, _ = torch.linalg.svd(rows, full_matrices=False)
    parts = (left * strength.unsqueeze(1))[..., :3]
    parts = torch.nn.functional.pad(parts, (0, 3 - parts.shape[-1]))
    # the sign of a component is arbitrary: let its largest entry be positive, so that pictures repeat
    peak = parts.gather(1, parts.abs().argmax(dim=1, keepdim=True))
    parts = parts * peak.sign()
    limit = parts.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    return (0.5 + 0.5 * parts / limit).reshape(key.shape[0], *feat_size, 3).float()
