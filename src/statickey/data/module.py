"""Batches of labelled images, in memory or streamed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError
from .augment import Augmentation, BatchAugment, erase_rectangles, mix_pairs
from .batches import EpochBatches, PlannedDataModule, PlannedImages, hold_out
from .images import ImageData, LabelledImages
from .pixels import channel_statistics, normalize, per_channel
from .plan import BatchPlan
from .source import SourcePart
from .stream import ImageStream, StreamedImages, stream_transforms

_Chosen = TypeVar("_Chosen", bound=Augmentation)


class MemoryImages(Dataset[tuple[Tensor, Tensor]]):
    """Batches of images in memory, (B, C, H, W) in uint8, with their labels."""

    def __init__(self, part: LabelledImages) -> None:
        self.part = part

    def __len__(self) -> int:
        return len(self.part.labels)

    def __getitem__(self, plan: BatchPlan) -> tuple[Tensor, Tensor]:
        return self.part.images[plan.indices], self.part.labels[plan.indices]


class ImageDataModule(PlannedDataModule):
    """Training, validation and test batches of labelled images in memory or streamed.

    Batches travel to the device as uint8; there they are augmented, each image by its own draws, and normalised.
    How a batch is divided among processes and accumulation steps changes nothing in them. The validation part is
    held out of the training images, the same for every seed.

    Args:
        data: The images.
        augmentation: What is done to training images; default ``Augmentation()``.
        batch_size: Images per optimizer step, over all processes.
        seed: Seed of order and augmentation.
        holdout: Share of the training images to hold out, in (0, 1).
        grad_accum_steps: Parts a batch is computed in.
        mean: Normalisation per channel; default that of the training images, or of ImageNet when streaming.
        std: As ``mean``.
        num_workers: Loader processes.

    Raises:
        DataError: Too few images to hold some out and train on the rest, or an augmentation that does not fit.
    """

    def __init__(
        self,
        data: ImageData | StreamedImages,
        augmentation: Augmentation | None = None,
        *,
        batch_size: int,
        seed: int = 0,
        holdout: float = 0.1,
        grad_accum_steps: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        num_workers: int = 0,
    ) -> None:
        wanted: Any = settled_augmentation(Augmentation() if augmentation is None else augmentation, data)
        parts: tuple[PlannedImages, PlannedImages, PlannedImages]
        if isinstance(data, StreamedImages):
            if wanted.crop_padding is not None:
                raise DataError(
                    f"crop_padding={wanted.crop_padding} is for images in memory; "
                    "streamed ones are cropped at random scale"
                )
            parts = _streams(data, holdout, wanted.flip, wanted.auto_augment)
            augment = BatchAugment()
            statistics = per_channel("mean", IMAGENET_DEFAULT_MEAN, 3), per_channel("std", IMAGENET_DEFAULT_STD, 3)
        else:
            self.val_part, self.train_part = (
                LabelledImages(data.train.images[index], data.train.labels[index])
                for index in hold_out(len(data.train.labels), holdout)
            )
            parts = MemoryImages(self.train_part), MemoryImages(self.val_part), MemoryImages(data.test)
            if wanted.crop_padding >= data.img_size:
                raise DataError(
                    f"crop_padding={wanted.crop_padding} lets a crop miss its image of {data.img_size} pixels; use a "
                    "smaller one"
                )
            augment = BatchAugment(crop_padding=wanted.crop_padding, flip=wanted.flip, policy=wanted.auto_augment)
            statistics = channel_statistics(self.train_part.images)
        super().__init__(
            *parts, batch_size=batch_size, seed=seed, grad_accum_steps=grad_accum_steps, num_workers=num_workers
        )
        self.data, self.augment, self.flip, self.crop_padding = data, augment, wanted.flip, augment.crop_padding
        self.mean, self.std = (
            own if given is None else per_channel(name, given, data.in_chans)
            for name, given, own in zip(("mean", "std"), (mean, std), statistics, strict=True)
        )
        self.random_erasing = wanted.random_erasing
        self.mixup: Any = None
        if wanted.mixup > 0 or wanted.cutmix > 0:
            self.mixup = Mixup(
                wanted.mixup,
                wanted.cutmix,
                label_smoothing=wanted.label_smoothing,
                num_classes=len(data.class_names),
            )

    def plan(self, rank: int = 0, world: int = 1) -> EpochBatches:
        """The training batches of one process.

        Raises:
            DataError: The batch does not divide, or mixup has no pairs in a part of it.
        """
        batches = super().plan(rank, world)
        if self.mixup is not None and batches.images_at_once % 2:
            raise DataError(
                f"mixup pairs images, but {batches.images_at_once} are computed at once; use an even number"
            )
        return batches

    def prepare_training_batch(self, batch: tuple[Tensor, Tensor], seed: int, first: int) -> tuple[Tensor, Tensor]:
        """Augment and normalise a training batch.

        Returns:
            Images (B, C, H, W) in float32, and labels (B,), or (B, num_classes) once mixed.
        """
        images, labels = batch
        draws = self.augment.draw(self.batch_size, torch.Generator().manual_seed(seed))
        images = self.normalize(self.augment(images, draws.rows(slice(first, first + len(images)))))
        if self.random_erasing > 0:
            erase_rectangles(images, self.random_erasing, seed, first)
        if self.mixup is not None:
            images, labels = mix_pairs(images, labels, self.mixup, seed)
        return images, labels

    def prepare_batch(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Normalise a batch for evaluation."""
        images, labels = batch
        return self.normalize(images), labels

    def normalize(self, images: Tensor) -> Tensor:
        """Images in uint8 to zero mean and unit variance, float32."""
        if self.mean.device != images.device:  # once: a copy to an accelerator waits for it
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        return normalize(images, self.mean, self.std)


def settled_augmentation(augmentation: _Chosen, data: ImageData | StreamedImages) -> _Chosen:
    """The augmentation with what these images stand wherever it leaves the choice to them."""
    defaults: dict[str, Any] = {"flip": data.flip}
    if isinstance(data, ImageData):
        defaults["crop_padding"] = data.crop_padding
    return replace(augmentation, **{k: v for k, v in defaults.items() if getattr(augmentation, k) is None})


def _streams(
    data: StreamedImages, holdout: float, flip: bool, policy: str | None
) -> tuple[ImageStream, ImageStream, ImageStream]:
    """The training part, augmented, and the held-out and test parts, plain."""
    plain = stream_transforms(data.img_size, train=False)
    augmented = stream_transforms(data.img_size, train=True, policy=policy, flip=flip)
    held_out, rest = hold_out(len(data.sources.train), holdout)
    val, train = (SourcePart(data.sources.train, index.tolist()) for index in (held_out, rest))
    num_classes = len(data.class_names)
    return (
        ImageStream(train, augmented, num_classes, data.on_bad_image),
        ImageStream(val, plain, num_classes, data.on_bad_image, substitute=False),
        ImageStream(data.sources.test, plain, num_classes, data.on_bad_image, substitute=False),
    )
