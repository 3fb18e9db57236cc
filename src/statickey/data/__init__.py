"""Images for training: where they come from and how they are batched."""

from .annotations import (
    IGNORE_INDEX,
    DetectionData,
    MapPictures,
    ObjectPictures,
    Objects,
    OnBadSample,
    Pictures,
    SegmentationData,
    run_length_tools,
)
from .augment import Augmentation, BatchAugment
from .batches import EpochBatches, PlannedDataModule, PlannedImages, hold_out
from .dense import open_detection, open_segmentation
from .folders import IMAGE_SUFFIXES, image_files
from .images import ImageData, LabelledImages, load_images
from .module import ImageDataModule, settled_augmentation
from .pixels import UNREADABLE, normalize, open_image, square, to_mode
from .plan import BatchPlan, mix_seed
from .segmentation_batches import SegmentationDataModule, resized_image
from .source import DataSet, OnBadImage
from .stream import StreamedImages, open_stream, stream_transforms

__all__ = [
    "IGNORE_INDEX",
    "IMAGE_SUFFIXES",
    "UNREADABLE",
    "Augmentation",
    "BatchAugment",
    "BatchPlan",
    "DataSet",
    "DetectionData",
    "EpochBatches",
    "ImageData",
    "ImageDataModule",
    "LabelledImages",
    "MapPictures",
    "ObjectPictures",
    "Objects",
    "OnBadImage",
    "OnBadSample",
    "Pictures",
    "PlannedDataModule",
    "PlannedImages",
    "SegmentationData",
    "SegmentationDataModule",
    "StreamedImages",
    "hold_out",
    "image_files",
    "load_images",
    "mix_seed",
    "normalize",
    "open_detection",
    "open_image",
    "open_segmentation",
    "open_stream",
    "resized_image",
    "run_length_tools",
    "settled_augmentation",
    "square",
    "stream_transforms",
    "to_mode",
]
