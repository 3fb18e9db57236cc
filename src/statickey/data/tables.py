"""Images in parquet files or in a data set of the Hugging Face hub."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .._files import one_line
from ..errors import DataError
from .layout import inside
from .source import Source, Sources, check_numbered, data_files

HUB = "hf:"
_TEST_STEMS = ("test", "val")
_IN_MEMORY_BYTES = 2**30
_IMAGE_NAMES = ("image", "img")
_LABEL_NAMES = ("label", "labels", "class", "target")
_LABEL_TYPES = (
    "bool",
    "string",
    "large_string",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
)
_UNLABELLED = (None, -1)  # how the hub writes a label that is held back


class _TableSource(Source):
    """Images in a ``datasets.Dataset``, with the file name or the bytes of each in a column.

    ``class_names`` is None where the table does not name its classes; its labels are then values of any type.
    Cells that name a file in place of holding one are read from ``folder``, by a name below it, or from one of the
    ``caches``, by the whole path that the library has written there, and from nowhere else.
    """

    def __init__(self, place: str, table: Any, folder: Path | None = None, caches: Sequence[Path] = ()) -> None:
        import datasets

        self.place, self.folder, self.caches = place, folder, caches
        features = table.features
        images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
        labels = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
        images = images[:1] or _named(_IMAGE_NAMES, [name for name, kind in features.items() if _holds_bytes(kind)])
        labels = labels[:1] or _named(
            _LABEL_NAMES, [name for name, kind in features.items() if getattr(kind, "dtype", "") in _LABEL_TYPES]
        )
        if len(images) != 1 or len(labels) != 1:
            raise DataError(
                f"{place} needs one column of images (an Image, or bytes) and one of labels (a ClassLabel, or "
                f"integers or text), called image and label where there are several; its columns are {features}"
            )
        self.column = images[0]
        self.table = table.cast_column(self.column, datasets.Image(decode=False))
        self.labels: list[Any] = table.data.column(labels[0]).to_pylist()
        names = getattr(features[labels[0]], "names", None)
        if names and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise DataError(f"{place} has the class names {names!r} of {labels[0]!r}; write them as a list of texts")
        if names is not None and not names:
            raise DataError(f"{place} has a ClassLabel column {labels[0]!r} without class names; write them with it")
        self.class_names: tuple[str, ...] | None = None if names is None else tuple(names)

    def open(self, i: int) -> Image.Image:
        cell = self.table[i][self.column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise ValueError("the cell is empty")
        return Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else self._within(cell["path"]))

    def _within(self, path: str) -> Path:
        if self.folder is not None:
            return inside(self.folder, path, "the cell")
        found = Path(path).resolve()
        if not any(found.is_relative_to(cache.resolve()) for cache in self.caches):
            raise DataError(
                f"the cell names the file {path!r}, which is outside {', '.join(map(str, self.caches))}, where the "
                "library keeps what it loads"
            )
        return found

    def describe(self, i: int) -> str:
        cell = self.table[i][self.column]
        return f"{self.place} row {i}" + (f" ({cell['path']})" if cell and cell["path"] else "")


def _holds_bytes(kind: Any) -> bool:
    content = kind.get("bytes") if isinstance(kind, dict) else kind
    return getattr(content, "dtype", "") in ("binary", "large_binary")


def _named(names: Sequence[str], columns: Sequence[str]) -> list[str]:
    """The columns of these names; all where none has one."""
    return [column for column in columns if column in names] or list(columns)


def hub_sources(name: str, data_dir: Path | None) -> Sources:
    """A data set of the hub, or a local one of that library, with its configuration or without."""
    import datasets
    from huggingface_hub.constants import HF_HUB_CACHE

    is_local = bool(name.strip(" /")) and Path(name).exists()
    parts = name.strip().split("/")
    if not is_local and not (len(parts) <= 3 and all(parts)):
        raise DataError(
            f"data '{HUB}{name}' names no data set; write {HUB}NAME, {HUB}OWNER/NAME or {HUB}OWNER/NAME/CONFIG"
        )
    path, config = name, None
    if len(parts) == 3 and not is_local:
        path, _, config = name.rpartition("/")
    try:
        splits = datasets.load_dataset(path, config, cache_dir=None if data_dir is None else str(data_dir))
    except (OSError, ValueError, TypeError, LookupError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"cannot load {HUB}{name} ({one_line(error)}); check the name and the network, "
            "or give a folder that has it"
        ) from error
    kept = [datasets.config.HF_CACHE_HOME, datasets.config.HF_DATASETS_CACHE, HF_HUB_CACHE]
    kept += [place for place in (data_dir, path if is_local else None) if place is not None]
    caches = list(dict.fromkeys(Path(place).expanduser() for place in kept))
    sources = {split: _TableSource(f"{HUB}{name} {split}", table, caches=caches) for split, table in splits.items()}
    # the hub's test split often comes without labels
    tests = [sources[split] for split in ("test", "validation", "val") if split in sources]
    labelled = [part for part in tests if any(label not in _UNLABELLED for label in part.labels)]
    if "train" not in sources or not labelled:
        raise DataError(
            f"{HUB}{name} needs labelled splits train and test or validation; it has {', '.join(sources)}"
        )
    return _paired(f"{HUB}{name}", sources["train"], labelled[0])


def _paired(place: str, train: _TableSource, test: _TableSource) -> Sources:
    names = train.class_names
    if names != test.class_names:
        given = [part.class_names and list(part.class_names) for part in (train, test)]
        raise DataError(
            f"the class names in {place} differ: {given[0]} in train, {given[1]} in test; "
            "write both parts with the same ones"
        )
    if names is None:
        names = _number_classes(train, test)
    return Sources(train, test, names)


def _number_classes(train: _TableSource, test: _TableSource) -> tuple[str, ...]:
    """Bring the labels of both parts to places among the sorted values of the training part, the classes.

    So classes need not be numbered from 0 or without gaps.
    """
    values = sorted({label for label in train.labels if label not in _UNLABELLED})
    if all(isinstance(value, str) and value.isdecimal() for value in values):
        raise DataError(
            f"{train.place} has {'labels as text, such as ' + repr(values[0]) if values else 'no labels'}; "
            "write them as integers"
        )
    numbers = {value: number for number, value in enumerate(values)}
    for part in (train, test):
        for i, label in enumerate(part.labels):
            if label not in numbers:
                raise DataError(
                    f"{part.describe(i)} has label {label!r}, which is not among the {len(values)} classes of train"
                )
        part.labels = [numbers[label] for label in part.labels]
    return tuple(str(value) for value in values)


def parquet_files(root: Path, stem: str) -> list[Path]:
    """Parquet files in the folder or one level below, where the hub keeps them."""
    return data_files(root, f"{stem}*.parquet", f"*/{stem}*.parquet")


def parquet_sources(root: Path, data_dir: Path | None) -> Sources:
    """The parquet files ``train*`` and ``test*``, or else ``val*``."""
    train, test = (
        _TableSource(f"{root} {split}", _parquet_table(root, stems, data_dir), root)
        for split, stems in (("train", ("train",)), ("test", _TEST_STEMS))
    )
    return _paired(str(root), train, test)


def _parquet_table(root: Path, stems: Sequence[str], data_dir: Path | None) -> Any:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    files: list[Path] = next(filter(None, (parquet_files(root, stem) for stem in stems)), [])
    if not files:
        found = ", ".join(path.name for path in parquet_files(root, "")[:6])
        raise DataError(f"no {' or '.join(f'{s}*.parquet' for s in stems)} under {root} (found {found})")
    check_numbered(files)
    in_memory = sum(path.stat().st_size for path in files) <= _IN_MEMORY_BYTES
    tables = []
    for path in files:
        try:
            tables.append(pq.read_table(path) if in_memory else pq.read_schema(path))
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"cannot read {path}: {one_line(error)}; replace this file") from error
    try:
        if in_memory:
            return datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables(tables)))
        # a copy in the library's cache, mapped into memory as it is read
        cache = None if data_dir is None else str(data_dir)
        return datasets.Dataset.from_parquet([str(path) for path in files], cache_dir=cache)
    except pa.ArrowException as error:
        raise DataError(f"the parquet files under {root} differ in their columns: {one_line(error)}") from error
    except (OSError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"cannot unpack the parquet files under {root}: {one_line(error)}; mend them or free space"
        ) from error
    except (ValueError, TypeError, LookupError) as error:
        raise DataError(
            f"the metadata of {files[0]} cannot be read ({one_line(error)}); write the file anew, or without metadata"
        ) from error
