"""Parts of mixers: what a host notes about its grids, heads that talk, projections with a norm, fewer keys."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._typing import Size2


class TokenGrids:
    """The grid (H, W) last seen for each number of tokens, shared by the mixers of a host with a dynamic size.

    Not a plain dict: ``torch.export`` would give every module a copy.
    """

    def __init__(self) -> None:
        self._by_count: dict[int, Size2] = {}
        self._symbolic: Size2 | None = None

    def note(self, num_tokens: int, grid: Size2) -> None:
        """Remember the grid of a number of tokens; while a model is exported it may be a symbol, no key of a dict."""
        if isinstance(num_tokens, torch.SymInt):
            self._symbolic = grid
        else:
            self._by_count[num_tokens] = grid

    def find(self, num_tokens: int) -> Size2 | None:
        """The grid last noted for a number of tokens."""
        return self._symbolic if isinstance(num_tokens, torch.SymInt) else self._by_count.get(num_tokens)


class HeadMix(nn.Module):
    """Talking heads: logits and weights of all heads are mixed linearly, before and after the softmax.

    Args:
        before: (h -> h), on the scaled logits.
        after: (h -> h), on the weights.

    Source:
        Shazeer et al., Talking-Heads Attention, arXiv 2003.02436.
    """

    of_tokens: ClassVar[bool] = False
    """Whether it needs the logits of each token's own key."""

    def __init__(self, before: nn.Linear, after: nn.Linear) -> None:
        super().__init__()
        self.before = before
        self.after = after

    def logits(self, logits: Tensor) -> Tensor:
        """Mix over the head axis, (B, h, N, M) to the same."""
        return self.before(logits.to(self.before.weight.dtype).movedim(1, -1)).movedim(-1, 1)  # type: ignore[no-any-return]

    def weights(self, weights: Tensor) -> Tensor:
        """Mix over the head axis, (B, h, N, M) to the same; rows no longer sum to one."""
        return self.after(weights.movedim(1, -1)).movedim(-1, 1)  # type: ignore[no-any-return]


class NormedLinear(nn.Linear):
    """A linear layer with a batch norm behind it, over batch and tokens; hosts made of convolutions have such.

    Args:
        linear: Whose widths, bias, device and dtype it has.
        norm: Whose epsilon and momentum its norm has.
    """

    def __init__(self, linear: nn.Linear, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        like: dict[str, Any] = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, **like)
        self.norm = nn.BatchNorm1d(linear.out_features, eps=norm.eps, momentum=norm.momentum, **like)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        out = super().forward(x)
        return self.norm(out.flatten(0, -2)).reshape(out.shape)  # type: ignore[no-any-return]


class Reduction(nn.Module, ABC):
    """What a host makes of its tokens before it projects them to keys and values: fewer tokens, as many channels."""

    @abstractmethod
    def forward(self, x: Tensor, feat_size: Size2) -> Tensor:
        """(B, H*W, dim) to (B, M, dim), row-major over ``grid(feat_size)``."""

    @abstractmethod
    def grid(self, feat_size: Size2) -> Size2:
        """The grid of what comes out."""

    @abstractmethod
    def macs(self, feat_size: Size2) -> int:
        """Multiply-accumulates of one image."""
