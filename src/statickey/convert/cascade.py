"""The rule for EfficientViT (MSRA): heads in a row, each of which also sees what the one before it made."""

from dataclasses import dataclass
from typing import Any

import torch
from timm.models.efficientvit_msra import (
    CascadedGroupAttention,
    ConvNorm,
    EfficientVitMsra,
    LocalWindowAttention,
)
from torch import Tensor, nn

from .._typing import Size2
from .host import Site
from .offsets import OffsetBias
from .places import FollowingHost, MapMixer, Place, biased, register_placed_rule


@dataclass(frozen=True, kw_only=True)
class HeadPlace(Place):
    """A head, and the attention it belongs to."""

    attn: Any
    index: int


class MapQuery(nn.Module):
    """A convolution of a head's queries, which sees them as a map.

    Args:
        conv: From (B, d, H, W) to the same.
        feat_size: The grid (H, W).
    """

    def __init__(self, conv: nn.Module, feat_size: Size2) -> None:
        super().__init__()
        self.conv = conv
        self.feat_size = feat_size

    def forward(self, query: Tensor) -> Tensor:
        """(B, 1, H*W, d) to the same."""
        maps = query.squeeze(1).transpose(1, 2)
        maps = maps.reshape(*maps.shape[:2], *self.feat_size)
        return self.conv(maps).flatten(2).transpose(1, 2).unsqueeze(1)  # type: ignore[no-any-return]


class HeadMixer(MapMixer):
    """A mixer of one head."""

    def set_window_size(self, window_size: Size2) -> None:
        """Rebuild key, bias and the queries' map for another grid."""
        super().set_window_size(window_size)
        self.mixer.q_norm.feat_size = window_size  # type: ignore[union-attr]


class MixerCascade(CascadedGroupAttention):  # type: ignore[misc]
    """The host's attention, some of whose heads are mixers."""

    def set_resolution(self, resolution: int) -> None:
        """Rebuild the bias of the heads that are left for another window; mixers follow by themselves."""
        if self.attention_biases is None:
            self.resolution = resolution
        else:
            super().set_resolution(resolution)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same."""
        feat, outs = torch.zeros(()), []
        for index, (part, head) in enumerate(zip(x.chunk(len(self.qkvs), dim=1), self.qkvs, strict=True)):
            feat = part if index == 0 else feat + part
            feat = head(feat) if isinstance(head, HeadMixer) else self._attend(index, feat)
            outs.append(feat)
        return self.proj(torch.cat(outs, 1))  # type: ignore[no-any-return]

    def _attend(self, index: int, feat: Tensor) -> Tensor:
        """A head of the host's."""
        widths = [self.key_dim, self.key_dim, self.val_dim]
        query, key, value = self.qkvs[index](feat).split(widths, dim=1)
        query, key, value = (part.flatten(2) for part in (self.dws[index](query) * self.scale, key, value))
        logits = query.transpose(-2, -1) @ key + self.get_attention_biases(feat.device)[index]
        out: Tensor = value @ logits.softmax(dim=-1).transpose(-2, -1)
        return out.reshape(*out.shape[:2], *feat.shape[2:])


def cascade_places(model: EfficientVitMsra) -> dict[str, Place]:
    """Every head of every window."""
    places: dict[str, Place] = {}
    for name, module in model.named_modules():
        if isinstance(module, LocalWindowAttention):
            size = module.attn.resolution
            windows = (-(-module.resolution // size)) ** 2
            for index, head in enumerate(module.attn.qkvs):
                places[f"{name}.attn.qkvs.{index}"] = HeadPlace(
                    module=head, feat_size=(size, size), windows=windows, attn=module.attn, index=index
                )
    return places


def _read(head: Any, place: Any) -> Site:
    attn, index = place.attn, place.index
    bias = OffsetBias(attn.attention_biases[index : index + 1], place.feat_size)
    return Site.of(
        head,
        num_heads=1,
        input_fmt="NCHW",
        value_dim=attn.val_dim,
        qkv_weight=head.conv.weight,
        qkv_norm=head.bn,
        with_proj=False,
        q_norm=MapQuery(attn.dws[index], place.feat_size),
        **biased(HeadMixer, bias),
        **place.tokens,
    )


def run_in_a_row(model: EfficientVitMsra) -> None:
    """Let the host's attention run mixers, and drop what they have taken over."""
    for module in model.modules():
        if isinstance(module, CascadedGroupAttention):
            taken = [isinstance(head, HeadMixer) for head in module.qkvs]
            if any(taken):
                module.__class__ = MixerCascade
            for index, head in enumerate(taken):
                if head:
                    module.dws[index] = nn.Identity()
            if all(taken):
                module.attention_biases = None


register_placed_rule(EfficientVitMsra, cascade_places, {ConvNorm: _read}, FollowingHost, run_in_a_row)
