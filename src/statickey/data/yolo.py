"""Objects in the text files of YOLO."""

from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from .annotations import DetectionData
from .folders import image_files
from .layout import BadSamples, image_size, inside, read_lines
from .objects import Mark, ObjectFiles


class _Row(NamedTuple):
    name: str
    label: int
    numbers: Sequence[float]
    """Of a box, its centre, width and height; of a polygon, its points; in shares of the image's sides."""


def yolo_file(root: Path) -> Path | None:
    """The ``data.yaml`` of a folder, where it has one."""
    return next((path for path in (root / "data.yaml", root / "data.yml") if path.is_file()), None)


def yolo_data(data: str, root: Path, path: Path, bad: BadSamples) -> DetectionData:
    """What ``data.yaml`` names: ``names``, and ``train`` and ``val`` (or else ``test``), folders or lists of images.

    Labels are in a folder ``labels`` beside ``images``, or beside the image where no folder has that name. An image
    without labels has no objects. The data set has masks if its training part has a polygon. Folders are within that
    of ``data.yaml``: data made by others may not reach files elsewhere.
    """
    said = _read_yaml(path)
    names = _names(said, path)
    folder = root if said.get("path") is None else inside(root, said["path"], str(path))
    places = {number: place for place, number in enumerate(names)}
    keys = "train", "test" if said.get("val") is None and said.get("test") is not None else "val"
    splits = [_read_rows(root, _images(folder, said.get(key), f"{key} of {path}"), places, bad) for key in keys]
    has_masks = any(len(row.numbers) > 4 for _, rows in splits[0] for row in rows)
    train, test = (_part(root, split, has_masks, bad) for split in splits)
    category_ids = tuple(names)
    return DetectionData(
        data, tuple(names.values()), train, test, has_masks, category_ids, skipped=tuple(bad.skipped)
    )


def _read_yaml(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        said = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(f"cannot read {path}: {' '.join(str(error).split())}; mend it") from error
    if not isinstance(said, Mapping):
        raise DataError(f"{path} must map 'names', 'train' and 'val' to what they are")
    return said


def _names(said: Mapping[str, Any], path: Path) -> dict[int, str]:
    """Names of classes by number, in the order of numbers."""
    names = said.get("names")
    numbered = dict(enumerate(names)) if isinstance(names, list) else names
    if not isinstance(numbered, Mapping) or not numbered:
        raise DataError(f"{path} has no names; list the names of classes")
    for number, name in numbered.items():
        if not isinstance(number, int) or not isinstance(name, str | int) or isinstance(name, bool):
            raise DataError(f"{path} names class {number!r} {name!r}; write numbers and names, in quotes")
    if "nc" in said and said["nc"] != len(numbered):
        raise DataError(f"{path} has nc={said['nc']!r} but {len(numbered)} names; correct one of them")
    return {number: str(numbered[number]) for number in sorted(numbered)}


def _images(folder: Path, said: Any, where: str) -> list[Path]:
    """The images of a split, in folders, or in text files one a line."""
    found: list[Path] = []
    for name in said if isinstance(said, list) else [said]:
        path = inside(folder, name, where)
        if path.is_dir():
            found += image_files(path)
        elif path.suffix == ".txt" and path.is_file():
            found += [inside(folder, line.strip(), str(path)) for line in read_lines(path)]
        else:
            raise DataError(f"{path}, {where}, is neither a folder of images nor a text file that lists some")
    return found


def _read_rows(
    root: Path, images: Iterable[Path], places: Mapping[int, int], bad: BadSamples
) -> list[tuple[Path, list[_Row]]]:
    found: list[tuple[Path, list[_Row]]] = []
    seen: set[Path] = set()
    labelled = False
    for image in images:
        with bad.sample():
            if image in seen:
                raise DataError(f"{image} is listed twice")
            seen.add(image)
            path = _label_file(root, image)
            labelled = labelled or path.is_file()
            found.append((image, [_row(line, places, f"{path} line {n}") for n, line in _lines(path)]))
    if found and not labelled:
        raise DataError(f"no image has labels, the first none in {_label_file(root, found[0][0])}; put them there")
    return found


def _label_file(root: Path, image: Path) -> Path:
    parts = list(image.relative_to(root).parts)
    for k in reversed(range(len(parts) - 1)):
        if parts[k] == "images":
            parts[k] = "labels"
            break
    return root.joinpath(*parts).with_suffix(".txt")


def _lines(path: Path) -> list[tuple[int, str]]:
    return list(enumerate(read_lines(path), 1)) if path.exists() else []


def _row(line: str, places: Mapping[int, int], name: str) -> _Row:
    columns = line.split()
    if len(columns) != 5 and (len(columns) < 7 or len(columns) % 2 == 0):
        raise DataError(f"{name} has {len(columns)} columns; a class and 4 numbers, or x and y of 3 points or more")
    try:
        number, numbers = int(columns[0]), array("d", map(float, columns[1:]))
    except ValueError as error:
        raise DataError(f"{name} must be a class and numbers: {error}") from error
    if number not in places:
        raise DataError(f"{name} is of class {number}, which data.yaml does not name")
    return _Row(name, places[number], numbers)


def _part(root: Path, images: Iterable[tuple[Path, list[_Row]]], has_masks: bool, bad: BadSamples) -> ObjectFiles:
    part = ObjectFiles(root, has_masks)
    for image, rows in images:
        with bad.sample():
            size = image_size(image)
            part.add(image, image.relative_to(root).as_posix(), size, [_mark(row, size) for row in rows])
    return part


def _mark(row: _Row, size: tuple[int, int]) -> Mark:
    pixels = [number * size[k % 2] for k, number in enumerate(row.numbers)]
    if len(pixels) == 4:
        x, y, width, height = pixels
        return Mark(row.name, (x - width / 2, y - height / 2, x + width / 2, y + height / 2), row.label)
    xs, ys = pixels[::2], pixels[1::2]
    return Mark(row.name, (min(xs), min(ys), max(xs), max(ys)), row.label, mask=[pixels])
