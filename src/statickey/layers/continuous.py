"""A static key that is a function of position."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._typing import Size2

NUM_FREQUENCIES = 16
FREQUENCY_STD = 2.0
"""docs/results/continuous_keys.md has the measurement behind both."""


class ContinuousKey(nn.Module):
    """A static key as a function of position: ``key(p) = weight @ [cos(f p), sin(f p)]`` for each of F frequencies f.

    It is evaluated on any grid, at the middle of each cell; p is the place on the map, from -1 to 1 along each axis
    whatever the extent. Rows of prefix tokens, which have no place, are free.

    Attributes: ``weight`` (h, *shape, 2F), ``prefix`` (h, P, *shape) or None, and ``frequencies`` (F, 2), fixed,
    drawn when the layer is made and saved with it.

    Args:
        num_heads: Number of heads h.
        num_prefix_tokens: P.
        shape: Shape of one key.
        std: Standard deviation of the entries of fresh keys.
        num_frequencies: F.
        frequency_std: Standard deviation of fresh frequencies, in quarter turns from the map's middle to its edge.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Source:
        The features are those of Tancik et al., Fourier Features Let Networks Learn High Frequency Functions in Low
        Dimensional Domains, arXiv 2006.10739.
    """

    frequencies: Tensor

    def __init__(
        self,
        num_heads: int,
        num_prefix_tokens: int,
        shape: Sequence[int],
        *,
        std: float = 1.0,
        num_frequencies: int = NUM_FREQUENCIES,
        frequency_std: float = FREQUENCY_STD,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.std, self.frequency_std = std, frequency_std
        self.register_buffer("frequencies", torch.empty(num_frequencies, 2, **factory))
        self.weight = nn.Parameter(torch.empty(num_heads, *shape, 2 * num_frequencies, **factory))
        prefix = torch.empty(num_heads, num_prefix_tokens, *shape, **factory)
        self.prefix = nn.Parameter(prefix) if num_prefix_tokens else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw frequencies and weights; each entry of a fresh key has the variance ``std**2`` at every place."""
        nn.init.normal_(self.frequencies, std=self.frequency_std * math.pi / 2)
        nn.init.normal_(self.weight, std=self.std * len(self.frequencies) ** -0.5)
        if self.prefix is not None:
            nn.init.normal_(self.prefix, std=self.std)

    def features(self, grid: Size2) -> Tensor:
        """The cosines and sines at the places of a grid (H, W), (H*W, 2F), in at least float32."""
        frequencies = self.frequencies.to(torch.promote_types(self.frequencies.dtype, torch.float32))
        height, width = (
            (2 * torch.arange(extent, device=frequencies.device, dtype=frequencies.dtype) + 1) / extent - 1
            for extent in grid
        )
        angles = height[:, None, None] * frequencies[:, 0] + width[:, None] * frequencies[:, 1]
        return torch.cat([angles.cos(), angles.sin()], dim=-1).flatten(0, 1)

    def forward(self, grid: Size2) -> Tensor:
        """The key on a grid (H, W), (h, P + H*W, *shape), prefix rows first."""
        heads, *shape, width = self.weight.shape
        columns = self.weight.reshape(heads, -1, width).transpose(1, 2)
        rows = (self.features(grid).to(columns.dtype) @ columns).reshape(heads, grid[0] * grid[1], *shape)
        return rows if self.prefix is None else torch.cat([self.prefix.to(rows.dtype), rows], dim=1)

    @torch.no_grad()
    def fit(self, rows: Tensor, grid: Size2) -> float:
        """Become the function nearest to a key given by its rows, by least squares.

        A shift common to all rows, which attention does not see, is taken off first, from prefix rows too.

        Args:
            rows: (h, P + H*W, *shape).
            grid: The grid (H, W) of the rows.

        Returns:
            The root mean square of what is left, as a share of that of the rows.
        """
        num_prefix = rows.shape[1] - grid[0] * grid[1]
        rows = rows.detach().double()
        rows = rows - rows[:, num_prefix:].mean(dim=1, keepdim=True)
        wanted = rows[:, num_prefix:].transpose(0, 1).flatten(1).cpu()
        features = self.features(grid).double().cpu()
        shift = features.mean(0)
        varying = features - shift
        solution = torch.linalg.lstsq(varying, wanted, driver="gelsd").solution
        shape = (self.weight.shape[-1], *self.weight.shape[:-1])
        self.weight.copy_(solution.reshape(shape).movedim(0, -1))
        if self.prefix is not None:
            self.prefix.copy_(rows[:, :num_prefix] + (shift @ solution).reshape(shape[1:]).unsqueeze(1).to(rows))
        size = wanted.norm()
        return float((varying @ solution - wanted).norm() / size) if size > 0 else 0.0

    def extra_repr(self) -> str:
        """Shapes, for ``print(module)``."""
        return f"weight={tuple(self.weight.shape)}, frequencies={len(self.frequencies)}"
