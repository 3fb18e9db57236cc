"""Batches whose order and augmentation depend on seed and epoch alone."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import DataError
from .augment import BatchAugment
from .images import ImageData, LabelledImages, OnBadImage
from .plan import BatchPlan, mix_seed, seeded
from .sources import Source, Sources, open_sources
from .stream import ImageStream, stream_transforms

EVAL_BATCH = 256


@dataclass(frozen=True)
class StreamedImages:
    """A data set that is decoded as it is needed; in place of an ``ImageData``."""

    name: str
    sources: Sources
    img_size: int
    on_bad_image: OnBadImage = "fail"
    in_chans: int = field(default=3, init=False)
    skipped: tuple[str, ...] = field(default=(), init=False)

    @property
    def flip(self) -> bool:
        """Whether the default augmentation mirrors images."""
        return self.sources.flip

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.sources.class_names

    def fingerprint(self) -> str:
        """A hash of all labels, in their order; pixels are not read."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for part in (self.sources.train, self.sources.test):
            digest.update(repr(list(part.labels)).encode())
        return digest.hexdigest()


def open_stream(
    data: str, *, data_dir: Path | None = None, img_size: int | None = None, on_bad_image: OnBadImage = "fail"
) -> StreamedImages:
    """A data set to decode while training.

    Args:
        data: As in ``load_images``, but for ``digits``.
        data_dir: Where downloads are kept.
        img_size: Side of the images in pixels; default 224.
        on_bad_image: Stop at an unreadable image, or take the next one in its place.

    Raises:
        DataError: The data is missing, empty or inconsistent.
    """
    if data == "digits":
        raise DataError("digits are small and in memory; leave out --stream")
    return StreamedImages(data, open_sources(data, data_dir), 224 if img_size is None else img_size, on_bad_image)


class EpochBatches(Sampler[BatchPlan]):
    """Shuffled batches, planned from (seed, epoch) without touching torch's global random state.

    So every mixer at one seed sees the same batches, whatever it draws itself, and a resumed run goes on with
    the order it would have had. Lightning calls ``set_epoch``. The last, smaller batch is left out.

    Args:
        num_images: Images to choose from.
        batch_size: Images per optimizer step, over all processes.
        seed: Seed of the order.
        steps: Parts of a batch that follow each other.
        rank: This process, of ``world``; it yields its share of every part.
        world: Number of processes.

    Raises:
        DataError: The batch does not divide into so many parts.
    """

    def __init__(
        self, num_images: int, batch_size: int, seed: int, *, steps: int = 1, rank: int = 0, world: int = 1
    ) -> None:
        self.num_images = num_images
        self.batch_size = min(batch_size, num_images)
        if self.batch_size % (steps * world):
            raise DataError(
                f"a batch of {self.batch_size} images does not divide into {world} processes x {steps} "
                f"accumulation steps; use a batch_size that is a multiple of {world * steps}"
            )
        self.seed, self.steps, self.rank, self.world = seed, steps, rank, world
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Plan this epoch next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images // self.batch_size * self.steps

    def __iter__(self) -> Iterator[BatchPlan]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        order = torch.randperm(self.num_images, generator=generator)
        share = self.batch_size // (self.steps * self.world)
        for i in range(self.num_images // self.batch_size):
            indices = order[i * self.batch_size : (i + 1) * self.batch_size]
            for step in range(self.steps):
                first = (step * self.world + self.rank) * share
                yield BatchPlan(indices[first : first + share], mix_seed(self.seed, self.epoch, i), first)


class EvenBatches(Sampler[BatchPlan]):
    """All images in their order, every one once, in as many batches on every process.

    Raises:
        DataError: There are fewer images than processes.
    """

    def __init__(self, num_images: int, rank: int = 0, world: int = 1) -> None:
        if num_images < world:
            raise DataError(f"{num_images} held-out images are too few for {world} processes; raise --holdout")
        self.num_images, self.rank, self.world = num_images, rank, world

    def __len__(self) -> int:
        return -(-self.num_images // (EVAL_BATCH * self.world))

    def __iter__(self) -> Iterator[BatchPlan]:
        order = torch.arange(self.num_images)
        if self.world == 1:
            batches = [order[start : start + EVAL_BATCH] for start in range(0, self.num_images, EVAL_BATCH)]
        else:  # sizes differ by one at most, so that none is empty
            batches = list(order.tensor_split(len(self)))
        for batch in batches:
            yield BatchPlan(batch.tensor_split(self.world)[self.rank], 0)


class MemoryImages(Dataset[tuple[Tensor, Tensor]]):
    """Batches of images in memory, (B, C, H, W) in uint8, with their labels."""

    def __init__(self, part: LabelledImages) -> None:
        self.part = part

    def __len__(self) -> int:
        return len(self.part.labels)

    def __getitem__(self, plan: BatchPlan) -> tuple[Tensor, Tensor]:
        return self.part.images[plan.indices], self.part.labels[plan.indices]


class _Planned(Dataset[tuple[Tensor, Tensor, int, int]]):
    """Batches with what their augmentation is drawn from: the seed and the place of the first image."""

    def __init__(self, images: Any) -> None:
        self.images = images

    def __getitem__(self, plan: BatchPlan) -> tuple[Tensor, Tensor, int, int]:
        return *self.images[plan], plan.seed, plan.first


class _Part(Source):
    """Some images of a source."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices
        self.labels = [source.labels[i] for i in indices]

    def open(self, i: int) -> Any:
        return self.source.open(self.indices[i])

    def describe(self, i: int) -> str:
        return self.source.describe(self.indices[i])


class ImageDataModule(L.LightningDataModule):
    """Training, validation and test batches of images in memory or streamed.

    Batches travel to the device as uint8; there they are augmented, each image by its own draws, and normalised.
    The validation part is held out of the training images, the same for every seed; the test part is only read
    by ``test_dataloader``.

    Args:
        data: The images.
        batch_size: Images per optimizer step, over all processes.
        seed: Seed of order and augmentation.
        holdout: Share of the training images to hold out, in (0, 1).
        grad_accum_steps: Parts a batch is computed in.
        crop_padding: Zero padding of the random crop in pixels; default the data's own.
        flip: Whether to mirror at random; default the data's own.
        auto_augment: RandAugment in timm's words.
        random_erasing: Probability of erasing a rectangle.
        mixup: Alpha of mixup.
        cutmix: Alpha of cutmix.
        label_smoothing: Smoothing of mixed labels.
        mean: Normalisation per channel; default that of the training images, or of ImageNet when streaming.
        std: As ``mean``.
        num_workers: Loader processes.

    Raises:
        DataError: Too few images to hold some out and train on the rest, or an augmentation that does not fit.
    """

    def __init__(
        self,
        data: ImageData | StreamedImages,
        *,
        batch_size: int,
        seed: int = 0,
        holdout: float = 0.1,
        grad_accum_steps: int = 1,
        crop_padding: int | None = None,
        flip: bool | None = None,
        auto_augment: str | None = None,
        random_erasing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        streamed = isinstance(data, StreamedImages)
        train: Any = data.sources.train if isinstance(data, StreamedImages) else data.train
        total = len(train.labels)
        held = round(total * holdout)
        if not 0 < held < total:
            raise DataError(f"holdout={holdout} of {total} training images leaves {total - held}; use more images")
        order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
        self.data, self.batch_size, self.seed, self.steps = data, batch_size, seed, grad_accum_steps
        self.num_train = total - held
        self.crop_padding = 0
        if isinstance(data, ImageData):
            self.crop_padding = data.crop_padding if crop_padding is None else crop_padding
        self.flip = data.flip if flip is None else flip
        self.num_workers = num_workers
        self.augment = BatchAugment(
            crop_padding=self.crop_padding,
            flip=self.flip and not streamed,
            policy=None if streamed else auto_augment,
        )
        self._train: Any
        self._val: Any
        self._test: Any
        if isinstance(data, StreamedImages):
            self._train, self._val, self._test = self._streams(data, order, held, auto_augment)
            statistics = [torch.tensor(x).view(-1, 1, 1) for x in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)]
        else:
            self.val_part, self.train_part = (
                LabelledImages(data.train.images[index], data.train.labels[index])
                for index in (order[:held], order[held:])
            )
            parts = (self.train_part, self.val_part, data.test)
            self._train, self._val, self._test = (MemoryImages(part) for part in parts)
            statistics = list(channel_statistics(self.train_part.images))
        self.mean, self.std = (
            auto if given is None else _per_channel(name, given, data.in_chans)
            for name, given, auto in zip(("mean", "std"), (mean, std), statistics, strict=True)
        )
        self.erasing = random_erasing
        self.mixup = None
        if mixup > 0 or cutmix > 0:
            self.mixup = Mixup(mixup, cutmix, label_smoothing=label_smoothing, num_classes=len(data.class_names))

    def _streams(self, data: StreamedImages, order: Tensor, held: int, policy: str | None) -> tuple[ImageStream, ...]:
        plain = stream_transforms(data.img_size, train=False)
        augmented = stream_transforms(data.img_size, train=True, policy=policy, flip=self.flip)
        train = data.sources.train
        parts = (_Part(train, order[held:].tolist()), _Part(train, order[:held].tolist()), data.sources.test)
        return tuple(
            ImageStream(part, transform, len(data.class_names), data.on_bad_image, substitute=transform is augmented)
            for part, transform in zip(parts, (augmented, plain, plain), strict=True)
        )

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in an order of their own each epoch, to be augmented on the device."""
        sampler = self.plan(*self._place())
        # loader workers plan ahead, before Lightning says which epoch a resumed run is in
        task = None if self.trainer is None else getattr(self.trainer, "lightning_module", None)
        sampler.set_epoch(len(getattr(task, "curve", ())))
        return self._loader(_Planned(self._train), sampler)

    def plan(self, rank: int = 0, world: int = 1) -> EpochBatches:
        """The training batches of one process.

        Raises:
            DataError: The batch does not divide, or mixup has no pairs in a part of it.
        """
        sampler = EpochBatches(self.num_train, self.batch_size, self.seed, steps=self.steps, rank=rank, world=world)
        share = sampler.batch_size // (self.steps * world)
        if self.mixup is not None and share % 2:
            raise DataError(f"mixup pairs images, but {share} are computed at once; use an even number")
        return sampler

    def val_dataloader(self) -> DataLoader[Any]:
        """The held-out training images."""
        return self._loader(self._val, EvenBatches(len(self._val), *self._place()))

    def test_dataloader(self) -> DataLoader[Any]:
        """The test images, all of them whatever the number of processes."""
        return self._loader(self._test, EvenBatches(len(self._test)))

    def holdout_dataloader(self) -> DataLoader[Any]:
        """The held-out training images, all of them whatever the number of processes."""
        return self._loader(self._val, EvenBatches(len(self._val)))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Augment a training batch and normalise any, on the device.

        Returns:
            Images (B, C, H, W) in float32, and labels (B,), or (B, num_classes) once mixed.
        """
        images, labels, *plan = batch
        if not plan:
            return self.normalize(images), labels
        seed, first = plan
        generator = torch.Generator().manual_seed(seed)
        draws = self.augment.draw(min(self.batch_size, self.num_train), generator)
        images = self.normalize(self.augment(images, draws.rows(slice(first, first + len(images)))))
        if self.erasing > 0 or self.mixup is not None:
            with seeded(mix_seed(seed, first, 1)):
                if self.erasing > 0:
                    # noise of the CPU: a device's generator is the model's too, and mixers differ in what they draw
                    images = RandomErasing(self.erasing, mode="pixel", device="cpu")(images)
                if self.mixup is not None:
                    images, labels = self.mixup(images, labels)
        return images, labels

    def normalize(self, images: Tensor) -> Tensor:
        """Images in uint8 to zero mean and unit variance, float32."""
        if self.mean.device != images.device:  # once: a copy to an accelerator waits for it
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        return normalize(images, self.mean, self.std)

    def _place(self) -> tuple[int, int]:
        """This process and their number."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _loader(self, images: Any, sampler: Sampler[BatchPlan]) -> DataLoader[Any]:
        return DataLoader(
            images,
            batch_size=None,
            sampler=sampler,
            collate_fn=_as_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            # without a generator of its own, opening an iterator advances torch's global random state, and when
            # Lightning opens it differs between a fresh and a resumed run
            generator=torch.Generator(),
        )


def _as_is(batch: Any) -> Any:
    return batch


def _per_channel(name: str, values: Sequence[float], in_chans: int) -> Tensor:
    if len(values) != in_chans:
        raise DataError(f"{name}={list(values)} has {len(values)} numbers for images of {in_chans} channels")
    return torch.tensor(values).view(-1, 1, 1)


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
