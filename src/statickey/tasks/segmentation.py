"""Learning which class every pixel is of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_confusion_matrix
from torchvision.transforms.v2.functional import center_crop

from .._checks import check_name, check_positive
from ..data import IGNORE_INDEX, BatchPlan, SegmentationData, SegmentationDataModule, open_segmentation
from ..errors import DataError, StaticKeyError
from ..models import DECODERS, Segmenter, build_segmenter
from .dense import KEYS_FOR, SMALL, DenseRecipe, DenseTask
from .overlap import MEAN_IOU, MeanIoU, Overlap
from .segmentation_report import SegmentationPredictor, SegmentationScores
from .task import Arrays, Evidence, Metric, ScoreOn
from .weights import ModelCard

_MOST_CHANNELS = 16384
"""A wider decoder asks for all memory before anything can refuse it."""


@dataclass(frozen=True, kw_only=True)
class SegmentationRecipe(DenseRecipe):
    """How to train a network that names every pixel: what dense recipes have, and what stands here.

    Args:
        lr: Peak learning rate; default 1e-3, 2e-3 for crops under 256 pixels.
        crop_size: Side of training crops in pixels; default the largest multiple of 32 that is within the first
            training image and 512.
        window: Score and predict in windows of this side in pixels, which overlap; default whole images.
        decoder: ``upernet``, ``fpn``, ``unet`` or ``segformer``.
        decoder_channels: Width of the decoder; default 256, 64 for crops under 256 pixels.
        loss: What is minimised, the sum of some of ``cross_entropy``, ``dice`` and ``focal``.
    """

    epochs: int = 24
    batch_size: int = 8
    crop_size: int | None = None
    window: int | None = None
    decoder: str = "upernet"
    decoder_channels: int | None = None
    loss: tuple[str, ...] = ("cross_entropy",)

    def __post_init__(self) -> None:
        if isinstance(self.loss, list):
            object.__setattr__(self, "loss", tuple(self.loss))
        super().__post_init__()
        check_name("decoder", self.decoder, DECODERS)
        if self.decoder_channels is not None and self.decoder_channels > _MOST_CHANNELS:
            raise StaticKeyError(f"decoder_channels={self.decoder_channels} must be {_MOST_CHANNELS} at most")
        for name in ("crop_size", "window", "decoder_channels"):
            if getattr(self, name) is not None:
                check_positive(**{name: getattr(self, name)})
        for name in self.loss:
            check_name("loss", name, _LOSSES)
        if not self.loss or len(set(self.loss)) < len(self.loss):
            raise StaticKeyError(f"loss={list(self.loss)} must be one or several of {', '.join(_LOSSES)}, each once")


class Segmentation(DenseTask):
    """Cross-entropy and its kin, and mean intersection over union."""

    name: ClassVar[str] = "segment"
    metric: ClassVar[Metric] = MEAN_IOU
    recipe_class: ClassVar[type[DenseRecipe]] = SegmentationRecipe
    settings: ClassVar[tuple[str, ...]] = ("decoder", "decoder_channels", "window", "img_size", "off_grid")

    def read_data(self, recipe: SegmentationRecipe) -> SegmentationData:
        """Images with their maps, read as they are needed."""
        data = open_segmentation(recipe.data, limit=recipe.limit, on_bad_sample=recipe.on_bad_sample)
        if len(data.class_names) < 2:
            raise DataError(f"{recipe.data} has the one class {data.class_names}; segmentation needs two")
        return data

    def data_module(
        self, recipe: SegmentationRecipe, data: SegmentationData, seed: int, num_workers: int = 0
    ) -> SegmentationDataModule:
        """Crops (B, 3, S, S) and maps (B, S, S) to learn from, lists of whole ones to score."""
        recipe = self.settled(recipe, data)
        assert recipe.crop_size is not None and recipe.flip is not None
        return SegmentationDataModule(
            data,
            crop_size=recipe.crop_size,
            img_size=recipe.img_size,
            scale=recipe.scale,
            flip=recipe.flip,
            on_bad_sample=recipe.on_bad_sample,
            batch_size=recipe.batch_size,
            seed=seed,
            holdout=recipe.holdout,
            grad_accum_steps=recipe.grad_accum_steps,
            mean=recipe.mean,
            std=recipe.std,
            num_workers=num_workers,
        )

    def settled(self, recipe: SegmentationRecipe, data: SegmentationData) -> SegmentationRecipe:
        """The recipe with the crop and the flip that these images stand."""
        crop_size = recipe.crop_size
        if crop_size is None:
            shorter = min(data.train.open(0).size) if recipe.img_size is None else recipe.img_size
            crop_size = max(min(shorter, 512) // 32 * 32, 32)
        small = crop_size < SMALL
        return replace(
            recipe,
            crop_size=crop_size,
            train_size=min(crop_size, KEYS_FOR) if recipe.train_size is None else recipe.train_size,
            decoder_channels=(64 if small else 256) if recipe.decoder_channels is None else recipe.decoder_channels,
            flip=data.flip if recipe.flip is None else recipe.flip,
            lr=(2e-3 if small else 1e-3) if recipe.lr is None else recipe.lr,
        )

    def network(self, name: str, mixer: str | None, settings: SegmentationRecipe, **common: Any) -> Segmenter:
        """Images (B, 3, H, W) to logits (B, num_classes, H, W)."""
        assert settings.decoder_channels is not None
        return build_segmenter(
            name,
            mixer,
            decoder=settings.decoder,
            decoder_channels=settings.decoder_channels,
            window=settings.window,
            **common,
        )

    def input_size(self, recipe: SegmentationRecipe, data: SegmentationData) -> tuple[int, int, int]:
        """A crop's."""
        crop_size = self.settled(recipe, data).crop_size
        assert crop_size is not None
        return data.in_chans, crop_size, crop_size

    def examples(
        self, data: SegmentationData, module: SegmentationDataModule, split: ScoreOn, number: int
    ) -> tuple[list[Tensor], Tensor, list[str]]:
        """The first images, their middle cut to the crops' size."""
        whole = module.test_images if split == "test" else module.val_images
        side = module.crop_size
        pixels = []
        for i in range(min(number, len(whole))):
            (image,), _ = whole[BatchPlan(torch.tensor([i]), 0)]
            pixels.append(center_crop(image, [side, side]))
        return pixels, module.normalize(torch.stack(pixels)), [f"image {i + 1}" for i in range(len(pixels))]

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor], recipe: SegmentationRecipe) -> dict[str, Tensor]:
        """The recipe's, each the mean over the images of an image's own, so that a batch may be divided.

        Pixels of no class do not count; logits are taken in float32.
        """
        images, maps = batch
        logits = model(images).float()
        pairs = list(zip(torch.split(logits, 1), torch.split(maps, 1), strict=True))
        return {name: torch.stack([_LOSSES[name](*pair) for pair in pairs]).mean() for name in recipe.loss}

    def outputs(self, model: nn.Module, batch: tuple[list[Tensor], list[Tensor]]) -> tuple[Tensor, Tensor]:
        """Pixels of each image by true class and the one said, (B, num_classes, num_classes), and by the former."""
        segmenter: Any = model
        counts = torch.stack(
            [
                multiclass_confusion_matrix(
                    segmenter.segment(image, tuple(truth.shape)),
                    truth.long(),
                    segmenter.head.out_channels,
                    ignore_index=IGNORE_INDEX,
                    validate_args=False,
                )
                for image, truth in zip(*batch, strict=True)
            ]
        )
        return counts, counts.sum(dim=2)

    def validation_metric(self, data: SegmentationData) -> MeanIoU:
        """Mean intersection over union over all images."""
        return MeanIoU(len(data.class_names))

    def evidence(self, outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Overlap:
        """Pixels of each image and class."""
        return Overlap.of(torch.cat(list(outputs)).numpy())

    def evidence_from(self, arrays: Arrays) -> Evidence:
        """From its three arrays."""
        return Overlap(arrays["both"], arrays["said"], arrays["true"])

    def evaluation(self, class_names: Sequence[str]) -> SegmentationScores:
        """Intersection over union and accuracy, per class too, and what is taken for what."""
        return SegmentationScores(tuple(class_names))

    def predictor(
        self, model: nn.Module, card: ModelCard, *, img_size: int | None, top_k: int
    ) -> SegmentationPredictor:
        """A map of classes for each image."""
        usual = card.task_args.get("img_size")
        return SegmentationPredictor(model, card, img_size=usual if img_size is None else img_size, top_k=top_k)


def _mean(summed: Callable[[Tensor, Tensor], Tensor], logits: Tensor, maps: Tensor) -> Tensor:
    """Mean of a loss over pixels of a class; zero where there is none, when a library's own mean is NaN."""
    return summed(logits, maps) / (maps != IGNORE_INDEX).sum().clamp_min(1)


def _dice(logits: Tensor, maps: Tensor) -> Tensor:
    """Mean over the classes that the map has."""
    from segmentation_models_pytorch.losses import DiceLoss

    present = torch.unique(maps[maps != IGNORE_INDEX]).tolist()
    if not present:
        return logits.sum() * 0
    loss: Tensor = DiceLoss("multiclass", classes=present, ignore_index=IGNORE_INDEX)(logits, maps)
    return loss


def _focal(logits: Tensor, maps: Tensor) -> Tensor:
    from segmentation_models_pytorch.losses import FocalLoss

    loss: Tensor = FocalLoss("multiclass", ignore_index=IGNORE_INDEX, reduction="sum")(logits, maps)
    return loss


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": partial(_mean, partial(F.cross_entropy, ignore_index=IGNORE_INDEX, reduction="sum")),
    "dice": _dice,
    "focal": partial(_mean, _focal),
}
"""From logits (1, num_classes, H, W) in float32 and a map (1, H, W) to a scalar."""
