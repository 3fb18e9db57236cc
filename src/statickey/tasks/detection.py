"""Learning where objects are, of which class, and, where data have masks, which pixels are theirs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision
from torchvision.transforms.v2 import functional as geometry

from .._checks import check_choice, check_positive
from ..data import DetectionData, normalize, open_detection, run_length_tools
from ..data.detection_batches import DetectionDataModule, Rescaling
from ..errors import StaticKeyError
from ..models import ARCHS, Detector, QueryDetector, build_detector, check_transformers
from .average_precision import BOX_AP, MOST_DETECTIONS, AveragePrecision, match_boxes
from .dense import KEYS_FOR, SMALL, DenseRecipe, DenseTask
from .detection_report import DetectionPredictor, DetectionScores
from .task import Arrays, Metric, ScoreOn
from .weights import ModelCard


@dataclass(frozen=True, kw_only=True)
class DetectionRecipe(DenseRecipe):
    """How to train a detector: what dense recipes have, and what stands here.

    Args:
        lr: Peak learning rate; default 1e-4, 1e-3 for images under 256 pixels.
        arch: ``faster_rcnn``, ``cascade_rcnn`` or ``rt_detr_v2`` for boxes, ``mask_rcnn`` or ``cascade_mask_rcnn``
            for masks too; default ``mask_rcnn`` where the data have masks, else ``faster_rcnn``. ``rt_detr_v2``
            stretches all images to a square of ``img_size``, or of the first image's longer side.
        max_size: Longer side of images at most, where ``img_size`` brings the shorter one to a size.
        crop_size: Cut training images, once scaled, to random parts of at most this side; ``max_size`` then holds
            before they are scaled. With ``scale`` from 0.1 to 2 this is large-scale jitter. Default whole images.
        anchor_size: Side of the smallest anchors in pixels; default in step with the images, 32 at 800.
        channels: Width of the feature maps; default 256, 64 for images under 256 pixels. It decides the depth of
            ``rt_detr_v2`` too.
        regions_per_image: Proposed regions of an image that the heads learn from; default 512, 64 for images under
            256 pixels.
    """

    epochs: int = 7
    batch_size: int = 8
    scale: tuple[float, float] = (1.0, 1.0)
    arch: str | None = None
    max_size: int = 1333
    crop_size: int | None = None
    anchor_size: int | None = None
    channels: int | None = None
    regions_per_image: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.arch is not None:
            check_choice(arch=(self.arch, ARCHS))
        if self.arch == "rt_detr_v2":
            check_transformers()
            for name, left_out in (("anchor_size", None), ("regions_per_image", None), ("scale", (1.0, 1.0))):
                if getattr(self, name) != left_out:
                    raise StaticKeyError(
                        f"{name}={getattr(self, name)!r} means nothing to arch={self.arch!r}, which has neither "
                        "anchors nor regions and brings all images to one size; leave it out"
                    )
        options = ("crop_size", "anchor_size", "channels", "regions_per_image")
        sizes = {name: getattr(self, name) for name in options}
        check_positive(max_size=self.max_size, **{k: v for k, v in sizes.items() if v is not None})
        if self.img_size is not None and self.img_size > self.max_size:
            raise StaticKeyError(f"img_size={self.img_size} must not exceed max_size={self.max_size}")


class Detection(DenseTask):
    """The losses of Faster, Mask or Cascade R-CNN or of RT-DETRv2, and COCO's average precision of boxes."""

    name: ClassVar[str] = "detect"
    metric: ClassVar[Metric] = BOX_AP
    recipe_class: ClassVar[type[DenseRecipe]] = DetectionRecipe
    settings: ClassVar[tuple[str, ...]] = (
        "arch",
        "channels",
        "anchor_size",
        "regions_per_image",
        "img_size",
        "max_size",
        "off_grid",
    )

    def read_data(self, recipe: DetectionRecipe) -> DetectionData:
        """Images that are decoded as they are needed, and what is marked on them."""
        return open_detection(recipe.data, limit=recipe.limit, on_bad_sample=recipe.on_bad_sample)

    def settled(self, recipe: DetectionRecipe, data: DetectionData) -> DetectionRecipe:
        """The recipe with what these images ask for.

        Raises:
            StaticKeyError: Masks are to be learned from data without them.
        """
        arch = ("mask_rcnn" if data.has_masks else "faster_rcnn") if recipe.arch is None else recipe.arch
        if "mask" in arch and not data.has_masks:
            raise StaticKeyError(f"arch={arch!r} learns masks, but {recipe.data} has boxes alone; use faster_rcnn")
        side = _usual_side(data, recipe.img_size)
        small = side < SMALL
        anchor_size, regions, img_size = recipe.anchor_size, recipe.regions_per_image, recipe.img_size
        if arch == "rt_detr_v2":
            img_size = side
        else:
            anchor_size = max(4, 2 ** round(math.log2(side / 25))) if anchor_size is None else anchor_size
            regions = (64 if small else 512) if regions is None else regions
        return replace(
            recipe,
            arch=arch,
            train_size=min(side, KEYS_FOR) if recipe.train_size is None else recipe.train_size,
            anchor_size=anchor_size,
            channels=(64 if small else 256) if recipe.channels is None else recipe.channels,
            regions_per_image=regions,
            img_size=img_size,
            flip=data.flip if recipe.flip is None else recipe.flip,
            lr=(1e-3 if small else 1e-4) if recipe.lr is None else recipe.lr,
        )

    def data_module(
        self, recipe: DetectionRecipe, data: DetectionData, seed: int, num_workers: int = 0
    ) -> DetectionDataModule:
        """Batches of images, each (C, H, W), and a dict of marks for each."""
        recipe = self.settled(recipe, data)
        assert recipe.flip is not None and recipe.arch is not None
        img_size = None if recipe.arch == "rt_detr_v2" else recipe.img_size  # which makes squares itself
        return DetectionDataModule(
            data,
            batch_size=recipe.batch_size,
            rescaling=Rescaling(recipe.flip, recipe.scale, img_size, recipe.max_size, recipe.crop_size),
            masks="mask" in recipe.arch,
            on_bad_sample=recipe.on_bad_sample,
            seed=seed,
            holdout=recipe.holdout,
            grad_accum_steps=recipe.grad_accum_steps,
            mean=recipe.mean,
            std=recipe.std,
            num_workers=num_workers,
        )

    def network(
        self, name: str, mixer: str | None, settings: DetectionRecipe, **common: Any
    ) -> Detector | QueryDetector:
        """A detector; see ``build_detector``."""
        assert settings.arch is not None and settings.channels is not None
        of_regions = {"anchor_size": settings.anchor_size, "regions_per_image": settings.regions_per_image}
        given: Any = {name: value for name, value in of_regions.items() if value is not None}
        return build_detector(
            name,
            mixer,
            arch=settings.arch,
            channels=settings.channels,
            min_size=settings.img_size,
            max_size=settings.max_size,
            **given,
            **common,
        )

    def resized(self, recipe: DetectionRecipe, img_size: int) -> DetectionRecipe:
        """The recipe for images of another size, its limit raised where it must be."""
        return replace(recipe, img_size=img_size, max_size=max(recipe.max_size, img_size))

    def input_size(self, recipe: DetectionRecipe, data: DetectionData) -> tuple[int, int, int]:
        """That of the first training image; of the heads' products those of the regions found on it are counted."""
        width, height = data.train.open(0).size
        return data.in_chans, height, width

    def examples(
        self, data: DetectionData, module: DetectionDataModule, split: ScoreOn, number: int
    ) -> tuple[list[Tensor], list[Tensor], list[str]]:
        """The first images, brought to the size that keys are usually built for, and which classes they show."""
        images: Any = module.test_images if split == "test" else module.val_images
        size = [min(_usual_side(data, module.rescaling.min_size), KEYS_FOR)] * 2
        pixels, captions = [], []
        for i in images.indices[:number]:
            pixels.append(geometry.resize(geometry.pil_to_tensor(images.pictures.open(i)), size))
            shown = dict.fromkeys(images.pictures.objects(i).labels.tolist())
            captions.append(", ".join(data.class_names[label] for label in shown) or "nothing")
        return pixels, [normalize(image, module.mean, module.std) for image in pixels], captions

    def losses(
        self, model: nn.Module, batch: tuple[list[Tensor], list[Any]], recipe: DetectionRecipe
    ) -> dict[str, Tensor]:
        """Those of proposals, boxes, classes and masks, or of queries."""
        images, targets = batch
        losses: dict[str, Tensor] = model(images, targets)
        return losses

    def outputs(
        self, model: nn.Module, batch: tuple[list[Tensor], list[Any]]
    ) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Of each image ``boxes``, ``labels``, ``scores`` and, as run lengths, ``masks``; and its marks."""
        images, targets = batch
        return [_compact(found) for found in model(images)], targets

    def validation_metric(self, data: DetectionData) -> "BoxAveragePrecision":
        """Box AP, as COCO has it."""
        return BoxAveragePrecision()

    def evidence(self, outputs: Sequence[Any], targets: Sequence[Any]) -> AveragePrecision:
        """What each box found was."""
        return match_boxes([own for batch in outputs for own in batch], [own for batch in targets for own in batch])

    def evidence_from(self, arrays: Arrays) -> AveragePrecision:
        """From its arrays."""
        return AveragePrecision.from_arrays(arrays)

    def evaluation(self, class_names: Sequence[str]) -> DetectionScores:
        """AP of boxes and masks, at two overlaps, by size and by class."""
        return DetectionScores(tuple(class_names))

    def predictor(self, model: nn.Module, card: ModelCard, *, img_size: int | None, top_k: int) -> DetectionPredictor:
        """A detector at work on files; it brings them to its size itself."""
        return DetectionPredictor(model, card, top_k=top_k)


class BoxAveragePrecision(MeanAveragePrecision):
    """COCO's AP of boxes, between 0 and 1."""

    def __init__(self) -> None:
        super().__init__(backend="faster_coco_eval", max_detection_thresholds=[1, 10, MOST_DETECTIONS])
        self.warn_on_many_detections = False

    def update(self, preds: Sequence[dict[str, Any]], target: Sequence[dict[str, Any]]) -> None:
        """Add a batch of outputs and marks."""
        said = [{name: own[name] for name in ("boxes", "labels", "scores")} for own in preds]
        real = [{"boxes": own["boxes"], "labels": own["labels"], "iscrowd": own["crowd"].int()} for own in target]
        super().update(said, real)

    def compute(self) -> Tensor:  # type: ignore[override]
        """AP; 0 where no object was marked."""
        ap: Tensor = super().compute()["map"]
        return ap.clamp(min=0)


def _usual_side(data: DetectionData, img_size: int | None) -> int:
    """What images are brought to, or about the longer side of the first."""
    return img_size or 32 * math.ceil(max(data.train.open(0).size) / 32)


def _compact(found: dict[str, Tensor]) -> dict[str, Any]:
    """Detections with their masks as run lengths."""
    if "masks" not in found:
        return found
    masks = found["masks"].cpu().numpy().astype(np.uint8)
    return found | {"masks": [run_length_tools().encode(np.asfortranarray(mask)) for mask in masks]}
