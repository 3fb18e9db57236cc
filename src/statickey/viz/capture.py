"""Reading attention maps and keys out of a model, without changing it."""

from typing import Any

import torch
from torch import Tensor, nn

from ..layers import TokenMixer


@torch.no_grad()
def capture_attention(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The attention maps that a model's mixers use on some images.

    Args:
        model: A model with mixers of this package.
        images: (B, C, H, W), normalised.

    Returns:
        For each mixer that has a map, its module name and the map, (B, heads, tokens, tokens).
    """
    maps: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            feat_size = args[1] if len(args) > 1 else kwargs.get("feat_size")
            maps[name] = module.attention_weights(args[0], feat_size).cpu()  # type: ignore[operator]

        return hook

    handles = [
        module.register_forward_hook(record(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, TokenMixer) and hasattr(module, "attention_weights")
    ]
    training = model.training
    try:
        model.eval()(images)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return maps


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
    """
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
