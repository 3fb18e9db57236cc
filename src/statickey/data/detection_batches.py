"""Batches of images with objects, decoded and augmented image by image."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as geometry
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat, Image, Mask

from ..models import MaskWindows
from .annotations import DetectionData, ObjectPictures, OnBadSample
from .batches import PlannedDataModule, hold_out
from .pixels import normalize, per_channel
from .plan import BatchPlan, mix_seed
from .readable import readable, substituted

_EVAL_IMAGES = 8
_LEAST_SIDE = 1.0
"""Pixels of a box; what an augmentation leaves smaller is no object any more."""
Batch = tuple[list[Tensor], list[dict[str, Any]]]


@dataclass(frozen=True)
class Rescaling:
    """What is drawn for each training image.

    Args:
        flip: Mirror half of the images.
        scale: Least and greatest factor on its size.
        min_size: Shorter side in pixels at scale 1; None leaves the image's own.
        max_size: Longer side at most, whatever the scale; where images are cropped, at scale 1.
        crop_size: Cut what is longer to a random stretch of this many pixels; None cuts nothing. With ``scale`` from
            0.1 to 2 this is large-scale jitter (Ghiasi et al., arXiv 2012.07177); a detector pads what is shorter.
    """

    flip: bool = True
    scale: tuple[float, float] = (1.0, 1.0)
    min_size: int | None = None
    max_size: int = 1333
    crop_size: int | None = None

    def draw(self, height: int, width: int, generator: torch.Generator) -> "Callable[[Any], Any]":
        """A mapping of images, boxes and masks of this size, the same for all of them."""
        flip = self.flip and float(torch.rand((), generator=generator)) < 0.5
        low, high = self.scale
        factor = low + (high - low) * float(torch.rand((), generator=generator))
        base = 1.0 if self.min_size is None else self.min_size / min(height, width)
        most = self.max_size / max(height, width)
        factor = min(factor * base, most) if self.crop_size is None else factor * min(base, most)
        size = [max(round(height * factor), 1), max(round(width * factor), 1)]
        crop = None if self.crop_size is None else _crop(size, self.crop_size, generator)

        def apply(x: Any) -> Any:
            x = geometry.horizontal_flip(x) if flip else x
            x = x if size == [height, width] else geometry.resize(x, size)
            return x if crop is None else geometry.crop(x, *crop)

        return apply


def _crop(size: Sequence[int], most: int, generator: torch.Generator) -> list[int]:
    """Top, left, height and width of a random part of an image of this height and width."""
    kept = [min(extent, most) for extent in size]
    room = zip(size, kept, torch.rand(2, generator=generator).tolist(), strict=True)
    return [int(place * (extent - own + 1)) for extent, own, place in room] + kept


class DetectionImages(Dataset[Batch]):
    """Batches of images (C, H, W) in uint8, each of its own size, with what is marked on them.

    For training a target has ``boxes``, ``labels``, ``masks`` as cut-outs where masks are learned, and the ``seed``
    of the draws that a detector makes for the image. Crowds are left out: what lies on one is background, as in
    torchvision's and Detectron2's recipes. In evaluation it has all marks as the data have them, masks as run
    lengths, and the ``image_id``.

    Args:
        pictures: The images.
        indices: Those to choose from.
        masks: Whether masks are learned or scored.
        rescaling: What is drawn for training images; None for evaluation.
        on_bad_sample: Refuse an image that cannot be read; or, in training, let the next one take its place, and in
            evaluation leave it out.
    """

    def __init__(
        self,
        pictures: ObjectPictures,
        indices: Sequence[int],
        *,
        masks: bool,
        rescaling: Rescaling | None = None,
        on_bad_sample: OnBadSample = "fail",
    ) -> None:
        self.pictures, self.indices, self.masks, self.rescaling = pictures, indices, masks, rescaling
        self.on_bad_sample = on_bad_sample

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, plan: BatchPlan) -> Batch:
        wanted = plan.indices.tolist()
        if self.rescaling is None:
            samples = readable(self._read, self.indices, wanted, self.on_bad_sample)
            return [image for _, image in samples], [self._as_marked(index) for index, _ in samples]
        read = substituted(self._read, self.indices, wanted, self.on_bad_sample)
        seeds = (mix_seed(plan.seed, place) for place in count(plan.first))
        drawn = [self._drawn(index, image, seed) for (index, image), seed in zip(read, seeds, strict=False)]
        return [image for image, _ in drawn], [target for _, target in drawn]

    def _read(self, index: int) -> tuple[int, Tensor]:
        return index, geometry.pil_to_tensor(self.pictures.open(index))

    def _as_marked(self, index: int) -> dict[str, Any]:
        marked = self.pictures.objects(index)
        target: dict[str, Any] = {"boxes": marked.boxes, "labels": marked.labels, "crowd": marked.crowd}
        target["image_id"] = self.pictures.image_id(index)
        return target | ({"masks": list(marked.masks or ())} if self.masks else {})

    def _drawn(self, index: int, image: Tensor, seed: int) -> tuple[Tensor, dict[str, Any]]:
        assert self.rescaling is not None
        height, width = image.shape[-2:]
        apply = self.rescaling.draw(height, width, torch.Generator().manual_seed(seed))
        marked, cropped = self.pictures.objects(index), self.rescaling.crop_size is not None
        boxes = BoundingBoxes(marked.boxes, format=BoundingBoxFormat.XYXY, canvas_size=(height, width))
        boxes = geometry.clamp_bounding_boxes(apply(boxes)).as_subclass(Tensor)
        kept = ((boxes[:, 2:] - boxes[:, :2]).amin(1) >= _LEAST_SIDE) & ~marked.crowd
        target: dict[str, Any] = {"boxes": boxes[kept], "labels": marked.labels[kept], "seed": seed}
        if self.masks:
            visible: list[int] = []

            def masks() -> Iterator[Tensor]:
                """One at a time, however many there are; of a cropped object only its box may be left."""
                for place, i in enumerate(kept.nonzero().flatten().tolist()):
                    one = replace(marked, masks=(marked.masks or ())[i : i + 1])
                    mask = apply(Mask(one.mask_tensor())).as_subclass(Tensor)[0]
                    if cropped and not mask.any():
                        continue
                    visible.append(place)
                    yield mask

            target["masks"] = MaskWindows.cut(masks())
            target |= {name: target[name][visible] for name in ("boxes", "labels")}
        return apply(Image(image)).as_subclass(Tensor), target


class DetectionDataModule(PlannedDataModule):
    """Training, validation and test batches of images with objects.

    Images are decoded and augmented where they are loaded, each by draws of its own, and normalised on the device; so
    neither loader workers nor processes nor accumulation steps change what a batch holds.

    Args:
        data: The images.
        batch_size: Images per optimizer step, over all processes.
        rescaling: What is drawn for training images.
        masks: Whether masks are learned.
        on_bad_sample: Refuse an image that cannot be read, or skip it.
        seed: Seed of order and augmentation.
        holdout: Share of the training images to hold out, in (0, 1).
        grad_accum_steps: Parts a batch is computed in.
        mean: Normalisation per channel.
        std: As ``mean``.
        num_workers: Loader processes.

    Raises:
        DataError: Too few images to hold some out and train on the rest, or a normalisation of other channels.
    """

    def __init__(
        self,
        data: DetectionData,
        *,
        batch_size: int,
        rescaling: Rescaling,
        masks: bool,
        on_bad_sample: OnBadSample = "fail",
        seed: int = 0,
        holdout: float = 0.1,
        grad_accum_steps: int = 1,
        mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
        std: Sequence[float] = IMAGENET_DEFAULT_STD,
        num_workers: int = 0,
    ) -> None:
        common: Any = {"masks": masks, "on_bad_sample": on_bad_sample}
        held_out, learned = (part.tolist() for part in hold_out(len(data.train), holdout))
        super().__init__(
            DetectionImages(data.train, learned, rescaling=rescaling, **common),
            DetectionImages(data.train, held_out, **common),
            DetectionImages(data.test, range(len(data.test)), **common),
            batch_size=batch_size,
            seed=seed,
            grad_accum_steps=grad_accum_steps,
            num_workers=num_workers,
            eval_batch_size=_EVAL_IMAGES,
        )
        self.rescaling = rescaling
        self.mean = per_channel("mean", mean, data.in_chans)
        self.std = per_channel("std", std, data.in_chans)

    def prepare_training_batch(self, batch: Batch, seed: int, first: int) -> Batch:
        """Normalised images, and their targets."""
        return self.prepare_batch(batch)

    def prepare_batch(self, batch: Batch) -> Batch:
        """Normalised images, and their targets."""
        images, targets = batch
        return [normalize(image, self.mean.to(image.device), self.std.to(image.device)) for image in images], targets
