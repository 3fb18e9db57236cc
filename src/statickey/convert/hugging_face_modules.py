"""What takes the place of attention in models of transformers, and how the grid gets there."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._typing import Size2
from ..errors import StaticKeyError
from ..layers import AttentionMixer, TokenMixer
from .hiera import join_windows, split_windows
from .host import reduce_converted


class StandIn(nn.Module):
    """A mixer that is called as transformers' layers call their attention.

    It is made as an instance of the class it stands in for, too (``converted_class``), by which the library finds
    attention modules.

    Args:
        mixer: The mixer.
        module: The module it stands in for.
    """

    key_names: ClassVar[tuple[str, ...]] = ("k_proj", "key", "qkv")
    """What hosts call the projection that an empty tensor is left of."""

    mixer: TokenMixer

    def __init__(self, mixer: TokenMixer, module: Any) -> None:
        nn.Module.__init__(self)  # not that of the class it stands in for
        self.config = getattr(module, "config", None)
        self.mixer = mixer
        key = next(name for name in self.key_names if hasattr(module, name))
        self.add_module(key, nn.Module())
        self.get_submodule(key).register_buffer("weight", getattr(module, key).weight.detach().new_empty(0))
        self._is_hf_initialized = True  # its parts are; the library would look for the projections that are gone
        for hooks in (
            "_forward_hooks",
            "_forward_hooks_with_kwargs",
            "_forward_pre_hooks",
            "_forward_pre_hooks_with_kwargs",
        ):
            setattr(self, hooks, getattr(module, hooks))  # the library's recorder is put in place once, and not again

    def fill(self) -> None:
        """Fill buffers that no file holds, in a model that was built empty."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        *,
        feat_size: Size2 | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix tokens.

        Args:
            hidden_states: Tokens, (B, N, dim).
            attention_mask: Added to the logits, or true where attention is allowed; broadcasts to (B, h, N, N). Of
                two axes, (B, N), it says which tokens may be attended to.
            feat_size: Their grid, which the tower passes.
            kwargs: What else layers pass; ``output_attentions`` asks for the maps.

        Returns:
            In the shape of ``hidden_states``; the maps (B, h, N, N) where they are asked for, else None.

        Raises:
            StaticKeyError: No grid was passed.
        """
        if feat_size is None:
            raise StaticKeyError(
                "attention was called without the grid of its tokens, which the vision tower reads off its images; "
                "call the tower, or pass feat_size=(H, W)"
            )
        if attention_mask is not None and attention_mask.ndim == 2:  # as it is made for flash attention
            attention_mask = attention_mask[:, None, None].bool()
        return self._mix(hidden_states, feat_size, attention_mask, kwargs)

    def _mix(
        self, x: Tensor, feat_size: Size2, mask: Tensor | None, kwargs: dict[str, Any], **turned: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        out = self.mixer(x, feat_size, attn_mask=mask, **turned)
        wanted = kwargs.get("output_attentions", getattr(self.config, "output_attentions", False))
        if wanted and isinstance(self.mixer, AttentionMixer):
            return out, self.mixer.attention_weights(x, feat_size, attn_mask=mask, **turned)
        return out, None

    def __reduce__(self) -> tuple[Any, ...]:
        return reduce_converted(self)


class RotaryStandIn(StandIn):
    """A stand-in that is given the cosines and sines of a rotary position embedding."""

    def _mix(
        self, x: Tensor, feat_size: Size2, mask: Tensor | None, kwargs: dict[str, Any], **turned: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        cosines, sines = kwargs["position_embeddings"]
        return super()._mix(x, feat_size, mask, kwargs, rope=torch.cat([sines, cosines], dim=-1))


class AddedStandIn(StandIn):
    """A stand-in that is given a position embedding, which queries and keys see and values do not."""

    def _mix(
        self, x: Tensor, feat_size: Size2, mask: Tensor | None, kwargs: dict[str, Any], **turned: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        return super()._mix(x, feat_size, mask, kwargs, pos_embed=kwargs.get("position_embeddings"))


class MarkedStandIn(AddedStandIn):
    """The same where the grid is noted on the embedding, and nothing else passed."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        object_queries: Tensor | None = None,
        output_attentions: bool | None = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix tokens; ``object_queries`` is the position embedding; see ``StandIn``."""
        return super().forward(
            hidden_states,
            attention_mask,
            feat_size=getattr(object_queries, "feat_size", None),
            position_embeddings=object_queries,
            output_attentions=output_attentions,
        )


class MapStandIn(StandIn):
    """A stand-in that is told height and width by its layer."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, height: int, width: int, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Mix tokens on a grid (height, width); see ``StandIn``."""
        return self._mix(hidden_states, (height, width), attention_mask, kwargs)


class WindowStandIn(StandIn):
    """A stand-in in a layer that sees windows of the image as if they were images."""

    def _mix(
        self, x: Tensor, feat_size: Size2, mask: Tensor | None, kwargs: dict[str, Any], **turned: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        side = windows_per_side(self.config)
        return super()._mix(x, (feat_size[0] // side, feat_size[1] // side), mask, kwargs)


class JoinedStandIn(StandIn):
    """A stand-in in a layer that joins the windows of an image, one after another, each behind its prefix tokens."""

    def _mix(
        self, x: Tensor, feat_size: Size2, mask: Tensor | None, kwargs: dict[str, Any], **turned: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        side = windows_per_side(self.config)
        window = (feat_size[0] // side, feat_size[1] // side)
        places = torch.arange(x.shape[1], device=x.device).reshape(side * side, -1)
        num_prefix = places.shape[1] - window[0] * window[1]
        rows = places[:, num_prefix:].reshape(side, side, *window).transpose(1, 2)
        order = torch.cat([places[:, :num_prefix].flatten(), rows.flatten()])  # prefix first, the grid row by row
        return _in_order(*super()._mix(x[:, order], feat_size, mask, kwargs), order.argsort())


class SuffixStandIn(StandIn):
    """A stand-in among tokens of which one comes before the grid, and others behind it."""

    def _mix(
        self, x: Tensor, feat_size: Size2, mask: Tensor | None, kwargs: dict[str, Any], **turned: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        last = x.shape[1] - (self.mixer.num_prefix_tokens - 1)
        places = torch.arange(x.shape[1], device=x.device)
        order = torch.cat([places[:1], places[last:], places[1:last]])
        return _in_order(*super()._mix(x[:, order], feat_size, mask, kwargs), order.argsort())


def _in_order(out: Tensor, weights: Tensor | None, back: Tensor) -> tuple[Tensor, Tensor | None]:
    """Tokens, and their maps, in the host's order again."""
    return out[:, back], None if weights is None else weights[:, :, back][..., back]


class VariableGridStandIn(StandIn):
    """A stand-in where each image of a batch has a grid of its own, padded to the longest."""

    def _mix(
        self, x: Tensor, feat_size: Any, mask: Tensor | None, kwargs: dict[str, Any], **turned: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(feat_size[0], int):
            return super()._mix(x, feat_size, mask, kwargs)
        out, maps = torch.zeros_like(x), None
        for grid in dict.fromkeys(feat_size):
            rows, count = [index for index, other in enumerate(feat_size) if other == grid], grid[0] * grid[1]
            mixed, weights = super()._mix(x[rows, :count], grid, None, kwargs)
            padding = x.shape[1] - count
            out[rows] = nn.functional.pad(mixed, (0, 0, 0, padding))
            if weights is not None:
                maps = x.new_zeros(len(x), weights.shape[1], x.shape[1], x.shape[1]) if maps is None else maps
                maps[rows] = nn.functional.pad(weights, (0, padding, 0, padding))
        return out, maps


class SwinStandIn(StandIn):
    """A stand-in in windows, which keeps the host's position bias."""

    def __init__(self, mixer: TokenMixer, module: Any) -> None:
        super().__init__(mixer, module)
        self.relative_position_bias = module.relative_position_bias

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Mix the tokens of every window; see ``StandIn``.

        Args:
            hidden_states: Windows, (B * windows, N, dim).
            attention_mask: What the cyclic shift forbids, (windows, N, N), added to the logits.
            kwargs: As in ``StandIn``.
        """
        bias = self._bias()
        if attention_mask is not None:
            repeats = hidden_states.shape[0] // attention_mask.shape[0]
            bias = (bias + attention_mask.unsqueeze(1)).repeat(repeats, 1, 1, 1)
        return self._mix(hidden_states, self.mixer.feat_size, bias, kwargs)

    def _bias(self) -> Tensor:
        return self.relative_position_bias()  # type: ignore[no-any-return]


class SwinV2StandIn(SwinStandIn):
    """A stand-in in windows, which keeps the host's function of relative position."""

    relative_coords_table: Tensor
    relative_position_index: Tensor

    def __init__(self, mixer: TokenMixer, module: Any) -> None:
        StandIn.__init__(self, mixer, module)
        self.window_size = module.window_size
        self.pretrained_window_size = module.pretrained_window_size
        self.continuous_position_bias_mlp = module.continuous_position_bias_mlp
        self.register_buffer("relative_coords_table", module.relative_coords_table, persistent=False)
        self.register_buffer("relative_position_index", module.relative_position_index, persistent=False)

    def fill(self) -> None:
        """Make the table of places again."""
        made = self.create_coords_table_and_index()  # type: ignore[operator]
        for name, table in zip(("relative_coords_table", "relative_position_index"), made, strict=True):
            setattr(self, name, table.to(getattr(self, name).device))

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool | None = False
    ) -> tuple[Tensor, Tensor | None]:
        """Mix the tokens of every window; see ``SwinStandIn``."""
        return super().forward(hidden_states, attention_mask, output_attentions=output_attentions)

    def _bias(self) -> Tensor:
        table = self.continuous_position_bias_mlp(self.relative_coords_table).flatten(0, -2)
        return 16 * table[self.relative_position_index].permute(2, 0, 1).sigmoid()[None]  # type: ignore[no-any-return]


class UnrolledStandIn(StandIn):
    """A stand-in among tokens in Hiera's order.

    Args:
        mixer: The mixer.
        module: The module it stands in for.
        num_windows: As in ``UnrolledMixer``.
        order: Likewise.
        back: Likewise.
    """

    order: Tensor
    back: Tensor

    def __init__(self, mixer: TokenMixer, module: Any, num_windows: int, order: Tensor, back: Tensor) -> None:
        super().__init__(mixer, module)
        self.num_windows = num_windows
        self.register_buffer("order", order)
        self.register_buffer("back", back)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, output_attentions: bool | None = False
    ) -> tuple[Tensor, Tensor | None]:
        """Mix the tokens of every mask unit, or all; maps are (B, h, windows, queries, N), as the host's."""
        windows = split_windows(hidden_states, self.num_windows)
        kwargs = {"output_attentions": output_attentions}
        out, weights = self._mix(windows[:, self.order], self.mixer.feat_size, None, kwargs)
        if weights is not None:
            weights = weights[:, :, self.back][..., self.order.argsort()]
            weights = weights.reshape(-1, self.num_windows, *weights.shape[1:]).transpose(1, 2)
        return join_windows(out[:, self.back], self.num_windows), weights


def windows_per_side(config: Any) -> int:
    """Into how many windows each side of an image is split."""
    return int(getattr(config, "num_windows_side", config.num_windows))
