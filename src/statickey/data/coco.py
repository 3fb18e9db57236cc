"""Objects in the JSON of COCO."""

import re
import reprlib
from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from ..errors import DataError
from .annotations import DetectionData
from .layout import BadSamples, image_size, inside, read_json
from .objects import Mark, ObjectFiles
from .source import data_files

_SPLITS = (r"train", r"val", r"validation", r"test")


def coco_files(root: Path) -> dict[str, Path]:
    """Files ``instances_SPLIT.json`` of a folder and of its ``annotations``, by split; a split may end in a year."""
    found: dict[str, Path] = {}
    for path in data_files(root, "instances_*.json", "annotations/instances_*.json"):
        split = path.stem.removeprefix("instances_")
        if re.fullmatch(rf"({'|'.join(_SPLITS)})\d*", split):
            if split in found:
                raise DataError(f"{found[split]} and {path} are both there; remove one")
            found[split] = path
    return found


def coco_data(data: str, root: Path, files: Mapping[str, Path], bad: BadSamples) -> DetectionData:
    """Images under ``SPLIT`` or ``images/SPLIT`` with the objects of ``instances_SPLIT.json``.

    The data set has masks if its training part has one on any object that is no crowd.
    """
    train_split = _split(root, files, _SPLITS[:1])
    test_split = _split(root, files, _SPLITS[1:])
    content = _content(files[train_split])
    categories = _categories(content, files[train_split])
    has_masks = any(
        isinstance(mark, dict) and mark.get("segmentation") and not mark.get("iscrowd")
        for mark in content["annotations"]
    )
    train = _part(_image_folder(root, train_split), files[train_split], content, categories, has_masks, bad)
    del content  # that of COCO fills gigabytes
    content = _content(files[test_split])
    for number, name in _categories(content, files[test_split]).items():
        if categories.get(number) != name:
            raise DataError(
                f"category {number} of {files[test_split]} is {name!r}, but {categories.get(number)!r} in "
                f"{files[train_split].name}; give both files the same categories"
            )
    test = _part(_image_folder(root, test_split), files[test_split], content, categories, has_masks, bad)
    return DetectionData(
        data,
        tuple(categories.values()),
        train,
        test,
        has_masks,
        tuple(categories),
        skipped=tuple(bad.skipped),
    )


def _split(root: Path, files: Mapping[str, Path], names: tuple[str, ...]) -> str:
    for name in names:
        found = [split for split in files if split.rstrip("0123456789") == name]
        if len(found) > 1:
            raise DataError(f"{root} has {' and '.join(files[split].name for split in found)}; keep one of them")
        if found:
            return found[0]
    raise DataError(f"instances_{names[0]}.json is missing in {root} and its folder annotations; add it")


def _image_folder(root: Path, split: str) -> Path:
    folder = next((each for each in (root / split, root / "images" / split) if each.is_dir()), None)
    if folder is None:
        raise DataError(f"{root / split}, the folder of images of instances_{split}.json, is missing")
    return folder


def _content(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json(path)
    for name in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise DataError(f"{path} has no list {name!r}; it must be COCO's JSON of instances")
    return content


def _categories(content: dict[str, Any], path: Path) -> dict[int, str]:
    """Names of categories by number, in the order of numbers."""
    categories: dict[int, str] = {}
    for category in content["categories"]:
        number, name = (category.get("id"), category.get("name")) if isinstance(category, dict) else (None, None)
        if not isinstance(number, int) or not isinstance(name, str):
            raise DataError(f"{path} has the category {category!r}; it must have a number 'id' and a 'name'")
        if number in categories:
            raise DataError(f"{path} has two categories {number}; give each a number of its own")
        categories[number] = name
    return dict(sorted(categories.items()))


def _part(
    folder: Path, path: Path, content: dict[str, Any], categories: Mapping[int, str], has_masks: bool, bad: BadSamples
) -> ObjectFiles:
    places = {number: place for place, number in enumerate(categories)}
    image_ids = Counter(_id(image, "id") for image in content["images"])
    mark_ids = Counter(_id(mark, "id") for mark in content["annotations"])
    marks: dict[Hashable, list[dict[str, Any]]] = {number: [] for number in image_ids}
    for mark in content["annotations"]:
        with bad.sample():
            number = _id(mark, "image_id")
            if number is None or number not in marks:
                raise DataError(
                    f"annotation {_id(mark, 'id')} of {path} is of the image {number}, which it does not list"
                )
            marks[number].append(mark)
    part = ObjectFiles(folder, has_masks)
    for image in content["images"]:
        number = _id(image, "id")
        where = f"image {number} of {path}"
        with bad.sample():
            if number is None:
                raise DataError(f"an image of {path} has no number or name 'id'")
            if image_ids[number] > 1:
                raise DataError(f"{where} is listed {image_ids[number]} times")
            file = inside(folder, image.get("file_name"), where)
            if not file.is_file():
                raise DataError(f"{file}, the {where}, is missing")
            part.add(
                file, number, _size(image, file, where), [_mark(m, places, mark_ids, path) for m in marks[number]]
            )
    return part


def _id(entry: Any, name: str) -> int | str | None:
    """A number or text under a name; None for anything else."""
    value = entry.get(name) if isinstance(entry, dict) else None
    return value if isinstance(value, int | str) else None


def _size(image: dict[str, Any], file: Path, where: str) -> tuple[int, int]:
    """Width and height that the JSON states, or those of the image's header."""
    stated = image.get("width"), image.get("height")
    if stated == (None, None):
        return image_size(file)
    width, height = stated
    if not isinstance(width, int) or not isinstance(height, int):
        raise DataError(f"{where} has width {width!r} and height {height!r}; they must be numbers of pixels")
    return width, height


def _mark(mark: dict[str, Any], places: Mapping[int, int], ids: Counter[int | str | None], path: Path) -> Mark:
    number, category = _id(mark, "id"), mark.get("category_id")
    name = f"annotation {number} of {path}"
    if number is not None and ids[number] > 1:
        raise DataError(f"{name} is listed {ids[number]} times")
    if not isinstance(category, int) or category not in places:
        raise DataError(f"{name} is of the category {category!r}, which it does not list")
    try:
        x, y, width, height = map(float, mark["bbox"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        shown = reprlib.repr(mark.get("bbox"))
        raise DataError(f"{name} has the bbox {shown}; it must be x, y, width and height") from error
    crowd = bool(mark.get("iscrowd"))
    return Mark(name, (x, y, x + width, y + height), places[category], crowd, mark.get("segmentation"))
