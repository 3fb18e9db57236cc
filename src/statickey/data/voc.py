"""Objects in the XML of Pascal VOC."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from ..errors import DataError
from .annotations import DetectionData
from .layout import TEST_NAMES, BadSamples, image_size, inside, listed_names
from .objects import Mark, ObjectFiles

_SUFFIXES = (".jpg", ".jpeg", ".png")


class _Named(NamedTuple):
    """An object before the places of classes are known."""

    name: str
    box: tuple[float, ...]
    class_name: str
    crowd: bool


class _Annotated(NamedTuple):
    image: Path
    size: tuple[int, int]
    objects: list[_Named]


def is_voc_objects(root: Path) -> bool:
    """Whether a folder has the layout of Pascal VOC, with objects."""
    return (root / "Annotations").is_dir() and (root / "JPEGImages").is_dir()


def voc_data(data: str, root: Path, bad: BadSamples) -> DetectionData:
    """``JPEGImages`` and ``Annotations``, with lists of names in ``ImageSets/Main``; no masks.

    Classes are those of the training part, sorted. Pixels are counted from 1. Objects marked as difficult count as
    crowds: neither learned from nor scored.
    """
    splits = []
    for names in (("train",), TEST_NAMES):
        path, listed = listed_names(root / "ImageSets" / "Main", names)
        found: list[_Annotated] = []
        for name in listed:
            with bad.sample():
                found.append(_read(root, name, path))
        splits.append(found)
    classes = sorted({marked.class_name for each in splits[0] for marked in each.objects})
    places = {name: place for place, name in enumerate(classes)}
    train, test = (_part(root / "JPEGImages", split, places, bad) for split in splits)
    skipped = tuple(bad.skipped)
    return DetectionData(data, tuple(classes), train, test, False, tuple(range(len(classes))), skipped=skipped)


def _read(root: Path, name: str, listed: Path) -> _Annotated:
    path = inside(root / "Annotations", f"{name}.xml", str(listed))
    images = [root / "JPEGImages" / f"{name}{suffix}" for suffix in _SUFFIXES]
    image = next((each for each in images if each.is_file()), None)
    if image is None:
        raise DataError(f"{images[0]}, listed in {listed}, is missing")
    try:
        tree = ElementTree.fromstring(path.read_bytes())
        size = _whole(tree, "size/width"), _whole(tree, "size/height")
        objects = [_named(node, f"object {n} of {path}") for n, node in enumerate(tree.findall("object"), 1)]
    except (OSError, ElementTree.ParseError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {path}: {error}") from error
    return _Annotated(image, size if min(size) > 0 else image_size(image), objects)


def _named(node: ElementTree.Element, name: str) -> _Named:
    class_name = (node.findtext("name") or "").strip()
    texts = [node.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
    if not class_name or None in texts:
        raise DataError(f"{name} has no name or no bndbox with xmin, ymin, xmax and ymax")
    x1, y1, x2, y2 = (float(text or "") for text in texts)
    return _Named(name, (x1 - 1, y1 - 1, x2, y2), class_name, _whole(node, "difficult") > 0)


def _whole(node: ElementTree.Element, path: str) -> int:
    return int(node.findtext(path) or 0)


def _part(folder: Path, images: Iterable[_Annotated], places: Mapping[str, int], bad: BadSamples) -> ObjectFiles:
    part = ObjectFiles(folder, has_masks=False)
    for image, size, objects in images:
        with bad.sample():
            for each in objects:
                if each.class_name not in places:
                    raise DataError(f"{each.name} is of class {each.class_name!r}, which no training image has")
            marks = [Mark(each.name, each.box, places[each.class_name], each.crowd) for each in objects]
            part.add(image, image.stem, size, marks)
    return part
