"""Folders of images, one folder a class."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import DataError
from .source import FileSource, Sources

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
_TEST_FOLDERS = ("val", "validation", "test")


def folder_sources(root: Path) -> Sources:
    """The images under ``train`` and, of ``val``, ``validation`` and ``test``, the first that is there."""
    train_folder = root / "train"
    test_folder = next((root / name for name in _TEST_FOLDERS if (root / name).is_dir()), root / _TEST_FOLDERS[0])
    for folder in (train_folder, test_folder):
        if not folder.is_dir():
            raise DataError(f"{folder} is missing; an image folder has {root}/train/CLASS and {root}/val/CLASS")
    train, test = _class_files(train_folder), _class_files(test_folder)
    unknown = sorted(set(test) - set(train))
    if unknown:
        raise DataError(
            f"class {unknown[0]!r} is in {test_folder} but not in {train_folder}; "
            f"add training images of it or remove it from {test_folder.name}"
        )
    names = sorted(train)
    return Sources(_class_source(train, names), _class_source(test, names), tuple(names))


def image_files(folder: Path) -> list[Path]:
    """The image files in a folder and its subfolders, except hidden ones.

    Raises:
        DataError: A folder cannot be listed.
    """
    found = []
    for where, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(where, name)
            for name in names
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    return sorted(found)


def _refuse(error: OSError) -> None:
    raise DataError(f"cannot list {error.filename}: {error.strerror}; make it readable") from error


def _class_source(classes: Mapping[str, Sequence[Path]], names: Sequence[str]) -> FileSource:
    numbers = {name: number for number, name in enumerate(names)}
    files = [path for paths in classes.values() for path in paths]
    return FileSource(files, [numbers[name] for name, paths in classes.items() for _ in paths])


def _class_files(folder: Path) -> dict[str, list[Path]]:
    classes = {
        sub.name: image_files(sub)
        for sub in sorted(folder.iterdir())
        if sub.is_dir() and not sub.name.startswith(".")
    }
    empty = [name for name, files in classes.items() if not files]
    if empty or not classes:
        where = folder / empty[0] if empty else folder
        raise DataError(f"{where} holds no image; put files there ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return classes
