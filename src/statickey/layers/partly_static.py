"""Static-key attention that keeps some heads dynamic, and may know where its keys are wanted."""

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from .._checks import check_positive, check_static_key_attention
from .._typing import Key, OffGrid, Size2
from ..errors import StaticKeyError
from ..ops import repeat_cells
from .attention import AttendOp, Rotate, with_pos_embed
from .continuous import ContinuousKey
from .static_key import StaticKeyAttention
from .windows import Segment

LogitBias = Literal["key", "map"]
"""What is added to the logits of a static head: one number for each key, or for each query's and key's place."""


class PartlyStaticAttention(StaticKeyAttention):
    """SKA some of whose heads keep a key of the input, as in self-attention.

    Queries and values are projected for all heads, keys for the dynamic ones; each kind of head is a call of the op.
    Without dynamic heads and bias it is ``StaticKeyAttention``, with all heads dynamic ``SelfAttention``.

    Attributes: those of ``StaticKeyAttention``; ``static_key`` is (h_s, P + H*W, d) for the h_s static heads, or None
    where there is none; ``k`` and ``k_norm`` make the keys of the dynamic ones; ``key_bias`` (h_s, P + H*W), scaled
    as the logits are; ``map_bias`` (h_s, P + H*W, P + H*W), added to the scaled logits.

    The other arguments are those of ``StaticKeyAttention``.

    Args:
        dynamic_heads: Indices of the heads that keep a key of the input.
        bias: What is added to the logits of static heads: nothing, a number for each ``"key"``, or a ``"map"`` of
            them, for each query's and key's place.
        key_size: As in ``StaticKeyAttention``; with dynamic heads or ``bias="map"`` it saves parameters, not time.
        off_grid: As in ``StaticKeyAttention``; ``"window"`` needs static heads alone, and no map.

    Raises:
        StaticKeyError: As in ``StaticKeyAttention``; or a head does not exist or is named twice, there is no such
            bias, or ``off_grid="window"`` meets dynamic heads or a map.
    """

    static_key: nn.Parameter | ContinuousKey | None  # type: ignore[assignment]
    key_bias: nn.Parameter | None
    map_bias: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        *,
        feat_size: Size2,
        dynamic_heads: Sequence[int] = (),
        bias: LogitBias | None = None,
        num_prefix_tokens: int = 0,
        head_dim: int | None = None,
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
        self.dynamic_heads = _check_heads(dynamic_heads, num_heads)
        self.static_heads = tuple(head for head in range(num_heads) if head not in self.dynamic_heads)
        if bias is not None and bias not in get_args(LogitBias):
            raise StaticKeyError(f"bias={bias!r} must be None, 'key' or 'map'")
        self.bias = bias
        self._check_off_grid(off_grid)
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
            scale=scale,
            learned_temperature=learned_temperature,
            mask_diagonal=mask_diagonal,
            key=key,
            key_size=key_size,
            off_grid=off_grid,
            device=device,
            dtype=dtype,
        )

    @property
    def mixed(self) -> bool:
        """Whether a head needs the whole map: its key is the input's, or its logits have a bias for each pair."""
        return bool(self.dynamic_heads) or self.bias == "map"

    def _check_off_grid(self, off_grid: OffGrid) -> None:
        if off_grid == "window" and self.mixed:
            raise StaticKeyError(
                "off_grid='window' with dynamic heads or bias='map', whose keys are all tokens; choose 'resample'"
            )

    def _build(self, qkv_bias: bool, proj_bias: bool, factory: dict[str, Any]) -> None:
        super()._build(qkv_bias, proj_bias, factory)
        if self.dynamic_heads:
            width = len(self.dynamic_heads) * self.head_dim
            self.k = nn.Linear(self.dim, width, bias=qkv_bias, **factory)
            self.k_norm: nn.Module = nn.Identity()

    def _build_keys(self, factory: dict[str, Any]) -> None:
        heads, tokens = len(self.static_heads), self.num_prefix_tokens + prod(self.key_grid)
        self.static_key = self._make_key((self.head_dim,), 1.0, factory) if heads else None
        shapes = {"key": (heads, tokens), "map": (heads, tokens, tokens)}
        for kind, shape in shapes.items():
            wanted = heads and self.bias == kind
            self.register_parameter(f"{kind}_bias", nn.Parameter(torch.empty(shape, **factory)) if wanted else None)

    def _make_key(self, shape: tuple[int, ...], std: float, factory: dict[str, Any]) -> nn.Parameter | ContinuousKey:
        heads, prefix = len(self.static_heads), self.num_prefix_tokens
        if self.key == "continuous":
            return ContinuousKey(heads, prefix, shape, std=std, **factory)
        return nn.Parameter(torch.empty(heads, prefix + prod(self.key_grid), *shape, **factory))

    def _reset_keys(self) -> None:
        super()._reset_keys()
        for bias in (self.key_bias, self.map_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    @property
    def grid_parameters(self) -> tuple[str, ...]:  # type: ignore[override]
        """The keys, where they have rows, and the bias."""
        return (*super().grid_parameters, *(() if self.bias is None else (f"{self.bias}_bias",)))

    def _rebuild(self, before: Size2) -> None:
        super()._rebuild(before)
        if self.map_bias is not None and before != self.key_grid:  # the rows are on the new grid, the columns not yet
            columns = self._resample(self.map_bias.detach().transpose(1, 2), before, self.key_grid)
            new = columns.transpose(1, 2).contiguous()
            self.map_bias = nn.Parameter(new, requires_grad=self.map_bias.requires_grad)

    def resample_state(self, state: dict[str, Tensor], key_grid: Size2) -> dict[str, Tensor]:
        """Bring saved tensors to this mixer's grid; see ``TokenMixer.resample_state``."""
        out = super().resample_state(state, key_grid)
        if "map_bias" in out:
            columns = self._resample(out["map_bias"].transpose(1, 2), key_grid, self.key_grid)
            out["map_bias"] = columns.transpose(1, 2).contiguous()
        return out

    def set_off_grid(self, off_grid: OffGrid) -> None:
        """Choose what the layer does on another grid; see ``StaticKeyAttention.set_off_grid``."""
        self._check_off_grid(off_grid)
        super().set_off_grid(off_grid)

    def _pools(self, feat_size: Size2) -> bool:
        return not self.mixed and super()._pools(feat_size)

    def _segments(
        self, query: Tensor, feat_size: Size2, rows: Callable[[str], Tensor], turn: Rotate
    ) -> list[Segment]:
        bias = None if self.key_bias is None else rows("key_bias")
        return [Segment(turn(query), turn(rows("static_key")), bias, 0)]

    def _attend(
        self, x: Tensor, feat_size: Size2, op: AttendOp, turn: Rotate, pos_embed: Tensor | None = None
    ) -> Tensor:
        if not self.mixed:
            return super()._attend(x, feat_size, op, turn, pos_embed)
        query, value = self._project(x, pos_embed=pos_embed)
        query = turn(query)
        parts = []
        if self.dynamic_heads:
            (key,) = self._split(self.k(with_pos_embed(x, pos_embed)), len(self.dynamic_heads))
            dynamic_key = _turn_of(self.dynamic_heads, turn)(self.k_norm(key).to(value.dtype))
            if self.static_heads and self.head_mix is not None:
                return self._attend_together(query, dynamic_key, value, feat_size, op, turn)
        if self.static_heads:
            key, key_bias, map_bias = self._static_logits(feat_size, turn)
            own_op = partial(op, heads=self.static_heads, map_bias=map_bias)
            segment = Segment(_pick(query, self.static_heads), key, key_bias, 0)
            parts.append(segment.attend(own_op, _pick(value, self.static_heads)))
        if self.dynamic_heads:
            queries, values = (_pick(part, self.dynamic_heads) for part in (query, value))
            parts.append(op(queries, dynamic_key, values, heads=self.dynamic_heads))
        return self._in_order(parts)

    def _in_order(self, parts: list[Tensor]) -> Tensor:
        """Static heads, then dynamic ones, to the order of all heads; (B, h, N, ...)."""
        if len(parts) == 1:
            return parts[0]
        heads = dict(zip((*self.static_heads, *self.dynamic_heads), torch.cat(parts, dim=1).unbind(1), strict=True))
        return torch.stack([heads[head] for head in range(self.num_heads)], dim=1)

    def _attend_together(
        self, query: Tensor, dynamic_key: Tensor, value: Tensor, feat_size: Size2, op: AttendOp, turn: Rotate
    ) -> Tensor:
        """One call for all heads, whose logits are mixed."""
        dynamic = len(self.dynamic_heads)
        key, key_bias, map_bias = (
            None if part is None else part.to(query.dtype) for part in self._static_logits(feat_size, turn)
        )
        assert key is not None
        keys = self._in_order([key.expand(query.shape[0], -1, -1, -1), dynamic_key])
        key_bias, map_bias = (
            None if bias is None else self._in_order([bias[None], bias.new_zeros(1, dynamic, *bias.shape[1:])])[0]
            for bias in (key_bias, map_bias)
        )
        return op(query, keys, value, key_bias=key_bias, map_bias=map_bias)

    def _static_logits(self, feat_size: Size2, turn: Rotate) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Keys (h_s, N, d) and biases (h_s, N), (h_s, N, N) of the static heads on a grid."""
        cells = self._cells(feat_size)

        def rows(tensor: Tensor) -> Tensor:
            return repeat_cells(tensor, cells, feat_size, num_prefix_tokens=self.num_prefix_tokens)

        def resampled(bias: Tensor) -> Tensor:
            return rows(self._resample(bias, self.key_grid, cells))

        key_bias = None if self.key_bias is None else resampled(self.key_bias)
        map_bias: Tensor | None = self.map_bias
        if map_bias is not None:
            map_bias = resampled(resampled(map_bias).transpose(1, 2)).transpose(1, 2)
        return _turn_of(self.static_heads, turn)(rows(self.key_rows(cells))), key_bias, map_bias

    def _call_op(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        heads: Sequence[int] | None = None,
        map_bias: Tensor | None = None,
        attn_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Attend with some of the heads, a bias added to their logits."""
        if (
            attn_mask is not None
            and heads is not None
            and attn_mask.ndim > 2
            and attn_mask.shape[-3] == self.num_heads
        ):
            attn_mask = _pick(attn_mask, heads, -3)
        if map_bias is not None:
            check_static_key_attention(query, key, value, None, None, False, 0, attn_mask, None)
            map_bias = map_bias.to(query.dtype)
            if attn_mask is None:
                attn_mask = map_bias
            elif attn_mask.dtype == torch.bool:
                attn_mask = torch.where(attn_mask, map_bias, float("-inf"))
            else:
                attn_mask = attn_mask + map_bias
        return super()._call_op(query, key, value, attn_mask=attn_mask, **options)

    def _split(self, x: Tensor, heads: int) -> tuple[Tensor, ...]:
        return x.reshape(*x.shape[:2], 1, heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)

    def key_channels(self) -> list[int]:
        """The rows, among those of all heads' keys, that belong to dynamic heads."""
        width = self.head_dim
        return [head * width + channel for head in self.dynamic_heads for channel in range(width)]

    def macs(self, feat_size: Size2 | None = None) -> int:
        """Multiply-accumulates of one image, in closed form; see ``TokenMixer.macs``."""
        tokens = self._count(feat_size)[1]
        return super().macs(feat_size) + self.dim * len(self.dynamic_heads) * self.head_dim * tokens

    def extra_repr(self) -> str:
        """The head of the constructor, and what is not the default, for ``print(module)``."""
        shown = {"dynamic_heads": self.dynamic_heads or None, "bias": self.bias}
        return super().extra_repr() + "".join(f", {name}={v!r}" for name, v in shown.items() if v is not None)


def _pick(x: Tensor, heads: Sequence[int], dim: int = 1) -> Tensor:
    """Some of the heads of a tensor."""
    if len(heads) == x.shape[dim]:
        return x
    parts = x.unbind(dim)
    return torch.stack([parts[head] for head in heads], dim=dim)


def _turn_of(heads: Sequence[int], turn: Rotate) -> Rotate:
    """What turns some of the heads, each of which may have angles of its own."""
    rope = turn.keywords.get("rope") if isinstance(turn, partial) else None
    if rope is None or rope.ndim < 3:
        return turn
    return partial(turn.func, **(turn.keywords | {"rope": _pick(rope, heads, -3)}))  # type: ignore[attr-defined]


def _check_heads(heads: Any, num_heads: int) -> tuple[int, ...]:
    """Indices of heads, ascending.

    Raises:
        StaticKeyError: Not a list of different heads that there are.
    """
    check_positive(num_heads=num_heads)
    if not isinstance(heads, Sequence) or isinstance(heads, str):
        raise StaticKeyError(f"dynamic_heads={heads!r} must be a list of heads, such as [0, 3]")
    for head in heads:
        if not isinstance(head, int) or isinstance(head, bool) or not 0 <= head < num_heads:
            raise StaticKeyError(f"dynamic_heads has {head!r}; the layer has heads 0 to {num_heads - 1}")
    if len({*heads}) != len(heads):
        raise StaticKeyError(f"dynamic_heads={list(heads)} names a head twice")
    return tuple(sorted(heads))
