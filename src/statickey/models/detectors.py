"""Detectors on any network: of two stages, Faster, Mask and Cascade R-CNN, and by queries."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from .._checks import check_choice, check_positive
from .._typing import OffGrid
from ..errors import StaticKeyError
from .cascade import CascadeHeads
from .pyramid import STRIDES, Pyramid, build_pyramid
from .query_detector import QUERY_STRIDES, QueryDetector
from .region_heads import (
    BoxPredictor,
    MaskBranch,
    ProposalNetwork,
    RegionHeads,
    SeededSampler,
    in_float32,
    region_pool,
)
from .swaps import Swap

ARCHS = ("faster_rcnn", "mask_rcnn", "cascade_rcnn", "cascade_mask_rcnn", "rt_detr_v2")
_REGION = 7
_ANCHORS_PER_IMAGE = 256
_ASPECT_RATIOS = (0.5, 1.0, 2.0)


class FeaturePyramid(nn.Module):
    """Images to five maps of equal width at strides 4 to 64, in float32.

    Args:
        pyramid: Makes the first four.
        channels: Width of all.
    """

    def __init__(self, pyramid: Pyramid, channels: int) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.fpn = FeaturePyramidNetwork(list(pyramid.channels), channels, extra_blocks=LastLevelMaxPool())

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Images (B, C, H, W) to maps ``"0"`` to ``"3"`` and ``"pool"``, finest first."""
        maps = self.fpn(dict(zip("0123", self.pyramid(x), strict=True)))
        return {name: in_float32(each) for name, each in maps.items()}


class Detector(GeneralizedRCNN):  # type: ignore[misc]
    """A detector of two stages: images, of any sizes, to losses in training, and to detections in evaluation.

    Images come normalised. In training they are taken as large as they come; in evaluation they are brought to
    ``min_size`` and ``max_size``, and boxes and masks back to the image's own size.

    No layer mixes images, and each loss is the mean over the images of an image's own, so a batch may be divided:
    among processes always, into parts where its images have one size. Smaller ones are padded to the largest of a
    part, over all processes, and attention sees the padding.

    The boxes sampled for the losses are drawn from each target's ``seed``, and from nothing else.

    Args:
        pyramid: The network.
        num_classes: Classes of objects, the background not counted.
        arch: One of ``ARCHS`` that ends in ``rcnn``.
        channels: Width of the feature maps; of the vectors of regions four times that.
        anchor_size: Side in pixels of the anchors at stride 4; from map to map it doubles.
        regions_per_image: Proposed regions of an image that the heads learn from.
        min_size: Shorter side in pixels in evaluation; None takes images as they come.
        max_size: Longer side at most.
    """

    def __init__(
        self,
        pyramid: Pyramid,
        num_classes: int,
        *,
        arch: str,
        channels: int,
        anchor_size: int,
        regions_per_image: int,
        min_size: int | None,
        max_size: int,
    ) -> None:
        sizes = [anchor_size * 2**level for level in range(len(STRIDES) + 1)]
        super().__init__(
            FeaturePyramid(pyramid, channels),
            ProposalNetwork(
                AnchorGenerator(tuple((size,) for size in sizes), (_ASPECT_RATIOS,) * len(sizes)),
                _ProposalHead(channels, len(_ASPECT_RATIOS)),
                fg_iou_thresh=0.7,
                bg_iou_thresh=0.3,
                batch_size_per_image=_ANCHORS_PER_IMAGE,
                positive_fraction=0.5,
                pre_nms_top_n={"training": 2000, "testing": 1000},
                post_nms_top_n={"training": 2000, "testing": 1000},
                nms_thresh=0.7,
            ),
            _heads(arch, channels, num_classes + 1, anchor_size, regions_per_image),
            _Preparation(min_size, max_size),
        )
        self.rpn.fg_bg_sampler = SeededSampler(_ANCHORS_PER_IMAGE, 0.5)

    def forward(self, images: Sequence[Tensor] | Tensor, targets: Sequence[Mapping[str, Any]] | None = None) -> Any:
        """Losses by name, in training; in evaluation a dict of each image.

        Args:
            images: Normalised, each (C, H, W).
            targets: Of each image ``boxes`` (n, 4), corners in pixels; ``labels`` (n,) from 0; ``masks``, its
                ``MaskWindows``, where masks are learned; and a ``seed``, without which torch's global state decides.

        Returns:
            The losses, or of each image ``boxes`` (m, 4), ``labels`` (m,), ``scores`` (m,), best first, and
            ``masks`` (m, H, W) in bool.
        """
        own = None
        if targets is not None:
            own = [dict(target) | {"labels": target["labels"] + 1} for target in targets]  # 0 is the background
            seeds = [int(target["seed"]) for target in own if "seed" in target]
            for sampler in (self.rpn.fg_bg_sampler, self.roi_heads.fg_bg_sampler):
                sampler.seeds = seeds if len(seeds) == len(own) else None
        said = super().forward(list(images), own)
        if not self.training:
            for found in said:
                found["labels"] = found["labels"] - 1
        return said

    @property
    def pyramid(self) -> Pyramid:
        """The feature maps of the network it stands on."""
        return self.backbone.pyramid  # type: ignore[no-any-return]

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must leave alone."""
        return {f"backbone.pyramid.{name}" for name in self.backbone.pyramid.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], float]:
        """The layer of a parameter by its name, as timm's layer decay asks; all heads are above the body."""
        layers = {f"backbone.pyramid.{name}": k for name, k in self.backbone.pyramid.layers(coarse=coarse).items()}
        return lambda name: layers.get(name, float("inf"))


def build_detector(
    name: str,
    mixer: str | Swap | None,
    *,
    arch: str = "faster_rcnn",
    img_size: int,
    num_classes: int,
    seed: int = 0,
    model_args: Mapping[str, Any] | None = None,
    fp32_logits: bool = False,
    off_grid: OffGrid = "pool",
    channels: int = 256,
    anchor_size: int = 32,
    regions_per_image: int = 512,
    min_size: int | None = 800,
    max_size: int = 1333,
) -> Detector | QueryDetector:
    """Build a detector on the network that ``build_model`` builds.

    Args:
        name: As in ``build_model``.
        mixer: As in ``build_model``.
        arch: ``faster_rcnn``, ``mask_rcnn``, ``cascade_rcnn``, ``cascade_mask_rcnn`` or ``rt_detr_v2``.
        img_size: Side of the images in pixels that keys and position embeddings are built for; it takes any.
        num_classes: Classes of objects.
        seed: As in ``build_model``; the body's weights are those of a classifier of one class at this seed.
        model_args: As in ``build_model``.
        fp32_logits: As in ``build_model``.
        off_grid: As in ``build_pyramid``.
        channels: Width of the feature maps; fewer for small networks.
        anchor_size: Side in pixels of the smallest anchors, about that of the smallest objects; of two stages.
        regions_per_image: Proposed regions of an image that the heads learn from; few do for few objects; of two
            stages.
        min_size: Shorter side that images are brought to in evaluation; None takes them as they come. Of
            ``rt_detr_v2`` both sides, always; None stands for ``img_size``.
        max_size: Longer side at most; of two stages.

    Returns:
        The detector; the heads are built after the body, the same for every mixer.

    Raises:
        StaticKeyError: As ``build_pyramid``, or an argument is out of range.

    Source:
        Ren et al., arXiv 1506.01497; He et al., arXiv 1703.06870; Cai & Vasconcelos, arXiv 1712.00726; Lv et al.,
        arXiv 2407.17140.
    """
    check_choice(arch=(arch, ARCHS))
    sizes = {"channels": channels, "anchor_size": anchor_size, "max_size": max_size}
    check_positive(num_classes=num_classes, regions_per_image=regions_per_image, **sizes)
    if min_size is not None:
        check_positive(min_size=min_size)
        if min_size > max_size:
            raise StaticKeyError(f"min_size={min_size} must not exceed max_size={max_size}")
    common: dict[str, Any] = {
        "img_size": img_size,
        "seed": seed,
        "model_args": model_args,
        "fp32_logits": fp32_logits,
        "off_grid": off_grid,
    }
    if arch == "rt_detr_v2":
        pyramid = build_pyramid(name, mixer, strides=QUERY_STRIDES, **common)
        side = img_size if min_size is None else min_size
        return QueryDetector(pyramid, num_classes, channels=channels, side=side)
    pyramid = build_pyramid(name, mixer, **common)
    return Detector(
        pyramid,
        num_classes,
        arch=arch,
        channels=channels,
        anchor_size=anchor_size,
        regions_per_image=regions_per_image,
        min_size=min_size,
        max_size=max_size,
    )


class _ProposalHead(RPNHead):  # type: ignore[misc]
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, offsets = super().forward(x)
        return [in_float32(each) for each in logits], [in_float32(each) for each in offsets]


class _Preparation(GeneralizedRCNNTransform):  # type: ignore[misc]
    """Resizing, in evaluation, and padding to one size, in training that of all processes; no normalisation."""

    def __init__(self, min_size: int | None, max_size: int) -> None:
        super().__init__(max_size if min_size is None else min_size, max_size, [], [])
        self._as_they_come = min_size is None

    def normalize(self, image: Tensor) -> Tensor:
        return image

    def resize(self, image: Tensor, target: Any = None) -> Any:
        return (image, target) if self.training or self._as_they_come else super().resize(image, target)

    def batch_images(self, images: list[Tensor], size_divisible: int = 32) -> Tensor:
        if self.training and distributed.is_available() and distributed.is_initialized():
            height, width = images[0].shape[-2:]
            largest = torch.tensor(self.max_by_axis([list(image.shape[-2:]) for image in images]))
            largest = largest.to(images[0].device)
            distributed.all_reduce(largest, distributed.ReduceOp.MAX)
            images = [F.pad(images[0], (0, int(largest[1]) - width, 0, int(largest[0]) - height)), *images[1:]]
        return super().batch_images(images, size_divisible)  # type: ignore[no-any-return]

    def postprocess(self, result: list[dict[str, Tensor]], image_shapes: Any, original_image_sizes: Any) -> Any:
        for found, shape, original in zip(result, image_shapes, original_image_sizes, strict=False):
            super().postprocess([found], [shape], [original])
            if "masks" in found and not self.training:
                found["masks"] = found["masks"][:, 0] > 0.5
        return result


def _heads(arch: str, channels: int, num_classes: int, anchor_size: int, regions_per_image: int) -> RegionHeads:
    pool, in_features, width = region_pool(_REGION, anchor_size), channels * _REGION**2, 4 * channels
    mask_branch = MaskBranch(channels, num_classes, anchor_size) if "mask" in arch else None
    if arch.startswith("cascade"):
        return CascadeHeads(pool, in_features, width, num_classes, mask_branch, regions_per_image=regions_per_image)
    head, predictor = TwoMLPHead(in_features, width), BoxPredictor(width, num_classes)
    return RegionHeads(pool, head, predictor, mask_branch, regions_per_image=regions_per_image)
