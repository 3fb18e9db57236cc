"""Images for training: where they come from and how they are batched."""

from .augment import BatchAugment
from .images import ImageData, LabelledImages, OnBadImage, load_images, square
from .module import EpochBatches, ImageDataModule, StreamedImages, normalize, open_stream
from .plan import mix_seed
from .sources import IMAGE_SUFFIXES, UNREADABLE
from .stream import stream_transforms

__all__ = [
    "IMAGE_SUFFIXES",
    "UNREADABLE",
    "BatchAugment",
    "EpochBatches",
    "ImageData",
    "ImageDataModule",
    "LabelledImages",
    "OnBadImage",
    "StreamedImages",
    "load_images",
    "mix_seed",
    "normalize",
    "open_stream",
    "square",
    "stream_transforms",
]
