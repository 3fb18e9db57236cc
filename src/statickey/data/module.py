"""Batches whose order and augmentation depend on seed and epoch alone."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import DataError
from .images import ImageData, LabelledImages


class BatchPlan(NamedTuple):
    """Which images form a batch, and the seed of their augmentation."""

    indices: Tensor
    seed: int


class EpochBatches(Sampler[BatchPlan]):
    """Shuffled batches, planned from (seed, epoch) without touching torch's global random state.

    So every mixer at one seed sees the same batches, whatever it draws itself, and a resumed run goes on with
    the order it would have had. Lightning calls ``set_epoch``. The last, smaller batch is left out.
    """

    def __init__(self, num_images: int, batch_size: int, seed: int) -> None:
        self.num_images = num_images
        self.batch_size = min(batch_size, num_images)
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Plan this epoch next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images // self.batch_size

    def __iter__(self) -> Iterator[BatchPlan]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        order = torch.randperm(self.num_images, generator=generator)
        for i in range(len(self)):
            indices = order[i * self.batch_size : (i + 1) * self.batch_size]
            yield BatchPlan(indices, mix_seed(self.seed, self.epoch, i))


class AugmentedImages(Dataset[tuple[Tensor, Tensor]]):
    """Batches of normalised training images, randomly cropped and mirrored."""

    def __init__(self, part: LabelledImages, mean: Tensor, std: Tensor, *, crop_padding: int, flip: bool) -> None:
        self.part, self.mean, self.std = part, mean, std
        self.crop_padding, self.flip = crop_padding, flip

    def __getitem__(self, plan: BatchPlan) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(plan.seed)
        images = self.part.images[plan.indices]
        images = random_crop(images, self.crop_padding, generator)
        if self.flip:
            mirrored = torch.rand(len(images), generator=generator) < 0.5
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
        return normalize(images, self.mean, self.std), self.part.labels[plan.indices]


class PlainImages(Dataset[tuple[Tensor, Tensor]]):
    """Normalised images, one by one, in their order."""

    def __init__(self, part: LabelledImages, mean: Tensor, std: Tensor) -> None:
        self.part, self.mean, self.std = part, mean, std

    def __len__(self) -> int:
        return len(self.part.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return normalize(self.part.images[indices], self.mean, self.std), self.part.labels[indices]


class ImageDataModule(L.LightningDataModule):
    """Training, validation and test batches of an ``ImageData``.

    The validation part is held out of the training images, the same for every seed; the test part is only
    read by ``test_dataloader``.

    Args:
        data: The images.
        batch_size: Images per step.
        seed: Seed of order and augmentation.
        holdout: Share of the training images to hold out, in (0, 1).
        crop_padding: Zero padding of the random crop in pixels; default the data's own.
        flip: Whether to mirror at random; default the data's own.

    Raises:
        DataError: Too few images to hold some out and train on the rest.
    """

    def __init__(
        self,
        data: ImageData,
        *,
        batch_size: int,
        seed: int = 0,
        holdout: float = 0.1,
        crop_padding: int | None = None,
        flip: bool | None = None,
    ) -> None:
        super().__init__()
        total = len(data.train.labels)
        held = round(total * holdout)
        if not 0 < held < total:
            raise DataError(f"holdout={holdout} of {total} training images leaves {total - held}; use more images")
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.val_part, self.train_part = (
            LabelledImages(data.train.images[index], data.train.labels[index])
            for index in (order[:held], order[held:])
        )
        self.mean, self.std = channel_statistics(self.train_part.images)
        self.crop_padding = data.crop_padding if crop_padding is None else crop_padding
        self.flip = data.flip if flip is None else flip

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Augmented batches, in an order of their own each epoch."""
        images = AugmentedImages(self.train_part, self.mean, self.std, crop_padding=self.crop_padding, flip=self.flip)
        sampler = EpochBatches(len(self.train_part.labels), self.batch_size, self.seed)
        return _loader(images, batch_size=None, sampler=sampler)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The held-out training images."""
        return self._plain(self.val_part)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """The test images."""
        return self._plain(self.data.test)

    def _plain(self, part: LabelledImages) -> DataLoader[tuple[Tensor, Tensor]]:
        images = PlainImages(part, self.mean, self.std)
        return _loader(images, batch_size=256, collate_fn=_as_is)


def _loader(images: Dataset[tuple[Tensor, Tensor]], **options: Any) -> DataLoader[tuple[Tensor, Tensor]]:
    # without a generator of its own, opening an iterator advances torch's global random state, and when
    # Lightning opens it differs between a fresh and a resumed run
    return DataLoader(images, generator=torch.Generator(), **options)


def _as_is(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return batch


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several small numbers, the same on every machine."""
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = ((state ^ (part + 0x9E3779B97F4A7C15)) * 0xBF58476D1CE4E5B9) % 2**64
        state ^= state >> 31
    return state >> 1


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel, (C, 1, 1) each, of images in [0, 1]."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.transpose(0, 1)])
    weights = counts.double() / counts.sum(dim=1, keepdim=True)
    mean = weights @ levels
    std = (weights @ levels.square() - mean.square()).clamp_min(1e-8).sqrt()
    return mean.float().view(-1, 1, 1), std.float().view(-1, 1, 1)


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Images in uint8 to zero mean and unit variance, float32."""
    return (images.float() / 255 - mean) / std


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Shift every image by its own offset of up to ``padding`` pixels, zeros coming in."""
    if padding == 0:
        return images
    batch, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    offsets = torch.randint(0, 2 * padding + 1, (2, batch, 1), generator=generator)
    rows = (offsets[0] + torch.arange(height)).unsqueeze(2)
    cols = (offsets[1] + torch.arange(width)).unsqueeze(1)
    return padded[torch.arange(batch).view(-1, 1, 1), rows, cols].permute(0, 3, 1, 2)
