"""What a detector of two stages does with regions of an image: pools, classifies, refines and masks them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.ops import MultiScaleRoIAlign, roi_align
from torchvision.ops.poolers import initLevelMapper

from .pyramid import STRIDES

_CANONICAL = 7
"""A region this many times the smallest anchor is pooled at stride 16: 224 pixels for anchors of 32."""
_MASK_REGION = 14
Features = dict[str, Tensor]
Shapes = list[tuple[int, int]]


def in_float32(x: Tensor) -> Tensor:
    """The tensor in float32 at least: boxes lose whole pixels in bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class MaskWindows(NamedTuple):
    """The masks of an image's objects, each cut to its object, so that a thousand on an image fit into memory."""

    windows: Tensor
    """Corners (x1, y1, x2, y2) of each cut-out in whole pixels of the image, (n, 4) in int64."""
    pixels: Tensor
    """The cut-outs row by row, one behind the other, in bool."""

    @classmethod
    def cut(cls, masks: Iterable[Tensor]) -> "MaskWindows":
        """Cut masks (H, W) to their objects, and a margin of one pixel where the image goes on."""
        windows, pixels = [], []
        for mask in masks:
            window = [0, 0, 1, 1]
            for axis in (0, 1):
                places = mask.any(axis).nonzero()
                if len(places):
                    window[axis] = max(int(places[0]) - 1, 0)
                    window[axis + 2] = min(int(places[-1]) + 2, mask.shape[1 - axis])
            x1, y1, x2, y2 = window
            windows.append(window)
            pixels.append(mask[y1:y2, x1:x2].bool().flatten())
        return cls(
            torch.tensor(windows, dtype=torch.int64).reshape(-1, 4),
            torch.cat([torch.zeros(0, dtype=torch.bool), *pixels]),
        )

    def in_regions(self, boxes: Tensor, objects: Tensor, side: int) -> Tensor:
        """What of its object each region holds, resampled as torchvision does; no whole mask is made.

        Args:
            boxes: Regions in pixels of the image, (m, 4).
            objects: Which object is looked for in each, (m,).
            side: Cells along a region.

        Returns:
            Shares in [0, 1], (m, side, side).
        """
        windows = self.windows.tolist()
        cuts = torch.split(self.pixels, [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in windows])
        shifted = boxes - self.windows[objects, :2].repeat(1, 2)
        found = [boxes.new_zeros(0, side, side)]
        for box, i in zip(shifted, objects.tolist(), strict=True):
            x1, y1, x2, y2 = windows[i]
            cut = cuts[i].view(1, 1, y2 - y1, x2 - x1).to(boxes.dtype)
            found.append(roi_align(cut, [box[None]], (side, side))[0])
        return torch.cat(found)


class SeededSampler(BalancedPositiveNegativeSampler):  # type: ignore[misc]
    """torchvision's sampler of positive and negative boxes, whose draws depend on the image's seed alone.

    So they are the same whatever the network drew before, on every device, and however a batch is divided.

    Attributes: ``seeds``, of the images of the next call; with None, torch's global state decides.
    """

    seeds: Sequence[int] | None = None

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Masks of the positive and of the negative boxes chosen, image by image."""
        if self.seeds is None:
            return super().__call__(matched_idxs)  # type: ignore[no-any-return]
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        for labels, seed in zip(matched_idxs, self.seeds, strict=True):
            order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
            room = int(self.batch_size_per_image * self.positive_fraction)
            positive = order[labels[order] >= 1][:room]
            negative = order[labels[order] == 0][: self.batch_size_per_image - len(positive)]
            for places, picks in zip(chosen, (positive, negative), strict=True):
                places.append(torch.zeros_like(labels, dtype=torch.uint8).index_fill_(0, picks, 1))
        return chosen


def region_losses(
    logits: Tensor, offsets: Tensor, labels: Sequence[Tensor], wanted: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Faster R-CNN's losses of classes and of boxes, each the mean over images of an image's own.

    Args:
        logits: Of the regions of all images, (n, num_classes).
        offsets: (n, 4 * num_classes).
        labels: Classes of each image's regions, 0 for background.
        wanted: Offsets to their objects; of background they are not looked at.
    """
    counts = [len(own) for own in labels]
    images = zip(torch.split(logits, counts), torch.split(offsets, counts), labels, wanted, strict=True)
    classes, boxes = zip(*(fastrcnn_loss(a, b, [c], [d]) for a, b, c, d in images), strict=True)
    return torch.stack(classes).mean(), torch.stack(boxes).mean()


class ProposalNetwork(RegionProposalNetwork):  # type: ignore[misc]
    """torchvision's, with losses that are means over images of an image's own."""

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Losses of objectness and of boxes, over the anchors sampled of each image."""
        chosen = zip(*self.fg_bg_sampler(labels), strict=True)
        images = zip(
            *(x.chunk(len(labels)) for x in (objectness.flatten(), pred_bbox_deltas)),
            *(labels, regression_targets, chosen),
            strict=True,
        )
        found, boxes = [], []
        for logits, offsets, truth, wanted, (positive, negative) in images:
            held, none = (places.nonzero().flatten() for places in (positive, negative))
            places = torch.cat([held, none])
            found.append(F.binary_cross_entropy_with_logits(logits[places], truth[places]))
            away = F.smooth_l1_loss(offsets[held], wanted[held], beta=1 / 9, reduction="sum")
            boxes.append(away / len(places))
        return torch.stack(found).mean(), torch.stack(boxes).mean()


def region_pool(side: int, anchor_size: int) -> MultiScaleRoIAlign:
    """Pooling of regions from maps 0 to 3, whose strides are known rather than guessed from the first batch."""
    canonical = _CANONICAL * anchor_size
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], side, sampling_ratio=2, canonical_scale=canonical)
    levels = [round(math.log2(stride)) for stride in STRIDES]
    pool.scales = [1 / stride for stride in STRIDES]
    pool.map_levels = initLevelMapper(levels[0], levels[-1], canonical_scale=canonical, canonical_level=4)
    return pool


class BoxPredictor(FastRCNNPredictor):  # type: ignore[misc]
    """Class logits and box offsets of pooled regions, in float32.

    Args:
        in_channels: Width of the regions' vectors.
        num_classes: Classes with the background.
        shared: One set of offsets for all classes.
    """

    def __init__(self, in_channels: int, num_classes: int, *, shared: bool = False) -> None:
        super().__init__(in_channels, num_classes)
        if shared:
            self.bbox_pred = nn.Linear(in_channels, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (n, C) to logits (n, num_classes) and offsets (n, 4 * num_classes), or (n, 4)."""
        logits, offsets = super().forward(x)
        return in_float32(logits), in_float32(offsets)


class MaskBranch(nn.Module):
    """Mask R-CNN's head: a mask per class for every region.

    Args:
        channels: Of the feature maps and of the head.
        num_classes: Classes with the background.
        anchor_size: As in ``region_pool``.
    """

    def __init__(self, channels: int, num_classes: int, anchor_size: int) -> None:
        super().__init__()
        self.pool = region_pool(_MASK_REGION, anchor_size)
        self.head = MaskRCNNHeads(channels, (channels,) * 4, 1)
        self.predictor = MaskRCNNPredictor(channels, channels, num_classes)

    def forward(self, features: Features, boxes: list[Tensor], shapes: Shapes) -> Tensor:
        """Logits (n, num_classes, 28, 28) of all regions, in float32."""
        return in_float32(self.predictor(self.head(self.pool(features, boxes, shapes))))

    def loss(
        self,
        features: Features,
        boxes: list[Tensor],
        objects: list[Tensor],
        labels: list[Tensor],
        shapes: Shapes,
        masks: list[MaskWindows],
    ) -> Tensor:
        """Cross-entropy of the pixels of the regions that hold an object, a mean over images; 0 where none does.

        Args:
            features: The feature maps.
            boxes: Regions of each image, (n, 4).
            objects: Which of the image's objects each region holds, (n,).
            labels: Its class, 0 where the region is background, (n,).
            shapes: Height and width of each image.
            masks: Of the objects of each image.
        """
        held = [own > 0 for own in labels]
        boxes = [own[where] for own, where in zip(boxes, held, strict=True)]
        logits: Tensor = self(features, boxes, shapes)
        if not len(logits):
            # a region of nothing keeps the head in the graph: processes wait for every parameter's gradient
            logits = self(features, [own.new_zeros(int(i == 0), 4) for i, own in enumerate(boxes)], shapes)
            return logits.sum() * 0
        classes = torch.cat([own[where] for own, where in zip(labels, held, strict=True)])
        wanted = [
            own.in_regions(own_boxes, matched[where], logits.shape[-1])
            for own, own_boxes, matched, where in zip(masks, boxes, objects, held, strict=True)
        ]
        ours = logits[torch.arange(len(classes), device=classes.device), classes]
        counts = [len(own) for own in boxes]
        pairs = zip(torch.split(ours, counts), wanted, strict=True)
        losses = [F.binary_cross_entropy_with_logits(*pair) for pair in pairs if len(pair[1])]
        return torch.stack(losses).sum() / len(counts)

    def add_masks(self, features: Features, found: list[dict[str, Tensor]], shapes: Shapes) -> None:
        """Give detections their ``masks``, probabilities (n, 1, 28, 28) in the frames of their boxes."""
        logits = self(features, [own["boxes"] for own in found], shapes)
        for own, masks in zip(found, maskrcnn_inference(logits, [own["labels"] for own in found]), strict=True):
            own["masks"] = masks


class RegionHeads(RoIHeads):  # type: ignore[misc]
    """torchvision's heads with seeded draws, losses that are means over images, and masks learned from cut-outs.

    Args:
        pool: Pooling of regions.
        head: Pooled regions to vectors.
        predictor: Vectors to class logits and box offsets.
        mask_branch: Learns masks; None for boxes alone.
        regions_per_image: Regions of an image to learn from.
    """

    def __init__(
        self,
        pool: nn.Module,
        head: nn.Module,
        predictor: nn.Module,
        mask_branch: MaskBranch | None,
        *,
        regions_per_image: int,
    ) -> None:
        super().__init__(
            pool,
            head,
            predictor,
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=regions_per_image,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
        )
        self.fg_bg_sampler = SeededSampler(regions_per_image, 0.25)
        self.mask_branch = mask_branch
        self._samples: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])

    def select_training_samples(self, proposals: list[Tensor], targets: list[dict[str, Any]]) -> Any:
        """As torchvision's; what was sampled is kept for the mask branch."""
        boxes, objects, labels, offsets = super().select_training_samples(proposals, targets)
        self._samples = boxes, objects, labels
        return boxes, objects, labels, offsets

    def detect(
        self, features: Features, proposals: list[Tensor], shapes: Shapes, targets: list[dict[str, Any]] | None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Boxes, labels and scores of each image, and the losses in training."""
        labels: list[Tensor] = []
        wanted: list[Tensor] = []
        if self.training:
            assert targets is not None
            proposals, _, labels, wanted = self.select_training_samples(proposals, targets)
        logits, offsets = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, shapes)))
        if self.training:
            names = "loss_classifier", "loss_box_reg"
            return [], dict(zip(names, region_losses(logits, offsets, labels, wanted), strict=True))
        found = self.postprocess_detections(logits, offsets, proposals, shapes)
        return [{"boxes": b, "labels": n, "scores": s} for b, s, n in zip(*found, strict=True)], {}

    def forward(
        self,
        features: Features,
        proposals: list[Tensor],
        image_shapes: Shapes,
        targets: list[dict[str, Any]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections of each image, in evaluation, and the losses, in training."""
        found, losses = self.detect(features, proposals, image_shapes, targets)
        if self.mask_branch is not None and self.training:
            assert targets is not None
            masks = [own["masks"] for own in targets]
            losses["loss_mask"] = self.mask_branch.loss(features, *self._samples, image_shapes, masks)
            self._samples = ([], [], [])
        elif self.mask_branch is not None:
            self.mask_branch.add_masks(features, found, image_shapes)
        return found, losses
