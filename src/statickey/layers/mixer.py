"""What every token mixer is: a module from tokens, or a map of them, to the same, that knows its grid."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NoReturn, cast

import torch
from torch import Tensor, fx, nn

from .._checks import (
    check_count,
    check_dtype,
    check_feat_size,
    check_head_dim,
    check_map,
    check_not_causal,
    check_rate,
    check_saved_grid,
    check_tokens,
)
from .._typing import InputFmt, Size2
from ..errors import FeatSizeError, StaticKeyError
from ..ops import resample_static_key
from .parts import TokenGrids


class TokenMixer(nn.Module, ABC):
    """Base of all mixers: ``mixer(x, feat_size=None)`` maps tokens (B, N, dim) to tokens (B, N, dim).

    Tokens are row-major over the grid (H, W), prefix tokens first, so N = num_prefix_tokens + H*W.

    Attributes: ``input_fmt``, the format of input and output: ``"NLC"`` tokens, or maps ``"NHWC"`` or
    ``"NCHW"``, whose shape tells the grid (set where a host works on maps); ``grids``, what a host with a
    dynamic input size noted about its token counts, else None.

    All mixers share this head of a constructor, so that a swap can build any of them from the attention it
    replaces. What a mixer has no use for (heads or a bias where there is no projection) is accepted and unused.
    A subclass makes its parameters in ``_build`` and fills those that torch does not in ``reset_parameters``.

    Args:
        dim: Channels of the tokens.
        num_heads: Number of heads h.
        feat_size: The token grid (H, W) the mixer is built for.
        num_prefix_tokens: P, class and register tokens before the grid.
        head_dim: Width d of one head; default ``dim // num_heads``.
        qkv_bias: Whether the projections of queries, keys and values that there are have a bias.
        proj_bias: Whether the output projection has a bias.
        attn_drop: Dropout rate on the attention weights.
        proj_drop: Dropout rate on the output.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        StaticKeyError: An argument is out of range, or ``num_heads`` does not divide ``dim``.
    """

    layout: ClassVar[Literal["NLC", "NCHW"]] = "NLC"
    """What the mixer computes on; any ``input_fmt`` is brought to it."""

    grid_parameters: tuple[str, ...] = ()
    """Parameters and buffers whose second axis runs over prefix tokens and the positions of ``key_grid``."""

    rotates: ClassVar[bool] = False
    """Whether the mixer has queries and keys that a rotary position embedding can turn."""
    adds_pos_embed: ClassVar[bool] = False
    """Whether the mixer has queries that see a position embedding which values do not."""

    __call__: Callable[..., Tensor]

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        feat_size: Size2,
        num_prefix_tokens: int = 0,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.head_dim = check_head_dim(dim, num_heads, head_dim)
        check_count(num_prefix_tokens=num_prefix_tokens)
        check_rate(attn_drop=attn_drop, proj_drop=proj_drop)
        check_dtype(dtype)
        self.dim = dim
        self.num_heads = num_heads
        self.feat_size = check_feat_size(feat_size)
        self.num_prefix_tokens = num_prefix_tokens
        self.input_fmt: InputFmt = "NLC"
        self.grids: TokenGrids | None = None
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj_drop = nn.Dropout(proj_drop)
        self._build(qkv_bias, proj_bias, {"device": device, "dtype": dtype})
        self.reset_parameters()

    def _build(self, qkv_bias: bool, proj_bias: bool, factory: dict[str, Any]) -> None:
        """Make the parameters, if any; ``factory`` holds their device and dtype."""

    def reset_parameters(self) -> None:
        """Initialise what this class owns; projections initialise themselves."""

    @property
    def key_grid(self) -> Size2:
        """The grid (H, W) of the rows of ``grid_parameters``: that of the tokens the mixer is built for."""
        return self.feat_size

    @property
    def num_tokens(self) -> int:
        """Tokens on the grid the mixer is built for, prefix included."""
        return self.num_prefix_tokens + self.feat_size[0] * self.feat_size[1]

    def forward(
        self,
        x: Tensor,
        feat_size: Size2 | None = None,
        *,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        rope: Tensor | None = None,
        pos_embed: Tensor | None = None,
    ) -> Tensor:
        """Mix tokens.

        Args:
            x: Tokens, (B, N, dim); or a map, (B, H, W, dim) or (B, dim, H, W), where ``input_fmt`` says so.
            feat_size: The grid (H, W) of tokens when it is not the one the mixer is built for; a map has its own.
            attn_mask: Added to the scaled logits, or boolean and true where attention is allowed; broadcasts to
                (B, h, N, N).
            is_causal: Accepted because timm's blocks pass it; must be False.
            rope: A rotary position embedding, (H*W, 2*d) or one for each head, (h, H*W, 2*d): sines, then cosines,
                by which grid tokens turn their queries and keys; a static key is turned by the place of its row.
            pos_embed: A position embedding, (N, dim) or (B, N, dim), added to what queries and keys are projected
                from, but not values; a static key has its place by itself.

        Returns:
            In the shape of ``x``.

        Raises:
            FeatSizeError: The tokens do not fill the grid.
            StaticKeyError: Causal attention, or a mask or position embedding for a mixer without attention, is
                asked for; or a rotary embedding for a static key that is not on the grid of the tokens.
            BackendError: The mixer's ``backend`` cannot run here: ``"triton"`` with a mask, with ``attn_drop`` in
                training, for self-attention, or while the mixer is compiled, exported or transformed.
        """
        if isinstance(x, fx.Proxy):
            return self._traced(x, feat_size, attn_mask, rope, pos_embed)
        check_not_causal(is_causal)
        tokens, feat_size = self._tokens(x, feat_size)
        self._check_positions(feat_size, rope, pos_embed)
        out = self._mix(tokens, feat_size, attn_mask, **_given(rope=rope, pos_embed=pos_embed))
        if self.input_fmt == "NLC":
            return out
        maps = out.reshape(out.shape[0], *feat_size, out.shape[-1])
        return maps.permute(0, 3, 1, 2) if self.input_fmt == "NCHW" else maps

    def _tokens(self, x: Tensor, feat_size: Size2 | None) -> tuple[Tensor, Size2]:
        """The input as tokens (B, N, dim), checked, and their grid."""
        if self.input_fmt == "NLC":
            return x, self._check_grid(x, feat_size)
        channels_first = self.input_fmt == "NCHW"
        check_map(x, self.dim, self.num_prefix_tokens, channels_first=channels_first)
        maps = x.permute(0, 2, 3, 1) if channels_first else x
        return maps.flatten(1, 2), (maps.shape[1], maps.shape[2])

    def _traced(
        self,
        x: fx.Proxy,
        feat_size: Size2 | None,
        attn_mask: Tensor | None,
        rope: Tensor | None = None,
        pos_embed: Tensor | None = None,
    ) -> Any:
        """A leaf of a symbolic trace: the grid is known when the mixer runs, not before."""
        kwargs: dict[str, Any] = {"attn_mask": attn_mask} | _given(rope=rope, pos_embed=pos_embed)
        tracer = cast(fx.Tracer, x.tracer)
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (x, feat_size), kwargs)

    def _check_positions(self, feat_size: Size2, rope: Tensor | None, pos_embed: Tensor | None) -> None:
        """Refuse a position embedding that the mixer has no place for."""
        if rope is not None:
            self._check_rotates(feat_size)
        if pos_embed is not None and not self.adds_pos_embed:
            raise StaticKeyError(
                f"{type(self).__name__} has no query beside its values that a position embedding could be added to; "
                "use mhsa or a static key"
            )

    def _check_rotates(self, feat_size: Size2) -> None:
        """Refuse a rotary position embedding on a grid where the mixer cannot follow it."""
        if not self.rotates:
            raise StaticKeyError(
                f"{type(self).__name__} has no query and key that a rotary position embedding could turn; use mhsa "
                "or a static key"
            )

    @abstractmethod
    def _mix(self, x: Tensor, feat_size: Size2, attn_mask: Tensor | None) -> Tensor:
        """Mix tokens of a checked shape; a mixer is also given the ``rope`` or ``pos_embed`` it can take."""

    @abstractmethod
    def macs(self, feat_size: Size2 | None = None) -> int:
        """Multiply-accumulates of one image, in closed form: products and convolutions only.

        Args:
            feat_size: The grid (H, W); default the one the mixer is built for.
        """

    def _count(self, feat_size: Size2 | None) -> tuple[int, int]:
        """Grid tokens and all tokens on ``feat_size``."""
        height, width = self.feat_size if feat_size is None else check_feat_size(feat_size)
        return height * width, self.num_prefix_tokens + height * width

    def _check_grid(self, x: Tensor, feat_size: Size2 | None) -> Size2:
        if feat_size is not None:
            feat_size = check_feat_size(feat_size)
        else:
            noted = None if self.grids is None else self.grids.find(x.shape[1])
            feat_size = self.feat_size if noted is None else noted
        check_tokens(x, self.dim, feat_size, self.num_prefix_tokens)
        return feat_size

    def set_input_size(self, feat_size: Size2) -> None:
        """Rebuild the mixer for another grid, resampling what is tied to it; no change at the same size.

        Resampled parameters are new objects: create the optimizer afterwards.

        Args:
            feat_size: The new token grid (H, W).

        Raises:
            FeatSizeError: Not a pair of positive integers.
        """
        feat_size = check_feat_size(feat_size)
        before = self.key_grid
        self.feat_size = feat_size
        self._rebuild(before)

    def _rebuild(self, before: Size2) -> None:
        """Bring what is tied to a grid from the one before to ``key_grid``."""
        if before == self.key_grid:
            return
        for name in self.grid_parameters:
            old = getattr(self, name)
            if old is None:
                continue
            new = self._resample(old.detach(), before, self.key_grid)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
            setattr(self, name, new)

    def resample_state(self, state: dict[str, Tensor], key_grid: Size2) -> dict[str, Tensor]:
        """Bring the tensors of this mixer that were saved on another grid to its own ``key_grid``.

        Args:
            state: Tensors by their names in ``state_dict()``; names that are not tied to a grid pass through.
            key_grid: The grid (H, W) they were saved on.

        Returns:
            The same names, the tensors of ``grid_parameters`` resampled.

        Raises:
            FeatSizeError: A tensor has another number of rows than that grid.
        """
        saved = check_feat_size(key_grid)
        return {
            name: self._resample(tensor, saved, self.key_grid) if name in self.grid_parameters else tensor
            for name, tensor in state.items()
        }

    def _resample(self, tensor: Tensor, grid: Size2, new_grid: Size2) -> Tensor:
        return resample_static_key(tensor, grid, new_grid, num_prefix_tokens=self.num_prefix_tokens)

    def no_weight_decay(self) -> set[str]:
        """Names of this mixer's parameters that weight decay must leave alone.

        Keys are excluded: they play the part of an activation (the key a token would have had), and decay
        would pull every attention map towards uniform.
        """
        return {name for name in self.grid_parameters if isinstance(getattr(self, name), nn.Parameter)}

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse ``torch.jit.script``, which calls this and would fail further on in other words."""
        raise StaticKeyError(
            f"{type(self).__name__} cannot be scripted: TorchScript is not supported; use torch.export or "
            "torch.compile"
        )

    def extra_repr(self) -> str:
        """The head of the constructor, for ``print(module)``."""
        return (
            f"{self.dim}, {self.num_heads}, feat_size={self.feat_size}, "
            f"num_prefix_tokens={self.num_prefix_tokens}, head_dim={self.head_dim}"
        )


class GridState(TokenMixer):
    """Base of mixers with ``grid_parameters``: a checkpoint carries the grid (H, W) beside the key."""

    def get_extra_state(self) -> Tensor:
        """The grid of the tokens and, where it is another, that of the keys; a tensor, (2,) or (4,)."""
        grids = self.feat_size if self.key_grid == self.feat_size else (*self.feat_size, *self.key_grid)
        return torch.tensor(grids, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        """Refuse a key that was saved on another grid; a continuous one, with another ``key_size``.

        Raises:
            FeatSizeError: The checkpoint was saved on another grid, or what it holds is no grid.
        """
        if type(state).__module__.startswith("torch.distributed") or getattr(state, "is_meta", False):
            return  # a placeholder, on the ranks to which another one sends the checkpoint
        saved_size, saved = check_saved_grid(state)
        of_tokens = saved == saved_size and self.key_grid == self.feat_size
        if saved == self.key_grid or (of_tokens and not self.grid_parameters):
            return
        if of_tokens:
            difference = f"feat_size={saved}, this layer is built for {self.key_grid}"
            remedy = "the img_size it was saved at"
        else:
            difference = f"key_size={saved}, that of this layer to {self.key_grid}"
            remedy = f"key_size={saved}, load, then call its set_key_size"
        raise FeatSizeError(
            f"the checkpoint's key belongs to {difference}; build the model with {remedy}, or load through "
            "statickey.models.checkpoint_filter_fn"
        )


def _given(**tensors: Tensor | None) -> dict[str, Any]:
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}
