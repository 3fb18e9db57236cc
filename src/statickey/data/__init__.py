"""Images for training: where they come from and how they are batched."""

from .augment import Augmentation, BatchAugment
from .batches import EpochBatches, PlannedDataModule, PlannedImages, hold_out
from .folders import IMAGE_SUFFIXES, image_files
from .images import ImageData, LabelledImages, load_images
from .module import ImageDataModule, settled_augmentation
from .pixels import UNREADABLE, normalize, open_image, square, to_mode
from .plan import BatchPlan, mix_seed
from .source import DataSet, OnBadImage
from .stream import StreamedImages, open_stream, stream_transforms

__all__ = [
    "IMAGE_SUFFIXES",
    "UNREADABLE",
    "Augmentation",
    "BatchAugment",
    "BatchPlan",
    "DataSet",
    "EpochBatches",
    "ImageData",
    "ImageDataModule",
    "LabelledImages",
    "OnBadImage",
    "PlannedDataModule",
    "PlannedImages",
    "StreamedImages",
    "hold_out",
    "image_files",
    "load_images",
    "mix_seed",
    "normalize",
    "open_image",
    "open_stream",
    "settled_augmentation",
    "square",
    "stream_transforms",
    "to_mode",
]
