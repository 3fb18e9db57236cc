"""Cascade R-CNN: three heads in a row, each on the boxes of the one before and stricter than it."""

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.ops import clip_boxes_to_image

from .region_heads import BoxPredictor, Features, MaskBranch, RegionHeads, Shapes, region_losses

IOU_THRESHOLDS = (0.5, 0.6, 0.7)
"""Overlap with an object from which a stage takes a region for it."""
OFFSET_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
"""Factors of each stage on the offsets of a box: x, y, width and height."""


class CascadeHeads(RegionHeads):
    """Three stages of boxes, with one set of offsets for all classes.

    The first stage learns from sampled proposals; each later one from all boxes of the stage before, clipped to the
    image, detached and matched anew. Every stage's gradient reaches the feature maps divided by their number. In
    evaluation the class probabilities are the mean over the stages, the boxes those of the last. Masks are learned
    once, from the first stage's samples.

    Args:
        pool: Pooling of regions.
        in_features: Elements of a pooled region.
        width: Of the regions' vectors.
        num_classes: Classes with the background.
        mask_branch: As in ``RegionHeads``.
        regions_per_image: As in ``RegionHeads``.

    Source:
        Cai & Vasconcelos, Cascade R-CNN, arXiv 1712.00726.
    """

    def __init__(
        self,
        pool: nn.Module,
        in_features: int,
        width: int,
        num_classes: int,
        mask_branch: MaskBranch | None = None,
        *,
        regions_per_image: int,
    ) -> None:
        stages = range(len(IOU_THRESHOLDS))
        super().__init__(
            pool,
            nn.ModuleList(TwoMLPHead(in_features, width) for _ in stages),
            nn.ModuleList(BoxPredictor(width, num_classes, shared=True) for _ in stages),
            mask_branch,
            regions_per_image=regions_per_image,
        )
        self.box_coders = [BoxCoder(weights) for weights in OFFSET_WEIGHTS]
        self.matchers = [Matcher(iou, iou) for iou in IOU_THRESHOLDS]

    def detect(
        self, features: Features, proposals: list[Tensor], shapes: Shapes, targets: list[dict[str, Any]] | None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Boxes, labels and scores of each image, and the losses of every stage in training."""
        losses: dict[str, Tensor] = {}
        probabilities: list[Tensor] = []
        boxes, offsets = proposals, torch.empty(0)
        for stage, (coder, matcher) in enumerate(zip(self.box_coders, self.matchers, strict=True)):
            if stage > 0:
                boxes = self._refined(offsets, boxes, shapes)
            self.box_coder, self.proposal_matcher = coder, matcher
            labels: list[Tensor] = []
            wanted: list[Tensor] = []
            if self.training:
                assert targets is not None
                sample = self._rematched if stage > 0 else self.select_training_samples
                boxes, _, labels, wanted = sample(boxes, targets)
            logits, offsets = self._predict(stage, features, boxes, shapes)
            of_every_class = offsets.repeat(1, logits.shape[1])  # as torchvision takes them
            if self.training:
                parts = region_losses(logits, of_every_class, labels, wanted)
                names = f"loss_classifier_{stage + 1}", f"loss_box_reg_{stage + 1}"
                losses |= dict(zip(names, parts, strict=True))
            probabilities.append(logits.softmax(1))
        if self.training:
            return [], losses
        mean = torch.stack(probabilities).mean(0)
        found = self.postprocess_detections(mean.log(), of_every_class, boxes, shapes)
        return [{"boxes": b, "labels": n, "scores": s} for b, s, n in zip(*found, strict=True)], losses

    def _predict(self, stage: int, features: Features, boxes: list[Tensor], shapes: Shapes) -> tuple[Tensor, Tensor]:
        """A stage's logits (n, num_classes) and offsets (n, 4)."""
        pooled = self.box_roi_pool(features, boxes, shapes)
        value = pooled.detach()
        pooled = value + (pooled - value) / len(self.box_coders)  # divides the gradient alone
        logits, offsets = self.box_predictor[stage](self.box_head[stage](pooled))
        return logits, offsets

    def _refined(self, offsets: Tensor, boxes: list[Tensor], shapes: Shapes) -> list[Tensor]:
        """The boxes that a stage makes of those it was given, without gradient."""
        made = self.box_coder.decode(offsets.detach(), boxes).reshape(-1, 4).split([len(own) for own in boxes])
        return [clip_boxes_to_image(own, shape) for own, shape in zip(made, shapes, strict=True)]

    def _rematched(
        self, boxes: list[Tensor], targets: list[dict[str, Any]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        """All the boxes, the object of each, its class, 0 for background, and the offsets to it."""
        real = [target["boxes"].to(boxes[0].dtype) for target in targets]
        objects, labels = self.assign_targets_to_proposals(boxes, real, [target["labels"] for target in targets])
        some = [own if len(own) else own.new_zeros(1, 4) for own in real]
        wanted = self.box_coder.encode([own[where] for own, where in zip(some, objects, strict=True)], boxes)
        return boxes, objects, labels, list(wanted)
