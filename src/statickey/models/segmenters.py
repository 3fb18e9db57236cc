"""Semantic segmentation networks: a pyramid of any network, with a decoder of segmentation-models-pytorch."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_name, check_positive
from .._typing import OffGrid
from .pyramid import Pyramid, build_pyramid
from .swaps import Swap

_RGB = 3


class Segmenter(nn.Module):
    """Images (B, C, H, W), of any size, to logits of each pixel's class, (B, num_classes, H, W).

    No norm spans a batch: BatchNorm of the decoder is replaced by GroupNorm, so that one image at a time trains, and
    several processes train as one.

    Attributes: ``pyramid``, ``decoder``, ``head``, ``window``.

    Args:
        pyramid: The backbone.
        decoder: The name of one, of ``DECODERS``.
        num_classes: Classes.
        channels: Width of the decoder.
        window: Side of the windows in pixels that ``segment`` uses; None for whole images.
    """

    def __init__(
        self, pyramid: Pyramid, decoder: str, *, num_classes: int, channels: int = 256, window: int | None = None
    ) -> None:
        super().__init__()
        check_name("decoder", decoder, DECODERS)
        check_positive(num_classes=num_classes, decoder_channels=channels)
        if window is not None:
            check_positive(window=window)
        self.pyramid = pyramid
        # what the decoders know are the image itself, a map at stride 2, which there is none of, and ours
        made, width = DECODERS[decoder]([_RGB, 0, *pyramid.channels], channels)
        self.decoder = without_batch_norms(made)
        self.head = nn.Conv2d(width, num_classes, 1)
        self.window = window

    def forward(self, x: Tensor) -> Tensor:
        """Logits of all pixels."""
        maps = _doubling(self.pyramid(x))
        half = x.new_empty(x.shape[0], 0, 2 * maps[0].shape[-2], 2 * maps[0].shape[-1])
        logits = self.head(self.decoder([x, half, *maps]))
        return F.interpolate(logits, x.shape[-2:], mode="bilinear")

    def segment(self, image: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        """The class of every pixel of one image, seen whole or in windows.

        Args:
            image: (C, H, W), normalised.
            size: (H', W') of the result, to which logits are resized; default that of the image.

        Returns:
            (H', W') in int64.
        """
        logits = in_windows(self, image, self.window)
        if size is not None and logits.shape[-2:] != size:
            logits = F.interpolate(logits.unsqueeze(0), size, mode="bilinear")[0]
        return logits.argmax(0)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must leave alone."""
        return {f"pyramid.{name}" for name in self.pyramid.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """For timm's layer decay: the layers of the backbone, then all that stands on it."""
        layers = {f"pyramid.{name}": layer for name, layer in self.pyramid.layers(coarse=coarse).items()}
        return lambda name: layers.get(name, math.inf)


def in_windows(model: nn.Module, image: Tensor, window: int | None) -> Tensor:
    """Logits of one image, at once or window by window.

    Args:
        model: From images to logits of their size, in evaluation mode.
        image: (C, H, W), normalised.
        window: Side of windows in pixels, which overlap by at least a third and whose logits are averaged; None for
            the whole image at once.

    Returns:
        (num_classes, H, W) in float32.
    """
    height, width = image.shape[-2:]
    if window is None or (height <= window and width <= window):
        return model(image.unsqueeze(0))[0].float()  # type: ignore[no-any-return]
    tops, lefts = (_starts(extent, window) for extent in (height, width))
    total: Tensor | None = None
    count = image.new_zeros(height, width, dtype=torch.float32)
    for top in tops:
        for left in lefts:
            place = (slice(top, top + window), slice(left, left + window))
            logits = model(image[:, *place].unsqueeze(0))[0].float()
            total = logits.new_zeros(len(logits), height, width) if total is None else total
            total[:, *place] += logits
            count[place] += 1
    assert total is not None
    return total / count


def build_segmenter(
    name: str,
    mixer: str | Swap | None,
    *,
    img_size: int,
    num_classes: int,
    decoder: str = "upernet",
    decoder_channels: int = 256,
    window: int | None = None,
    seed: int = 0,
    model_args: Mapping[str, Any] | None = None,
    fp32_logits: bool = False,
    off_grid: OffGrid = "pool",
) -> Segmenter:
    """A segmentation network on any backbone that ``build_model`` builds.

    Args:
        name: As in ``build_model``.
        mixer: As in ``build_model``.
        img_size: Side of the images in pixels that keys are built for; it takes any.
        num_classes: Classes.
        decoder: ``"upernet"``, ``"fpn"``, ``"unet"`` or ``"segformer"``.
        decoder_channels: Width of the decoder.
        window: Side of the windows in pixels that images are segmented in; default whole images.
        seed: All weights that mixers share are bit-identical at one seed.
        model_args: As in ``build_model``.
        fp32_logits: As in ``build_model``.
        off_grid: As in ``build_pyramid``.

    Raises:
        StaticKeyError: As ``build_model``, or the network has no pyramid.
    """
    pyramid = build_pyramid(
        name,
        mixer,
        img_size=img_size,
        seed=seed,
        model_args=model_args,
        fp32_logits=fp32_logits,
        off_grid=off_grid,
    )
    return Segmenter(pyramid, decoder, num_classes=num_classes, channels=decoder_channels, window=window)


def _starts(extent: int, window: int) -> list[int]:
    """Where windows begin along one axis, evenly spread, at most two thirds of a window apart."""
    if extent <= window:
        return [0]
    steps = math.ceil((extent - window) / (window * 2 / 3))
    return [round(i * (extent - window) / steps) for i in range(steps + 1)]


def _doubling(maps: list[Tensor]) -> list[Tensor]:
    """Maps whose sides double from one to the next finer one, as decoders want them; most do as they are."""
    height, width = maps[-1].shape[-2:]
    sizes = [(height * 2**i, width * 2**i) for i in reversed(range(len(maps)))]
    return [
        each if tuple(each.shape[-2:]) == size else F.interpolate(each, size, mode="bilinear")
        for each, size in zip(maps, sizes, strict=True)
    ]


def without_batch_norms(module: nn.Module) -> nn.Module:
    """The module with every BatchNorm replaced by a GroupNorm, in place."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            width = child.num_features
            groups = next(n for n in range(max(width // 8, 1), 0, -1) if width % n == 0)
            setattr(module, name, nn.GroupNorm(groups, width))
        else:
            without_batch_norms(child)
    return module


def _upernet(encoder: list[int], channels: int) -> tuple[nn.Module, int]:
    from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder

    return UPerNetDecoder(encoder, decoder_channels=channels), channels


def _fpn(encoder: list[int], channels: int) -> tuple[nn.Module, int]:
    from segmentation_models_pytorch.decoders.fpn.decoder import FPNDecoder

    own = max(channels // 2, 64)  # its norms have 32 groups, and a map may be one cell
    return FPNDecoder(encoder, pyramid_channels=channels, segmentation_channels=own), own


def _unet(encoder: list[int], channels: int) -> tuple[nn.Module, int]:
    from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder

    widths = [max(channels // 2**i, 8) for i in range(5)]
    return UnetDecoder(encoder, widths), widths[-1]


def _segformer(encoder: list[int], channels: int) -> tuple[nn.Module, int]:
    from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder

    return SegformerDecoder(encoder, segmentation_channels=channels), channels


DECODERS: dict[str, Callable[[list[int], int], tuple[nn.Module, int]]] = {
    "upernet": _upernet,
    "fpn": _fpn,
    "unet": _unet,
    "segformer": _segformer,
}
"""Decoders by name: from the channels of the image and its maps, and a width, to a module and its channels."""
