"""Reading attention maps and keys out of a model, without changing it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_feat_size, check_name
from ..convert import token_mixers
from ..errors import StaticKeyError, UnsupportedHostError


@torch.no_grad()
def capture_attention(model: nn.Module, images: Tensor, layers: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The attention maps that a model's mixers use on some images, position bias and masks included.

    Args:
        model: A model with mixers of this package.
        images: (B, C, H, W), normalised.
        layers: Names of the mixers to read, such as ``["blocks.3.attn"]``; no map of another is computed. Default:
            all that have a map.

    Returns:
        For each mixer that has a map, its module name and the map, (B, heads, tokens, tokens); for attention in
        windows, (B * windows, heads, tokens, tokens), the windows of an image one after another.

    Raises:
        UnsupportedHostError: The model has no mixer of this package.
        UnknownNameError: A layer is not a mixer with a map.
    """
    mixers = token_mixers(model)
    if not mixers:
        raise UnsupportedHostError(
            f"{type(model).__name__} has no mixer of this package to read; call statickey.convert(model, 'mhsa') "
            "first, which keeps its weights and its function"
        )
    readable = [name for name, mixer in mixers.items() if hasattr(mixer, "attention_weights")]
    if isinstance(layers, str):
        raise StaticKeyError(f"layers={layers!r} must be a list of names, such as [{layers!r}]")
    wanted = readable if layers is None else list(layers)
    for name in wanted:
        check_name("layer with an attention map", name, readable)
    maps: dict[str, Tensor] = {}
    handles = [
        mixers[name].register_forward_hook(partial(_record, maps, name), with_kwargs=True)
        for name in dict.fromkeys(wanted)
    ]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()(images)
    finally:
        for module, training in modes.items():
            module.training = training
        for handle in handles:
            handle.remove()
    return maps


def _record(
    maps: dict[str, Tensor], name: str, mixer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    called_with = {k: v for k, v in kwargs.items() if k in ("feat_size", "attn_mask", "rope") and v is not None}
    maps[name] = mixer.attention_weights(*args, **called_with).cpu()


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
