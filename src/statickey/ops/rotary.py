"""Rotary position embedding: vectors turned by the place of their token."""

import torch
from torch import Tensor

from ..errors import StaticKeyError


def rotate(x: Tensor, rope: Tensor, *, half: bool = False, num_prefix_tokens: int = 0) -> Tensor:
    """Turn each pair of channels of a token by an angle of its own.

    The product of two turned vectors depends on the difference of their angles only.

    Args:
        x: (..., P + N, d), prefix tokens first; they have no place and are not turned.
        rope: (..., N, 2*d), sines then cosines, one for each channel, in the order that ``half`` says; leading axes
            broadcast to those of ``x``.
        half: Channel c makes a pair with c + d/2; otherwise channels 2c and 2c + 1 do.
        num_prefix_tokens: P.

    Returns:
        In the shape and type of ``x``.

    Raises:
        StaticKeyError: ``rope`` does not hold 2*d numbers for each of N tokens, or d is odd.
    """
    tokens, width = x.shape[-2] - num_prefix_tokens, x.shape[-1]
    if width % 2 or rope.shape[-1] != 2 * width or rope.shape[-2] != tokens:
        raise StaticKeyError(
            f"rope {tuple(rope.shape)} cannot turn {tokens} tokens of width {width}; it takes (..., {tokens}, "
            f"{2 * width}), sines then cosines for each channel of an even width"
        )
    sin, cos = rope.chunk(2, dim=-1)
    grid = x[..., num_prefix_tokens:, :]
    if half:
        first, second = grid.chunk(2, dim=-1)
        across = torch.cat([-second, first], dim=-1)
    else:
        across = torch.stack([-grid[..., 1::2], grid[..., ::2]], dim=-1).flatten(-2)
    turned = (grid * cos + across * sin).to(x.dtype)
    if not num_prefix_tokens:
        return turned
    prefix = x[..., :num_prefix_tokens, :].expand(*turned.shape[:-2], -1, -1)
    return torch.cat([prefix, turned], dim=-2)
