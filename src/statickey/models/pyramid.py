"""A network without its head, as a pyramid of feature maps: what detectors and segmenters stand on."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models import group_parameters
from torch import Tensor, nn

from .._checks import check_count, check_mapping
from .._typing import OffGrid
from ..convert import token_mixers
from ..errors import StaticKeyError
from ..layers import StaticKeyAttention
from .build import build_model
from .swaps import Swap

STRIDES = (4, 8, 16, 32)
"""Pixels of the image per cell of each map."""
_ANY_SIZE: tuple[dict[str, Any], ...] = (
    {"dynamic_img_size": True, "dynamic_img_pad": True},
    {"strict_img_size": False},
    {},
)
"""What lets timm's networks take any image: vision transformers, Swin, and those that do as they are."""


_WRONG_SIZE = (AssertionError, RuntimeError, IndexError, ValueError)
"""What timm's networks for one size of image end in on another."""


class Pyramid(nn.Module):
    """Images (B, C, H, W), of any size, to feature maps at strides 4, 8, 16 and 32, or some of these.

    A network of four stages gives its own maps. One whose maps all have the same stride, such as a plain vision
    transformer, gives its last, from which transposed convolutions and pooling make them.

    Attributes: ``body``, the network, whose weights have the names they have in a classifier; ``channels``, of each
    map.

    Args:
        body: A network with timm's ``feature_info`` and ``forward_intermediates``; it loses its head.
        strides: Those wanted, of ``STRIDES``, finest first.

    Raises:
        StaticKeyError: It gives neither four maps at these strides nor one at a single stride.

    Source:
        Li et al., Exploring Plain Vision Transformer Backbones for Object Detection, arXiv 2203.16527.
    """

    def __init__(self, body: nn.Module, strides: Sequence[int] = STRIDES) -> None:
        super().__init__()
        host: Any = body
        self.strides = tuple(strides)
        infos = list(getattr(host, "feature_info", ()))
        found = [info["reduction"] for info in infos]
        self.necks: nn.ModuleList | None = None
        if set(STRIDES) <= set(found):
            self._indices = [found.index(stride) for stride in self.strides]
            self.channels = tuple(infos[index]["num_chs"] for index in self._indices)
        elif len(set(found)) == 1:
            self._indices = [len(infos) - 1]
            width = infos[-1]["num_chs"]
            necks = [_neck(width, found[0], stride) for stride in self.strides]
            self.channels = tuple(channels for _, channels in necks)
            self.necks = nn.ModuleList(neck for neck, _ in necks)
        else:
            raise StaticKeyError(
                f"{type(body).__name__} has maps at strides {found or 'unknown'}; a detector or segmenter needs "
                f"{', '.join(map(str, STRIDES))}, or a vision transformer's single one"
            )
        args = dict(getattr(host, "_model_args", {}))
        self._indices = host.prune_intermediate_layers(self._indices, prune_norm=self.necks is None, prune_head=True)
        host._model_args = args  # timm notes the lost norm there, but with it another network would be built
        self.body = body

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (B, channels[i], about H / stride, about W / stride), finest first.

        Raises:
            StaticKeyError: The network takes images of one size alone, and these have another.
        """
        x = self._padded(x)
        maps = self._maps(x)
        if self.necks is None:
            return maps
        made = [neck(maps[-1]) for neck in self.necks]
        sizes = [tuple(-(-extent // stride) for extent in x.shape[-2:]) for stride in self.strides]
        return [
            each if each.shape[-2:] == size else F.interpolate(each, size, mode="bilinear")
            for each, size in zip(made, sizes, strict=True)
        ]

    def _maps(self, x: Tensor) -> list[Tensor]:
        host: Any = self.body
        try:
            return host.forward_intermediates(  # type: ignore[no-any-return]
                x, indices=self._indices, norm=self.necks is not None, intermediates_only=True
            )
        except _WRONG_SIZE as error:
            built: Any = getattr(host, "pretrained_cfg", {}).get("input_size")
            if built is None or tuple(x.shape[-2:]) == tuple(built[-2:]) or isinstance(error, torch.OutOfMemoryError):
                raise
            raise StaticKeyError(
                f"{type(host).__name__}, built for images of {built[-2]} x {built[-1]} pixels, broke on one of "
                f"{x.shape[-2]} x {x.shape[-1]} ({str(error).splitlines()[0]}); detection and segmentation need a "
                "network for images of any size, such as skaformer_*, caformer_*, swin_* or vit_*"
            ) from error

    def _padded(self, x: Tensor) -> Tensor:
        """Whole patches, zeros to the right and below, for a body that does not pad them itself, such as Swin."""
        embed: Any = getattr(self.body, "patch_embed", None)
        if getattr(embed, "dynamic_img_pad", True):
            return x
        height, width = (-extent % side for extent, side in zip(x.shape[-2:], embed.patch_size, strict=True))
        return F.pad(x, (0, width, 0, height)) if height or width else x

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must leave alone."""
        own = getattr(self.body, "no_weight_decay", set)
        return {f"body.{name}" for name in own()}

    def layers(self, *, coarse: bool = False) -> dict[str, int]:
        """The layer of each of the body's parameters by name, 0 next to the image, as timm groups them.

        Args:
            coarse: Whole stages, or a vision transformer's blocks, rather than layers.

        Raises:
            StaticKeyError: The network says nothing of its layers.
        """
        host: Any = self.body
        if not hasattr(host, "group_matcher"):
            raise StaticKeyError(
                f"{type(host).__name__} does not say which layer its weights are of, which frozen_stages and "
                "layer_decay need; leave them out, or take one of statickey's models"
            )
        groups = group_parameters(host, host.group_matcher(coarse=coarse), reverse=True)
        return {f"body.{name}": layer for name, layer in groups.items()}

    def freeze(self, stages: int) -> None:
        """Train neither the stem nor the first stages, or of a vision transformer the first blocks.

        Args:
            stages: How many; 0 freezes nothing.

        Raises:
            StaticKeyError: There are not so many.
        """
        check_count(frozen_stages=stages)
        if stages == 0:
            return
        layers = self.layers(coarse=True)
        most = max(layers.values())
        if stages > most:
            raise StaticKeyError(f"frozen_stages={stages}, but {type(self.body).__name__} has {most}")
        for name, parameter in self.named_parameters():
            if name in layers and layers[name] <= stages:
                parameter.requires_grad_(False)


def build_pyramid(
    name: str,
    mixer: str | Swap | None,
    *,
    img_size: int,
    seed: int = 0,
    model_args: Mapping[str, Any] | None = None,
    fp32_logits: bool = False,
    off_grid: OffGrid = "pool",
    strides: Sequence[int] = STRIDES,
) -> Pyramid:
    """The network that ``build_model`` builds, without its head.

    Args:
        name: As in ``build_model``.
        mixer: As in ``build_model``.
        img_size: Side of the images in pixels that keys and position embeddings are built for; it takes any.
        seed: As in ``build_model``; the body's weights are those of the classifier of one class at this seed.
        model_args: As in ``build_model``.
        fp32_logits: As in ``build_model``.
        off_grid: What static keys do on another grid than that of ``img_size``, where neither ``mixer`` nor
            ``model_args`` say; see ``StaticKeyAttention``. ``"resample"`` costs the square of the image's pixels.
        strides: As in ``Pyramid``.

    Raises:
        StaticKeyError: As ``build_model``, or the network has no pyramid.
    """
    args = check_mapping("model_args", model_args)
    common: dict[str, Any] = {"img_size": img_size, "num_classes": 1, "seed": seed, "fp32_logits": fp32_logits}
    body = _for_any_size(name, mixer, args, common)
    for layer in token_mixers(body).values() if not _names_off_grid(mixer, args) else ():
        if isinstance(layer, StaticKeyAttention) and layer.key_size is None and layer.off_grid == "resample":
            layer.set_off_grid(off_grid)
    return Pyramid(body, strides)


def _for_any_size(
    name: str, mixer: str | Swap | None, args: Mapping[str, Any], common: Mapping[str, Any]
) -> nn.Module:
    for any_size in _ANY_SIZE:
        try:
            return build_model(name, mixer, model_args={**any_size, **args}, **common)
        except StaticKeyError as error:
            if not any(repr(arg) in str(error.__cause__) for arg in any_size):
                raise
    raise AssertionError("the last way adds no argument")


def _names_off_grid(mixer: str | Swap | None, model_args: Mapping[str, Any]) -> bool:
    by_mixer = check_mapping("mixer_args", model_args.get("mixer_args"))
    given = [model_args, by_mixer, *(own for own in by_mixer.values() if isinstance(own, Mapping))]
    if mixer is not None:
        given.append(Swap.parse(mixer).mixer_args)
    return any("off_grid" in args for args in given)


def _neck(width: int, stride: int, wanted: int) -> tuple[nn.Module, int]:
    """What brings a map from one stride to another, and the channels it makes."""
    layers: list[nn.Module] = []
    while stride > wanted and stride % 2 == 0:
        layers += [LayerNorm2d(width), nn.GELU()] if layers else []
        layers.append(nn.ConvTranspose2d(width, width // 2, 2, 2))
        width, stride = width // 2, stride // 2
    if wanted // stride > 1:
        layers.append(nn.MaxPool2d(wanted // stride, ceil_mode=True))  # of the smallest image one cell is left
    return nn.Sequential(*layers), width
