"""Batches whose order and augmentation depend on seed and epoch alone, whatever they hold."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Protocol

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import DataError
from .plan import BatchPlan, mix_seed

EVAL_BATCH = 256


class PlannedImages(Protocol):
    """Images that make a batch of a plan; picklable, so that spawned workers can read them."""

    def __len__(self) -> int: ...

    def __getitem__(self, plan: BatchPlan) -> Any: ...


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
        DataError: The batch does not divide into this number of parts.
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
        self.images_at_once = self.batch_size // (steps * world)
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
        for i in range(self.num_images // self.batch_size):
            indices = order[i * self.batch_size : (i + 1) * self.batch_size]
            for step in range(self.steps):
                first = (step * self.world + self.rank) * self.images_at_once
                part = indices[first : first + self.images_at_once]
                yield BatchPlan(part, mix_seed(self.seed, self.epoch, i), first)


def even_batches(num_images: int, rank: int = 0, world: int = 1, batch_size: int = EVAL_BATCH) -> list[BatchPlan]:
    """All images in order, each once; every process gets the same number of batches, and none of them is empty.

    Raises:
        DataError: There are fewer images than processes.
    """
    if num_images < world:
        raise DataError(f"{num_images} held-out images are too few for {world} processes; raise --holdout")
    order = torch.arange(num_images)
    # with several processes sizes differ by one at most, so that no share is empty
    batches = (
        torch.split(order, batch_size) if world == 1 else order.tensor_split(-(-num_images // (batch_size * world)))
    )
    return [BatchPlan(batch.tensor_split(world)[rank], 0) for batch in batches]


def hold_out(total: int, holdout: float) -> tuple[Tensor, Tensor]:
    """Indices of the images held out and of those to train on, the same for every seed.

    Raises:
        DataError: Too few images to hold some out and train on the rest.
    """
    if not 0 < holdout < 1:
        raise DataError(f"holdout={holdout} must be in (0, 1)")
    num_held_out = round(total * holdout)
    if not 0 < num_held_out < total:
        raise DataError(
            f"holdout={holdout} of {total} training images leaves {total - num_held_out}; use more images"
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    return order[:num_held_out], order[num_held_out:]


class _TrainingBatch(NamedTuple):
    """A batch, or a part of one, with what its augmentation is drawn from."""

    content: Any
    seed: int
    first: int


class _TrainingBatches(Dataset[_TrainingBatch]):
    """Batches of images, each with its seed and place."""

    def __init__(self, images: PlannedImages) -> None:
        self.images = images

    def __getitem__(self, plan: BatchPlan) -> _TrainingBatch:
        return _TrainingBatch(self.images[plan], plan.seed, plan.first)


class PlannedDataModule(L.LightningDataModule):
    """Training, validation and test batches of any kind, the same whatever the processes and loader workers.

    A batch is what the images make of a plan; it travels to the device as it is, and there a subclass augments and
    normalises it. The validation part is held out of the training images; the test part is only read by
    ``scoring_dataloader``.

    Args:
        train: The training images.
        val: The held-out training images.
        test: The test images.
        batch_size: Images per optimizer step, over all processes.
        seed: Seed of order and augmentation.
        grad_accum_steps: Parts a batch is computed in.
        eval_batch_size: Images scored at once by a process.
        num_workers: Loader processes.
    """

    def __init__(
        self,
        train: PlannedImages,
        val: PlannedImages,
        test: PlannedImages,
        *,
        batch_size: int,
        seed: int = 0,
        grad_accum_steps: int = 1,
        eval_batch_size: int = EVAL_BATCH,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        self.train_images, self.val_images, self.test_images = train, val, test
        self.batch_size, self.seed, self.grad_accum_steps = min(batch_size, len(train)), seed, grad_accum_steps
        self.num_workers, self.eval_batch_size = num_workers, eval_batch_size

    def prepare_training_batch(self, batch: Any, seed: int, first: int) -> Any:
        """Augment and normalise a training batch on the device; here it passes through untouched.

        Args:
            batch: A batch, or a part of one.
            seed: What all that is drawn for the whole batch comes from.
            first: Place of the first image in the whole batch, of ``batch_size`` images.
        """
        return batch

    def prepare_batch(self, batch: Any) -> Any:
        """Normalise a batch for evaluation on the device; here it passes through untouched."""
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Prepare a batch on the device, where Lightning brought it."""
        if isinstance(batch, _TrainingBatch):
            return self.prepare_training_batch(*batch)
        return self.prepare_batch(batch)

    def plan(self, rank: int = 0, world: int = 1) -> EpochBatches:
        """The training batches of one process.

        Raises:
            DataError: The batch does not divide.
        """
        steps = self.grad_accum_steps
        return EpochBatches(len(self.train_images), self.batch_size, self.seed, steps=steps, rank=rank, world=world)

    def train_dataloader(self) -> DataLoader[Any]:
        """Batches in an order of their own each epoch, to be augmented on the device."""
        sampler = self.plan(*self._rank_and_world())
        # loader workers plan ahead, before Lightning says which epoch a resumed run is in
        task = None if self.trainer is None else getattr(self.trainer, "lightning_module", None)
        sampler.set_epoch(len(getattr(task, "curve", ())))
        return self._loader(_TrainingBatches(self.train_images), sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        """The held-out training images."""
        plans = even_batches(len(self.val_images), *self._rank_and_world(), self.eval_batch_size)
        return self._loader(self.val_images, plans)

    def scoring_dataloader(self, split: Literal["test", "holdout"]) -> DataLoader[Any]:
        """This process's share of the test images or of those held out, in their order; it may be empty."""
        images = self.test_images if split == "test" else self.val_images
        rank, world = self._rank_and_world()
        share = torch.arange(len(images)).tensor_split(world)[rank]
        plans = [BatchPlan(part, 0) for part in torch.split(share, self.eval_batch_size) if len(part)]
        return self._loader(images, plans)

    def _rank_and_world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _loader(self, images: Any, sampler: Sampler[BatchPlan] | Sequence[BatchPlan]) -> DataLoader[Any]:
        return DataLoader(
            images,
            batch_size=None,
            sampler=sampler,
            collate_fn=_untouched,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.trainer is not None and self.trainer.strategy.root_device.type == "cuda",
            # without a generator of its own, opening an iterator advances torch's global random state, and when
            # Lightning opens it differs between a fresh and a resumed run
            generator=torch.Generator(),
        )


def _untouched(batch: Any) -> Any:
    """In place of torch's own conversion, which would make lists of tuples and tensors of arrays."""
    return batch
