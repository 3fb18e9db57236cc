"""Images for training: where they come from and how they are batched."""

from .images import ImageData, LabelledImages, OnBadImage, load_images
from .module import EpochBatches, ImageDataModule, mix_seed, normalize

__all__ = [
    "EpochBatches",
    "ImageData",
    "ImageDataModule",
    "LabelledImages",
    "OnBadImage",
    "load_images",
    "mix_seed",
    "normalize",
]
