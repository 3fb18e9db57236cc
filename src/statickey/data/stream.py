"""Images that are decoded and augmented as they are needed, for data that do not fit into memory."""

import hashlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment
from torch import Tensor
from torch.utils.data import Dataset

from .._checks import check_choice
from ..errors import DataError
from .pixels import check_side
from .plan import BatchPlan, mix_seed, seeded
from .randaugment import parse_policy
from .source import OnBadImage, Source, Sources, read_rgb
from .sources import open_sources


@dataclass(frozen=True)
class StreamedImages:
    """A data set that is decoded on demand, where ``ImageData`` is in memory."""

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
        """A hash of all labels and, where they have some, names of images, in their order; pixels are not read."""
        return self._digest(names=True)

    def fingerprint_of_0_1(self) -> str:
        """As version 0.1 made it: of the labels alone."""
        return self._digest(names=False)

    def _digest(self, *, names: bool) -> str:
        digest = hashlib.sha256(repr(self.class_names).encode())
        for part in (self.sources.train, self.sources.test):
            digest.update(repr(list(part.labels)).encode())
            if names:
                digest.update(repr(list(part.names())).encode(errors="surrogatepass"))
        return digest.hexdigest()


def open_stream(
    data: str, *, data_dir: Path | None = None, img_size: int | None = None, on_bad_image: OnBadImage = "fail"
) -> StreamedImages:
    """A data set to decode while training.

    Args:
        data: As in ``load_images``, except ``digits``.
        data_dir: Where downloads are kept.
        img_size: Side of the images in pixels; default 224.
        on_bad_image: Stop at an unreadable image, or take the next one in its place.

    Raises:
        DataError: The data is missing, empty or inconsistent.
    """
    if data == "digits":
        raise DataError("digits are small and in memory; leave out --stream")
    check_side(img_size)
    check_choice(on_bad_image=(on_bad_image, get_args(OnBadImage)))
    return StreamedImages(data, open_sources(data, data_dir), 224 if img_size is None else img_size, on_bad_image)


class ImageStream(Dataset[tuple[Tensor, Tensor]]):
    """Batches of a source's images, decoded when asked for.

    What a batch holds depends on its plan alone: every image is transformed under random generators seeded from
    the plan and the image's place in the batch, so the number of workers, the rank and a resumed run change
    nothing. Use it with ``batch_size=None`` and a sampler of plans.

    Args:
        source: The images.
        transform: Makes uint8 pixels (C, H, W), a tensor or an array, of an RGB image. It may draw from the global
            generators of Python, NumPy and torch, as timm's transforms do.
        num_classes: Labels are below this.
        on_bad_image: Refuse an unreadable image, or warn and skip it.
        substitute: Replace an unreadable image by the next readable one, as training needs full batches; otherwise
            leave it out.

    Raises:
        DataError: A label is missing or outside the classes; for unreadable images, see ``on_bad_image``.
    """

    def __init__(
        self,
        source: Source,
        transform: Callable[[Image.Image], Any],
        num_classes: int,
        on_bad_image: OnBadImage = "fail",
        *,
        substitute: bool = True,
    ) -> None:
        check_choice(on_bad_image=(on_bad_image, get_args(OnBadImage)))
        self.source, self.transform = source, transform
        self.on_bad_image, self.substitute = on_bad_image, substitute
        self.labels = torch.tensor([source.label(i, num_classes) for i in range(len(source))], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, plan: BatchPlan) -> tuple[Tensor, Tensor]:
        """Images (B, 3, H, W) in uint8 and labels (B,) of the planned batch."""
        images = []
        shown = []
        for place, wanted in enumerate(plan.indices.tolist(), plan.first):
            found = self._readable(wanted)
            if found is None:
                continue
            i, image = found
            with seeded(mix_seed(plan.seed, place)):
                images.append(torch.as_tensor(self.transform(image)))
            shown.append(i)
        if not images:
            raise DataError(f"none of {len(plan.indices)} images in a row could be read; mend the data")
        return torch.stack(images), self.labels[shown]

    def _readable(self, wanted: int) -> tuple[int, Image.Image] | None:
        """The image wanted, or the next one that can be decoded, with its index; None where none may stand in."""
        for step in range(len(self) if self.substitute else 1):
            i = (wanted + step) % len(self)
            image = read_rgb(self.source, i, self.on_bad_image)
            if not isinstance(image, str):
                return i, image
            instead = "the next one takes its place" if self.substitute else "left out"
            warnings.warn(f"cannot read image {image}; {instead}", stacklevel=2)
        if not self.substitute:
            return None
        raise DataError(f"no readable image left; the last bad one is {self.source.describe(i)}; mend the data")


def stream_transforms(
    img_size: int, *, train: bool, policy: str | None = None, flip: bool = True
) -> Callable[[Image.Image], Tensor]:
    """The transform of timm's that makes uint8 pixels (3, img_size, img_size) of an RGB image.

    Args:
        img_size: Side of the result in pixels.
        train: Crop a random part of 8% of the area or more and augment it, or crop the centre of 87.5% of the side.
        policy: RandAugment for training, see ``parse_policy``. The operations are timm's, those of
            ``BatchAugment`` and solarize-add.
        flip: Whether to mirror at random in training.

    Raises:
        DataError: A size outside its range, or a policy of another form.
    """
    check_side(img_size)
    parsed = parse_policy(policy)
    transform: Callable[[Image.Image], Tensor] = create_transform(
        img_size,
        is_training=train,
        hflip=0.5 if flip else 0.0,
        color_jitter=None,
        auto_augment=None if parsed is None else str(parsed),
        interpolation="bicubic",
        crop_pct=0.875,
        use_prefetcher=True,
    )
    for step in getattr(transform, "transforms", ()):
        if isinstance(step, RandAugment):
            for op in step.ops:
                if op.name == "PosterizeIncreasing":
                    op.level_fn = _posterize_bits
    return transform


def _posterize_bits(level: float, hparams: Any) -> tuple[int]:
    """Bits to keep, as in ``BatchAugment``; timm's own rule ends at none, which Pillow 13 refuses."""
    return (8 - round(0.4 * level),)
