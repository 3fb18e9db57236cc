"""Parts of mixers: what a checkpoint keeps beside a key, and heads that talk."""

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_saved_grid
from .._typing import Size2
from ..errors import FeatSizeError


class GridState(nn.Module):
    """Base of mixers with ``grid_parameters``: a checkpoint carries the grid (H, W) beside the key."""

    feat_size: Size2

    def get_extra_state(self) -> Tensor:
        """The grid, as a tensor that any checkpoint format can hold, (2,)."""
        return torch.tensor(self.feat_size, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Refuse a key that was saved on another grid.

        Raises:
            FeatSizeError: The checkpoint was saved on another grid, or what it holds is no grid.
        """
        if type(state).__module__.startswith("torch.distributed") or getattr(state, "is_meta", False):
            return  # a placeholder, on the ranks to which another one sends the checkpoint
        saved = check_saved_grid(state)
        if saved != self.feat_size:
            raise FeatSizeError(
                f"the checkpoint's key belongs to feat_size={saved}, this layer is built for {self.feat_size}; build "
                "the model with the img_size it was saved at, or load through statickey.models.checkpoint_filter_fn"
            )


class TokenGrids:
    """The grid (H, W) last seen for each number of tokens, shared by the mixers of a host with a dynamic size.

    Not a plain dict: ``torch.export`` would give every module a copy.
    """

    def __init__(self) -> None:
        self.by_count: dict[int, Size2] = {}


class HeadMix(nn.Module):
    """Talking heads: logits and weights of all heads are mixed linearly, before and after the softmax.

    Args:
        before: (h -> h), on the scaled logits.
        after: (h -> h), on the weights.

    Source:
        Shazeer et al., Talking-Heads Attention, arXiv 2003.02436.
    """

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
