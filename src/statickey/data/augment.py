"""What happens to the images of a training batch: what is asked for, what is drawn, and its application.

Everything is drawn on the CPU from the seed of the whole batch, and what happens to an image depends on its place in
that batch alone. So a process, or a part of an accumulated batch, does to its images what one process would do.
"""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from .._checks import check_count, check_not_negative, check_probability, check_rate, check_types
from ..errors import DataError
from .plan import mix_seed, seeded
from .randaugment import apply_ops, draw_ops, parse_policy


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to training images.

    Args:
        label_smoothing: Mass moved from the label to all classes.
        crop_padding: Padding of the random crop in pixels; default an eighth of the image, none for digits.
        flip: Mirror images at random; default yes, except for digits.
        auto_augment: RandAugment in timm's notation, such as rand-m9-n2-mstd0.5, different for every image.
        random_erasing: Probability of erasing a rectangle.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of cutmix; 0 for none.

    Raises:
        StaticKeyError: A value outside its range.
    """

    label_smoothing: float = 0.1
    crop_padding: int | None = None
    flip: bool | None = None
    auto_augment: str | None = None
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        check_rate(label_smoothing=self.label_smoothing)
        check_probability(random_erasing=self.random_erasing)
        check_types(self)
        check_not_negative(
            mixup=self.mixup, cutmix=self.cutmix, crop_padding=0 if self.crop_padding is None else self.crop_padding
        )
        parse_policy(self.auto_augment)


@dataclass(frozen=True)
class Draws:
    """What was drawn for each image of a batch: tensors on the CPU, or None where nothing is to be done."""

    offsets: Tensor | None = None
    """Row and column where the crop begins, (B, 2)."""
    mirrored: Tensor | None = None
    """Whether to mirror, (B,)."""
    ops: Tensor | None = None
    """Place in ``OPS`` of each operation, (B, n); -1 does nothing."""
    strengths: Tensor | None = None
    """Magnitude over 10 with a random sign, (B, n), in [-1, 1]."""

    def rows(self, index: slice | Tensor) -> "Draws":
        """What was drawn for these images alone."""
        parts = (self.offsets, self.mirrored, self.ops, self.strengths)
        return Draws(*(None if part is None else part[index] for part in parts))


class BatchAugment:
    """Random crop, mirroring and RandAugment for a batch of images in uint8.

    Drawing is apart from applying: in training on several devices each draws for the whole batch and applies its
    rows. Nothing is drawn on the device, so none waits for it.

    Args:
        crop_padding: Zero padding of the random crop in pixels; 0 for no crop.
        flip: Whether to mirror at random.
        policy: RandAugment in timm's notation, see ``parse_policy``.

    Raises:
        StaticKeyError: A padding that is no whole number from 0, or a policy of another form.
    """

    def __init__(self, *, crop_padding: int = 0, flip: bool = False, policy: str | None = None) -> None:
        check_count(crop_padding=crop_padding)
        self.crop_padding, self.flip = crop_padding, flip
        self.policy = parse_policy(policy)

    def draw(self, num_images: int, generator: torch.Generator) -> Draws:
        """Draw for this many images, from a generator on the CPU."""
        offsets = mirrored = ops = strengths = None
        if self.crop_padding:
            drawn = torch.randint(0, 2 * self.crop_padding + 1, (2, num_images, 1), generator=generator)
            offsets = drawn.squeeze(2).T
        if self.flip:
            mirrored = torch.rand(num_images, generator=generator) < 0.5
        if self.policy is not None:
            ops, strengths = draw_ops(self.policy, num_images, generator)
        return Draws(offsets, mirrored, ops, strengths)

    def __call__(self, images: Tensor, draws: Draws) -> Tensor:
        """Augment images (B, C, H, W) in uint8, C 1 or 3, into new ones of the same shape.

        Raises:
            DataError: Images of another kind, or draws for another number of them.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise DataError(f"images {tuple(images.shape)} in {images.dtype} must be (B, 1 or 3, H, W) in uint8")
        for part in (draws.offsets, draws.mirrored, draws.ops):
            if part is not None and len(part) != len(images):
                raise DataError(f"{len(part)} draws for {len(images)} images; take their rows with draws.rows")
        if draws.offsets is not None:
            images = shifted_crop(images, draws.offsets, self.crop_padding)
        if draws.mirrored is not None:
            mirrored = draws.mirrored.to(images.device, non_blocking=True)
            images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
        if draws.ops is not None and draws.strengths is not None:
            images = images.clone(memory_format=torch.contiguous_format)
            for ops, strengths in zip(draws.ops.unbind(1), draws.strengths.unbind(1), strict=True):
                apply_ops(images, ops, strengths)
        return images


def shifted_crop(images: Tensor, offsets: Tensor, padding: int) -> Tensor:
    """Cut every image (B, C, H, W) out of its zero-padded self, at its own offset (B, 2) of 0 to 2 * padding."""
    height, width = images.shape[2:]
    windows = F.pad(images, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    row, col = offsets.to(images.device, non_blocking=True).unbind(1)
    return windows[torch.arange(len(images), device=images.device), :, row, col]


def erase_rectangles(images: Tensor, probability: float, seed: int, first: int) -> None:
    """Fill a random rectangle of some images with normal noise, in place: timm's ``RandomErasing``.

    Args:
        images: Normalised images (B, C, H, W).
        probability: Share of the images that lose a rectangle.
        seed: Seed of the whole batch.
        first: Place of the first image in the whole batch.
    """
    # noise of the CPU: a device's generator is the model's too, and mixers differ in what they draw
    erasing = RandomErasing(probability, mode="pixel", device="cpu")
    with seeded(seed):
        for place, image in enumerate(images, first):
            own_seed = mix_seed(seed, place, 1)
            random.seed(own_seed)
            torch.default_generator.manual_seed(own_seed)
            erasing(image)


def mix_pairs(images: Tensor, labels: Tensor, mixup: Mixup, seed: int) -> tuple[Tensor, Tensor]:
    """Mix each image with its neighbour, the first with the second and so on: timm's mixup and cutmix.

    All images of a batch are mixed in the same way, and neighbours stay together in every part of even size.

    Args:
        images: Normalised images (B, C, H, W), B even.
        labels: Their classes (B,).
        mixup: timm's, in the mode of batches.
        seed: Seed of the whole batch.

    Returns:
        Images (B, C, H, W) and shares of the classes (B, num_classes).
    """
    order = torch.arange(len(images), device=images.device)
    mirrored_pairs = torch.cat([order[0::2], order[1::2].flip(0)])  # timm mixes the first with the last
    with seeded(mix_seed(seed, -1)):
        images, labels = mixup(images[mirrored_pairs], labels[mirrored_pairs])
    back = mirrored_pairs.argsort()
    return images[back], labels[back]
