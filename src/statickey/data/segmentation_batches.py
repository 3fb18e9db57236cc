"""Batches of images with a class for every pixel: random crops to learn from, whole images to score."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from ..errors import DataError
from .annotations import IGNORE_INDEX, MapPictures, OnBadSample, SegmentationData
from .batches import PlannedDataModule, hold_out
from .pixels import normalize, per_channel
from .plan import BatchPlan, mix_seed, seeded
from .readable import readable, substituted

Sample = tuple[tv_tensors.Image, tv_tensors.Mask]


class Crops(Dataset[tuple[Tensor, Tensor]]):
    """Random crops of images and their class maps, each drawn from the plan's seed and its own place alone.

    Args:
        pictures: The images.
        indices: Which of them.
        crop_size: Side of a crop in pixels; smaller images are padded, with pixels that are not learned from.
        img_size: Bring the shorter side to this many pixels first; None for as stored.
        scale: Range of a random factor on both sides.
        flip: Whether to mirror half of them.
        fill: Colour of padding.
        on_bad_sample: Refuse a sample that cannot be read, or let the next one take its place.
    """

    def __init__(
        self,
        pictures: MapPictures,
        indices: Sequence[int],
        *,
        crop_size: int,
        img_size: int | None,
        scale: tuple[float, float],
        flip: bool,
        fill: tuple[int, ...],
        on_bad_sample: OnBadSample,
    ) -> None:
        self.pictures, self.indices, self.on_bad_sample = pictures, list(indices), on_bad_sample
        self.img_size, self.scale = img_size, scale
        colours = {tv_tensors.Image: fill, tv_tensors.Mask: IGNORE_INDEX}
        steps = [v2.RandomCrop(crop_size, pad_if_needed=True, fill=colours), v2.RandomHorizontalFlip(0.5 * flip)]
        self.transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, plan: BatchPlan) -> tuple[Tensor, Tensor]:
        """Crops (B, 3, S, S) and maps (B, S, S), both in uint8."""
        read = partial(read_sample, self.pictures)
        samples = substituted(read, self.indices, plan.indices.tolist(), self.on_bad_sample)
        crops = []
        for place, sample in enumerate(samples, plan.first):
            with seeded(mix_seed(plan.seed, place)):
                low, high = self.scale
                factor = low + (high - low) * torch.rand(()).item()
                crops.append(self.transform(*resized(*sample, self.img_size, factor)))
        images, maps = zip(*crops, strict=True)
        return torch.stack(images).as_subclass(Tensor), torch.stack(maps).as_subclass(Tensor)


class WholeImages(Dataset[tuple[list[Tensor], list[Tensor]]]):
    """Whole images, (3, H, W) each, and their class maps as stored, (H', W') each, in uint8.

    Args:
        pictures: The images.
        indices: Which of them.
        img_size: Bring the shorter side of images to this many pixels; None for as stored.
        on_bad_sample: Refuse a sample that cannot be read, or leave it out.
    """

    def __init__(
        self, pictures: MapPictures, indices: Sequence[int], *, img_size: int | None, on_bad_sample: OnBadSample
    ) -> None:
        self.pictures, self.indices = pictures, list(indices)
        self.img_size, self.on_bad_sample = img_size, on_bad_sample

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, plan: BatchPlan) -> tuple[list[Tensor], list[Tensor]]:
        read = partial(read_sample, self.pictures)
        samples = readable(read, self.indices, plan.indices.tolist(), self.on_bad_sample)
        images = [resized_image(image.as_subclass(Tensor), self.img_size) for image, _ in samples]
        return images, [classes.as_subclass(Tensor) for _, classes in samples]


class SegmentationDataModule(PlannedDataModule):
    """Training crops, and whole held-out and test images, with their class maps.

    Images travel to the device as uint8 and are normalised there. The validation part is held out of the training
    images, the same for every seed.

    Args:
        data: The images.
        crop_size: Side of training crops in pixels.
        img_size: Bring the shorter side of all images to this many pixels; None for as stored.
        scale: Range of the random factor on training images.
        flip: Whether to mirror half of the crops.
        on_bad_sample: Refuse a sample that cannot be read, or leave it out.
        batch_size: Crops per optimizer step, over all processes.
        seed: Seed of order and augmentation.
        holdout: Share of the training images to hold out, in (0, 1).
        grad_accum_steps: Parts a batch is computed in.
        mean: Normalisation per channel.
        std: As ``mean``.
        num_workers: Loader processes.

    Raises:
        DataError: Too few images to hold some out and train on the rest.
    """

    def __init__(
        self,
        data: SegmentationData,
        *,
        crop_size: int,
        img_size: int | None = None,
        scale: tuple[float, float] = (0.5, 2.0),
        flip: bool = True,
        on_bad_sample: OnBadSample = "fail",
        batch_size: int,
        seed: int = 0,
        holdout: float = 0.1,
        grad_accum_steps: int = 1,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        num_workers: int = 0,
    ) -> None:
        self.mean, self.std = per_channel("mean", mean, 3), per_channel("std", std, 3)
        held_out, rest = (index.tolist() for index in hold_out(len(data.train), holdout))
        self.crop_size = crop_size
        whole: Any = {"img_size": img_size, "on_bad_sample": on_bad_sample}
        fill = tuple(round(255 * value) for value in self.mean.flatten().tolist())
        super().__init__(
            Crops(data.train, rest, crop_size=crop_size, scale=scale, flip=flip, fill=fill, **whole),
            WholeImages(data.train, held_out, **whole),
            WholeImages(data.test, range(len(data.test)), **whole),
            batch_size=batch_size,
            seed=seed,
            grad_accum_steps=grad_accum_steps,
            eval_batch_size=1,
            num_workers=num_workers,
        )

    def prepare_training_batch(self, batch: tuple[Tensor, Tensor], seed: int, first: int) -> tuple[Tensor, Tensor]:
        """Crops (B, 3, S, S), normalised, and their maps (B, S, S) in int64."""
        images, maps = batch
        return self.normalize(images), maps.long()

    def prepare_batch(self, batch: tuple[list[Tensor], list[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
        """Images (3, H, W), normalised, and their maps (H, W) in uint8."""
        images, maps = batch
        return [self.normalize(image) for image in images], maps

    def normalize(self, images: Tensor) -> Tensor:
        """Images in uint8 to zero mean and unit variance, float32."""
        if self.mean.device != images.device:
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        return normalize(images, self.mean, self.std)


def read_sample(pictures: MapPictures, i: int) -> Sample:
    """Image ``i`` (3, H, W) and its class map (H, W).

    Raises:
        DataError: One cannot be read, or their sizes differ.
    """
    image, classes = functional.pil_to_tensor(pictures.open(i)), torch.from_numpy(pictures.class_map(i))
    if image.shape[-2:] != classes.shape:
        sizes = [f"{width}x{height}" for height, width in (image.shape[-2:], classes.shape)]
        raise DataError(f"{pictures.describe(i)} is {sizes[0]} pixels, its map of classes {sizes[1]}")
    return tv_tensors.Image(image), tv_tensors.Mask(classes)


def resized_image(image: Tensor, img_size: int | None) -> Tensor:
    """Pixels (C, H, W) with the shorter side at a number of pixels; as they are for None."""
    return functional.resize(image, [img_size], antialias=True) if img_size is not None else image


def resized(image: tv_tensors.Image, classes: tv_tensors.Mask, img_size: int | None, factor: float = 1.0) -> Sample:
    """An image and its map with the shorter side at a number of pixels, times a factor."""
    height, width = image.shape[-2:]
    factor *= 1 if img_size is None else img_size / min(height, width)
    size = [max(round(extent * factor), 1) for extent in (height, width)]
    if size == [height, width]:
        return image, classes
    return functional.resize(image, size, antialias=True), functional.resize(classes, size)
