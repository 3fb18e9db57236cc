"""The rule for Hiera: mask units or the whole grid, tokens in an order of its own, queries pooled between stages."""

from functools import partial
from typing import Any

import torch
from timm.models.hiera import Hiera, MaskUnitAttention, Unroll
from torch import Tensor, nn

from .._typing import Size2
from ..errors import UnsupportedHostError
from ..layers import TokenMixer
from .host import HostRule, Site, register_host_rule
from .places import PlacedMixer


class GridMaxPool(nn.Module):
    """Queries of 2 x 2 positions become one, their maximum.

    Args:
        feat_size: The grid (H, W) of the tokens.
    """

    def __init__(self, feat_size: Size2) -> None:
        super().__init__()
        self.feat_size = feat_size

    def forward(self, query: Tensor) -> Tensor:
        """(B, h, H*W, d) to (B, h, H*W / 4, d)."""
        height, width = self.feat_size
        batch, heads, _, width_of_head = query.shape
        maps = query.reshape(batch, heads, height // 2, 2, width // 2, 2, width_of_head)
        return maps.amax(dim=(3, 5)).flatten(2, 3)


class UnrolledMixer(PlacedMixer):
    """A mixer of Hiera's tokens, which it sees row by row; the host has those of a mask unit far apart.

    Args:
        mixer: The mixer.
        rel_pos: There is none.
        num_windows: Mask units that it mixes one by one, or 1.
        order: Where each token, row by row, stands in the host's order, (N,).
        back: Where each token of the output, in the host's order, stands row by row.
        q_stride: Tokens that become one, which the host's block asks for.
    """

    order: Tensor
    back: Tensor

    def __init__(
        self, mixer: TokenMixer, rel_pos: None, num_windows: int, order: Tensor, back: Tensor, q_stride: int
    ) -> None:
        super().__init__(mixer, rel_pos)
        self.num_windows = num_windows
        self.q_stride = q_stride
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("back", back, persistent=False)

    def parts(self) -> dict[str, Any]:
        """All but the mixer."""
        names = ("rel_pos", "num_windows", "order", "back", "q_stride")
        return {name: getattr(self, name) for name in names}

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) to (B, N / q_stride, out_dim)."""
        windows = split_windows(x, self.num_windows)
        return join_windows(self.mixer(windows[:, self.order])[:, self.back], self.num_windows)


def split_windows(x: Tensor, num_windows: int) -> Tensor:
    """(B, N, dim), the first token of each window first, to (B * windows, N / windows, dim)."""
    return x.reshape(x.shape[0], -1, num_windows, x.shape[-1]).transpose(1, 2).flatten(0, 1)


def join_windows(windows: Tensor, num_windows: int) -> Tensor:
    """The other way."""
    return windows.reshape(-1, num_windows, *windows.shape[1:]).transpose(1, 2).flatten(1, 2)


def _unrolled(feat_size: Size2, halvings: int, device: torch.device) -> Tensor:
    """The row-major position of each token of a grid in Hiera's order, (N,)."""
    positions = torch.arange(feat_size[0] * feat_size[1], device=device)
    unroll = Unroll(feat_size, (1, 1), [(2, 2)] * halvings)
    return unroll(positions[None, :, None]).flatten()  # type: ignore[no-any-return]


def hiera_sites(model: Hiera) -> dict[str, Site]:
    """Every block; those between stages make one query of four tokens."""
    if model.patch_drop_rate > 0:
        raise UnsupportedHostError("patch_drop_rate > 0 removes mask units at random; build the host without it")
    if tuple(model.q_stride) != (2, 2) or len(model.tokens_spatial_shape) != 2:
        raise UnsupportedHostError(f"this Hiera has q_stride={model.q_stride}; supported: images, strides of (2, 2)")
    sites, halvings = {}, len(model.stage_ends) - 1
    for index, block in enumerate(model.blocks):
        name, attn = f"blocks.{index}.attn", block.attn
        if isinstance(attn, UnrolledMixer):
            wrap = partial(UnrolledMixer, **attn.parts())
            sites[name] = Site.of_mixer(attn.mixer, wrap=wrap, windows=attn.num_windows)
        elif type(attn) is MaskUnitAttention:
            sites[name] = _read(attn, tuple(model.mask_spatial_shape), halvings)
        else:
            raise UnsupportedHostError(f"{name} is a {type(attn).__name__}; supported: MaskUnitAttention")
        halvings -= attn.q_stride > 1
    return sites


def _read(attn: Any, units: tuple[int, int], halvings: int) -> Site:
    pools = attn.q_stride > 1
    grid, parts = unrolled_windows(units, attn.use_mask_unit_attn, halvings, pools, attn.qkv.weight.device)
    return Site.of(
        attn,
        feat_size=grid,
        windows=parts["num_windows"],
        num_heads=attn.heads,
        q_norm=GridMaxPool(grid) if pools else None,
        tokens_per_query=attn.q_stride,
        wrap=partial(UnrolledMixer, rel_pos=None, q_stride=attn.q_stride, **parts),
    )


def unrolled_windows(
    units: Size2, in_units: bool, halvings: int, pools: bool, device: torch.device
) -> tuple[Size2, dict[str, Any]]:
    """The grid of the tokens that attention sees at once, and the parts of what brings them there row by row.

    Args:
        units: The grid of mask units.
        in_units: Whether attention is within each.
        halvings: How often each side of a mask unit has still to be halved.
        pools: Whether queries are.
        device: Where the order is kept.

    Returns:
        (H, W), and ``num_windows``, ``order`` and ``back`` of ``UnrolledMixer``.
    """
    height, width = (1, 1) if in_units else units
    grid = (height << halvings, width << halvings)
    out_grid = (grid[0] // 2, grid[1] // 2) if pools else grid
    return grid, {
        "num_windows": units[0] * units[1] if in_units else 1,
        "order": _unrolled(grid, halvings, device).argsort(),
        "back": _unrolled(out_grid, halvings - pools, device),
    }


register_host_rule(HostRule(host=Hiera, sites=hiera_sites))
