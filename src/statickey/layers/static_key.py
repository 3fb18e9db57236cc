"""The layers of static-key attention: SKA, CSKA and the factorised CSKA."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._checks import check_feat_size, check_key_options
from .._typing import Key, OffGrid, Size2
from ..errors import StaticKeyError
from ..ops import cell_sizes, pool_cells, pooling_macs, repeat_cells
from .attention import AttendOp, AttentionMixer, Rotate, is_plain, linear_rows, with_pos_embed
from .continuous import ContinuousKey
from .mixer import GridState
from .parts import Reduction
from .windows import Segment, attend_in_windows, num_window_logits

KEY_STD = 1.0
"""Standard deviation of fresh keys; docs/results/key_init.md has the measurement behind it."""


class StaticKeyAttention(GridState, AttentionMixer):
    """SKA: attention whose key is a learned parameter, one row per token position and head.

    ``out = proj(softmax(scale * q(x) @ static_key^T) @ v(x))``. Adding one vector to every row of the key
    changes nothing, so a key is identifiable only up to that.

    Attributes: ``qv`` (rows: all q, then all v) or ``v`` when ``query_proj=False``; ``static_key``
    (h, P + H*W, d), or a ``ContinuousKey``; ``proj``; ``log_temperature`` when it is learned; ``backend``, the op's
    backend; ``made_for``, the ``feat_size`` it was constructed with. ``key_rows`` evaluates the key on any grid.

    The other arguments are those of ``SelfAttention``.

    Args:
        feat_size: The token grid (H, W) the key is built for.
        query_proj: Project the queries; if false, the input itself, split into heads, is the query.
        key: ``"grid"``, a free row for each position, or ``"continuous"``, a function of position (``ContinuousKey``)
            with as many parameters whatever the grid, which it is evaluated on.
        key_size: A grid (h', w') of its own for the key. On larger maps, values are averaged over its cells: exactly
            the attention whose keys are equal within a cell, at N x M instead of N x N. Cells differ by at most one
            row and column. A mask, ``mask_diagonal`` and ``attention_weights`` need each token's own key, and cost
            N x N. Default: the grid of the tokens.
        off_grid: What ``forward`` does on another grid than ``feat_size``: ``"resample"`` the key, or evaluate a
            continuous one, there (attention to all tokens); ``"pool"`` the values of a larger map over the cells of
            ``made_for``, where no ``key_size`` says another grid; or tile the map with ``"window"``s of the built
            grid (cost linear in tokens; prefix tokens are seen by, and see, the whole map). ``torch.compile`` makes
            a graph for each way in which windows are cut at the border, so that its ``recompile_limit`` may have to
            be raised for many grids.

    Raises:
        StaticKeyError: An argument is out of range, ``query_proj=False`` with ``h*d != dim``, or a ``key_size`` with
            ``off_grid="window"``.

    Source:
        Hu, Zhou, Rostami, Static Key Attention in Vision, arXiv 2412.07049.
    """

    key_names: ClassVar[tuple[str, ...]] = ("static_key",)
    """Attributes that hold keys: parameters on a grid, or functions of position."""

    adds_pos_embed = True

    static_key: nn.Parameter | ContinuousKey

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        feat_size: Size2,
        num_prefix_tokens: int = 0,
        head_dim: int | None = None,
        query_proj: bool = True,
        qkv_bias: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        scale: float | None = None,
        learned_temperature: bool = False,
        mask_diagonal: bool = False,
        key: Key = "grid",
        key_size: Size2 | None = None,
        off_grid: OffGrid = "resample",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        self.key_size = check_key_options(key, key_size, off_grid)
        self.key = key
        self.off_grid = off_grid
        self.made_for = check_feat_size(feat_size)
        self.query_proj = query_proj
        super().__init__(
            dim,
            num_heads,
            feat_size=feat_size,
            num_prefix_tokens=num_prefix_tokens,
            head_dim=head_dim,
            qkv_bias=qkv_bias,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            device=device,
            dtype=dtype,
        )
        self._set_logits(scale, learned_temperature, mask_diagonal, {"device": device, "dtype": dtype})

    def _build(self, qkv_bias: bool, proj_bias: bool, factory: dict[str, Any]) -> None:
        super()._build(qkv_bias, proj_bias, factory)
        inner = self.num_heads * self.head_dim
        if self.query_proj:
            self.qv = nn.Linear(self.dim, 2 * inner, bias=qkv_bias, **factory)
        elif inner == self.dim:
            self.v = nn.Linear(self.dim, inner, bias=qkv_bias, **factory)
        else:
            raise StaticKeyError(
                f"query_proj=False uses x as the query, so num_heads*head_dim={inner} must equal dim={self.dim}"
            )
        self._build_keys(factory)

    def _build_keys(self, factory: dict[str, Any]) -> None:
        """Make the parameters that stand for keys, and what shapes the query."""
        self.static_key = self._make_key((self.head_dim,), KEY_STD, factory)

    def _make_key(self, shape: tuple[int, ...], std: float, factory: dict[str, Any]) -> nn.Parameter | ContinuousKey:
        """An empty key, rows of some shape; or a function of position, drawn with a standard deviation."""
        if self.key == "continuous":
            return ContinuousKey(self.num_heads, self.num_prefix_tokens, shape, std=std, **factory)
        rows = self.num_prefix_tokens + prod(self.key_grid)
        return nn.Parameter(torch.empty(self.num_heads, rows, *shape, **factory))

    def reset_parameters(self) -> None:
        """Initialise keys and temperature; the projections initialise themselves."""
        super().reset_parameters()
        self._reset_keys()

    def _key_std(self, name: str) -> float:
        """Standard deviation of a fresh key, of ``key_names``."""
        return KEY_STD

    def _reset_keys(self) -> None:
        reset_key(self.static_key, partial(nn.init.normal_, std=KEY_STD))

    @property
    def grid_parameters(self) -> tuple[str, ...]:  # type: ignore[override]
        """The keys, where they have rows."""
        return self.key_names if self.key == "grid" else ()

    @property
    def key_grid(self) -> Size2:
        """The grid (H, W) of the key's rows.

        It is ``key_size``; without one that of the tokens, which ``set_input_size`` changes, or with
        ``off_grid="pool"`` the one the layer was made for, which nothing changes.
        """
        if self.reduction is not None:
            return self.reduction.grid(self.feat_size)
        if self.key_size is not None:
            return self.key_size
        return self.made_for if self.off_grid == "pool" else self.feat_size

    def set_key_size(self, key_size: Size2 | None) -> None:
        """Give the key another grid, as ``key_size`` of the constructor: a choice of cost on a built layer.

        A key with rows is resampled; its parameters are new objects: create the optimizer afterwards.

        Args:
            key_size: The new grid (h', w'); None for that of the tokens, or what ``off_grid`` says.

        Raises:
            FeatSizeError: Not a pair of positive integers.
            StaticKeyError: The layer has ``off_grid="window"``.
        """
        self._check_free("key_size")
        checked, before = check_key_options(self.key, key_size, self.off_grid), self.key_grid
        self.key_size = checked
        self._rebuild(before)

    def set_reduction(self, reduction: Reduction) -> None:
        """Take values from fewer tokens, which a host makes; the key is resampled to their grid, and follows it.

        Args:
            reduction: Makes them.

        Raises:
            StaticKeyError: The layer has prefix tokens, a ``key_size`` or an ``off_grid`` of its own.
        """
        if self.num_prefix_tokens or self.key_size is not None or self.off_grid != "resample":
            raise StaticKeyError(
                f"the host takes keys from {reduction.grid(self.feat_size)} tokens of {self.feat_size}: leave out "
                "key_size and off_grid, and build it without prefix tokens"
            )
        before = self.key_grid
        self.reduction = reduction
        self._rebuild(before)

    def _check_free(self, option: str) -> None:
        if self.reduction is not None:
            raise StaticKeyError(f"{option}: the host reduces keys to {self.key_grid} by itself; leave it as it is")

    def set_off_grid(self, off_grid: OffGrid) -> None:
        """Choose what the layer does on another grid than the built one, as ``off_grid`` of the constructor.

        After ``set_input_size`` a key with rows may be resampled, from or to the cells of ``"pool"``; its parameters
        are then new objects.

        Args:
            off_grid: The choice.

        Raises:
            StaticKeyError: There is no such choice, or it is ``"window"`` and the key has a ``key_size``.
        """
        self._check_free("off_grid")
        check_key_options(self.key, self.key_size, off_grid)
        before = self.key_grid
        self.off_grid = off_grid
        self._rebuild(before)

    def set_key(self, key: Key) -> float:
        """Turn the key of a built layer into another kind.

        Its parameters are new objects: create the optimizer afterwards.

        Args:
            key: ``"grid"`` evaluates a continuous key on ``key_grid``. That changes no output on the built grid nor,
                with a ``key_size`` or ``off_grid="pool"``, on a map that is nowhere coarser than ``key_grid``; on
                others the rows are resampled where the function was evaluated. ``"continuous"`` is the nearest
                function of position, by least squares; its frequencies are drawn from torch's generator.

        Returns:
            What the new key misses of the old one: the root mean square error of the worst key of the layer, as a
            share of the key's own. A shift common to all rows, which attention does not see, does not count.

        Raises:
            StaticKeyError: There is no such kind.
        """
        check_key_options(key, self.key_size, self.off_grid)
        if key == self.key:
            return 0.0
        old = {name: getattr(self, name) for name in self.key_names if getattr(self, name) is not None}
        rows = {name: self.key_rows(self.key_grid, name).detach() for name in old}
        self.key, error = key, 0.0
        for name, tensor in rows.items():
            trainable = any(p.requires_grad for p in _parameters(old[name]))
            delattr(self, name)
            std = self._key_std(name)
            made = self._make_key(tuple(tensor.shape[2:]), std, {"device": tensor.device, "dtype": tensor.dtype})
            if isinstance(made, ContinuousKey):
                error = max(error, made.fit(tensor, self.key_grid))
            else:
                made = nn.Parameter(tensor.clone())
            setattr(self, name, made.requires_grad_(trainable))
        return error

    def key_rows(self, grid: Size2 | None = None, name: str = "static_key") -> Tensor:
        """The key on a grid: evaluated, or resampled from ``key_grid``.

        Args:
            grid: The grid (H, W); default ``key_grid``.
            name: Which key, of ``key_names``.

        Returns:
            (h, P + H*W, ...), prefix rows first.
        """
        grid = self.key_grid if grid is None else check_feat_size(grid)
        key = getattr(self, name)
        return key(grid) if isinstance(key, ContinuousKey) else self._resample(key, self.key_grid, grid)

    def _segments(
        self, query: Tensor, feat_size: Size2, rows: Callable[[str], Tensor], turn: Rotate
    ) -> list[Segment]:
        """Queries of all tokens on ``feat_size``, in token order, with their keys, whose rows are given by name."""
        return [Segment(turn(query), turn(rows("static_key")), None, 0)]

    def _attend(
        self, x: Tensor, feat_size: Size2, op: AttendOp, turn: Rotate, pos_embed: Tensor | None = None
    ) -> Tensor:
        if self.reduction is not None:
            query, value = self._project(x, partial(self.reduction, feat_size=feat_size), pos_embed)
            rows_there = partial(self.key_rows, self._cells(feat_size))
            return attend(self._segments(query, feat_size, rows_there, turn), value, op)
        query, value = self._project(x, pos_embed=pos_embed)
        if self._tiles(feat_size):
            return attend_in_windows(
                self._segments(query, feat_size, partial(self.key_rows, self.feat_size), turn),
                value,
                op,
                feat_size=feat_size,
                window_size=self.feat_size,
                num_prefix_tokens=self.num_prefix_tokens,
                mask_diagonal=self.mask_diagonal,
            )
        cells = self._cells(feat_size)

        def rows(name: str) -> Tensor:
            return repeat_cells(
                self.key_rows(cells, name), cells, feat_size, num_prefix_tokens=self.num_prefix_tokens
            )

        return attend(self._segments(query, feat_size, rows, turn), value, op)

    def _attend_unmasked(
        self, x: Tensor, feat_size: Size2, op: AttendOp, turn: Rotate, pos_embed: Tensor | None = None
    ) -> Tensor:
        if self.reduction is not None or not self._pools(feat_size):
            return self._attend(x, feat_size, op, turn, pos_embed)
        cells, prefix = self._cells(feat_size), self.num_prefix_tokens
        pool = partial(pool_cells, feat_size=feat_size, key_size=cells, num_prefix_tokens=prefix)
        query, value = self._project(x, pool, pos_embed)
        count = cell_sizes(feat_size, cells, num_prefix_tokens=prefix, device=x.device)
        segments = self._segments(query, feat_size, partial(self.key_rows, cells), turn)
        return attend(segments, value, partial(op, key_count=count))

    def _project(
        self, x: Tensor, pool: Callable[[Tensor], Tensor] | None = None, pos_embed: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Queries of all tokens, (B, h, N, d), and values, of what ``pool`` makes of the tokens."""
        inner = self.num_heads * self.head_dim
        placed = with_pos_embed(x, pos_embed)
        if not self.query_proj:
            value = self.v(x if pool is None else pool(x))
            (query,), (value,) = self._split_heads(placed, 1), self._split_heads(value, 1)
        elif pool is None and pos_embed is None:
            query, value = self._split_heads(self.qv(x), 2)
        else:
            if pool is None or is_plain(self.qv) or self.reduction is not None:
                # a mean of projections is the projection of the mean, of fewer tokens
                query = linear_rows(self.qv, placed, slice(inner))
                value = linear_rows(self.qv, x if pool is None else pool(x), slice(inner, None))
            else:
                query, value = self.qv(x).tensor_split([inner], dim=-1)
                query = query if pos_embed is None else linear_rows(self.qv, placed, slice(inner))
                value = pool(value)
            (query,), (value,) = self._split_heads(query, 1), self._split_heads(value, 1)
        return self.q_norm(query.to(value.dtype)).to(value.dtype), value  # under autocast norms answer in float32

    def _cells(self, feat_size: Size2) -> Size2:
        """The grid of the keys on a map: nowhere finer than the map."""
        if self.reduction is not None:
            return self.reduction.grid(feat_size)
        wanted = self.key_grid if self.key_size is not None or self.off_grid == "pool" else feat_size
        return min(wanted[0], feat_size[0]), min(wanted[1], feat_size[1])

    def _pools(self, feat_size: Size2) -> bool:
        """Whether attention on this grid is to means of values, in cells of a coarser one."""
        return not self._tiles(feat_size) and not self.mask_diagonal and self._cells(feat_size) != feat_size

    def _check_rotates(self, feat_size: Size2) -> None:
        super()._check_rotates(feat_size)
        if self._tiles(feat_size) or self._cells(feat_size) != feat_size:
            raise StaticKeyError(
                f"a rotary position embedding turns each key by the place of its token, on feat_size={feat_size} "
                f"keys are on a grid of {self.key_grid}; use key_size=None and off_grid='resample'"
            )

    def _tiles(self, feat_size: Size2) -> bool:
        return self.off_grid == "window" and feat_size != self.feat_size and self.reduction is None

    def _num_logits(self, feat_size: Size2) -> tuple[int, int]:
        """Logits per head that prefix queries make, and grid queries, on ``feat_size``."""
        prefix, grid = self.num_prefix_tokens, prod(feat_size)
        if self._tiles(feat_size):
            return prefix * (prefix + grid), num_window_logits(feat_size, self.feat_size, prefix)
        keys = prefix + prod(self._cells(feat_size) if self._pools(feat_size) else feat_size)
        return prefix * keys, grid * keys

    def macs(self, feat_size: Size2 | None = None) -> int:
        """Multiply-accumulates of one image, in closed form; see ``TokenMixer.macs``.

        A continuous key is evaluated once for a whole batch, and counted here as if for one image.
        """
        feat_size = self.feat_size if feat_size is None else check_feat_size(feat_size)
        prefix = self.num_prefix_tokens
        tokens = prefix + prod(feat_size)
        cells = self.feat_size if self._tiles(feat_size) else self._cells(feat_size)
        sources = prefix + prod(cells) if self._pools(feat_size) else tokens
        num_logits = sum(self._num_logits(feat_size))
        macs = self._attention_macs(tokens, num_logits, self.head_dim, 1 + self.query_proj, sources)
        if self.reduction is not None:
            macs += self.reduction.macs(feat_size)
        elif self._pools(feat_size):
            macs += pooling_macs(feat_size, cells, self.dim)
        keys = (getattr(self, name) for name in self.key_names)
        return macs + prod(cells) * sum(key.weight.numel() for key in keys if isinstance(key, ContinuousKey))

    def extra_repr(self) -> str:
        """The head of the constructor, and what of the key is not the default, for ``print(module)``."""
        defaults = {"key": "grid", "key_size": None, "off_grid": "resample"}
        chosen = {name: getattr(self, name) for name in defaults}
        shown = (f", {name}={value!r}" for name, value in chosen.items() if value != defaults[name])
        return super().extra_repr() + "".join(shown)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters of keys; see ``TokenMixer.no_weight_decay``."""
        modules = {name: getattr(self, name) for name in self.key_names if self.key == "continuous"}
        names = {
            f"{name}.{own}" for name, key in modules.items() if key is not None for own, _ in key.named_parameters()
        }
        return super().no_weight_decay() | names


def has_static_key(mixer: Callable[..., Any]) -> bool:
    """Whether a mixer, as ``MIXERS`` holds it, is a ``StaticKeyAttention``."""
    return isinstance(mixer, type) and issubclass(mixer, StaticKeyAttention)


def attend(segments: Sequence[Segment], value: Tensor, op: AttendOp) -> Tensor:
    """Attention of consecutive queries, each with its own key, to all values."""
    parts = [segment.attend(op, value) for segment in segments]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def reset_key(key: nn.Parameter | ContinuousKey | None, fill: Callable[[Tensor], Any]) -> None:
    """Draw a key anew: rows are filled, a function of position draws its own weights."""
    if isinstance(key, ContinuousKey):
        key.reset_parameters()
    elif key is not None:
        fill(key)


def _parameters(key: nn.Parameter | ContinuousKey) -> Iterable[nn.Parameter]:
    return key.parameters() if isinstance(key, ContinuousKey) else (key,)
