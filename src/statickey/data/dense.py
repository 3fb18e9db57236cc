"""Where data with objects or maps of classes come from: a name or a folder, and the layout that is there."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

from .._checks import check_choice
from ..errors import DataError
from .annotations import DetectionData, MapPart, ObjectPart, OnBadSample, Pictures, SegmentationData
from .coco import coco_data, coco_files
from .images import draw_indices
from .layout import BadSamples
from .mask_folders import is_voc_masks, mask_folder, mask_folder_data, voc_mask_data
from .scenes import DIGITS, read_scenes
from .sources import check_names
from .voc import is_voc_objects, voc_data
from .yolo import yolo_data, yolo_file

SCENES = "scenes"


def open_detection(data: str, *, limit: int | None = None, on_bad_sample: OnBadSample = "fail") -> DetectionData:
    """Images with objects, marked by boxes and, in some data, masks.

    Args:
        data: ``"scenes"``, digits drawn on a canvas from a seed, or a folder that holds one of: COCO's
            ``instances_train.json`` and ``instances_val.json``, or else ``validation`` or ``test``, in it or its
            folder ``annotations``, with images under ``train`` and ``val`` or ``images/train`` and ``images/val``;
            the names of splits may end in a year, as ``train2017``; YOLO's ``data.yaml``, with labels in folders
            ``labels`` beside ``images``; or, as Pascal VOC, ``JPEGImages``, ``Annotations`` and
            ``ImageSets/Main/train.txt`` and ``val.txt`` (or else ``validation`` or ``test``).
        limit: Use this many training images, drawn once at random.
        on_bad_sample: Refuse data with a sample that cannot be used, or leave such samples out, image and marks.

    Raises:
        DataError: The data is missing, torn or inconsistent; the message names the place.
    """
    bad = _bad_samples(limit, on_bad_sample)
    if data == SCENES:
        scenes = read_scenes(limit)
        return DetectionData(data, DIGITS, *scenes, True, tuple(range(10)), flip=False)
    root = _root(data)
    files, described = coco_files(root), yolo_file(root)
    if files:
        found = coco_data(data, root, files, bad)
    elif described is not None:
        found = yolo_data(data, root, described, bad)
    elif is_voc_objects(root):
        found = voc_data(data, root, bad)
    else:
        raise DataError(
            f"{root} holds no objects that are known: neither COCO's instances_train.json, in it or in annotations, "
            "nor YOLO's data.yaml, nor Pascal VOC's Annotations and JPEGImages"
        )
    _check(found, found.train, found.test)
    return (
        found
        if limit is None
        else replace(found, train=ObjectPart(found.train, draw_indices(len(found.train), limit)))
    )


def open_segmentation(
    data: str, *, limit: int | None = None, on_bad_sample: OnBadSample = "fail"
) -> SegmentationData:
    """Images with a class for every pixel.

    Args:
        data: ``"scenes"``, digits drawn on a canvas from a seed, or a folder that holds one of: images under
            ``images/train`` (or ``training``) and ``images/val`` (or else ``validation`` or ``test``), with PNG masks
            of the same names under ``masks`` or ``annotations``, and an optional ``classes.json``, see
            ``read_classes``; or, as Pascal VOC, ``JPEGImages``, ``SegmentationClass`` and
            ``ImageSets/Segmentation/train.txt`` and ``val.txt``. Masks hold indices of classes, 255 for none. Without
            ``classes.json`` the training masks are read for the highest index.
        limit: Use this many training images, drawn once at random.
        on_bad_sample: Refuse data with a sample that cannot be used, or leave such samples out. Indices that no class
            has are found when a mask is read.

    Raises:
        DataError: The data is missing, torn or inconsistent; the message names the place.
    """
    bad = _bad_samples(limit, on_bad_sample)
    if data == SCENES:
        return SegmentationData(data, ("background", *DIGITS), *read_scenes(limit), flip=False)
    root = _root(data)
    masks = mask_folder(root)
    if masks is not None:
        found = mask_folder_data(data, root, masks, bad)
    elif is_voc_masks(root):
        found = voc_mask_data(data, root, bad)
    else:
        raise DataError(
            f"{root} holds no maps of classes that are known: neither images/train beside masks/train or "
            "annotations/train, nor SegmentationClass of Pascal VOC"
        )
    _check(found, found.train, found.test)
    return (
        found if limit is None else replace(found, train=MapPart(found.train, draw_indices(len(found.train), limit)))
    )


def _bad_samples(limit: int | None, on_bad_sample: OnBadSample) -> BadSamples:
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} must be a positive number; or leave it out")
    check_choice(on_bad_sample=(on_bad_sample, get_args(OnBadSample)))
    return BadSamples(on_bad_sample)


def _root(data: str) -> Path:
    if not data or not (root := Path(data)).is_dir():
        raise DataError(f"data {data!r} is neither {SCENES} nor a folder; give the path of one")
    return root


def _check(data: DetectionData | SegmentationData, train: Pictures, test: Pictures) -> None:
    remedy = f"the first of {len(data.skipped)} left out: {data.skipped[0]}" if data.skipped else "add some"
    for split, part in (("train", train), ("test", test)):
        if not len(part):
            raise DataError(f"the {split} part of {data.name} has no image; {remedy}")
    if not data.class_names:
        raise DataError(f"{data.name} has no class; {remedy}")
    check_names(data.name, data.class_names)
