"""Writing files so that a reader sees the old content or the new, never a part; reading them with faults named."""

import csv
import errno
import io
import json
import os
import secrets
import stat
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from .errors import OutputError

_BROKEN = (
    *(ValueError, TypeError, AttributeError, LookupError, RecursionError, EOFError),
    *(yaml.YAMLError, zipfile.BadZipFile, zlib.error),
)
"""What reading a broken file raises."""


def one_line(error: BaseException) -> str:
    """What an error of another library says, in one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."


@contextmanager
def explained_write(path: Path, option: str = "--out") -> Iterator[None]:
    """Turn an operating system's refusal to write ``path``, given as ``option``, into one line with the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "the disk is full; free some space and run the same command again, nothing done is lost"
        elif error.errno in (errno.EEXIST, errno.ENOTDIR):
            remedy = f"a file is where a folder should be; choose another {option}"
        elif error.errno in (errno.EISDIR, errno.EINVAL):
            remedy = f"choose another {option}"
        else:
            remedy = f"choose another {option} or change its permissions"
        raise OutputError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error


def check_writable(**files: str | Path | None) -> None:
    """Refuse, before anything is computed for it, a file that could not be written, given by its option's name.

    Nothing is left behind, not even folders. None means no file.

    Raises:
        OutputError: A folder is there, or the nearest folder that exists takes no file.
    """
    for option, file in files.items():
        if file is None:
            continue
        path = Path(file)
        with explained_write(path, f"--{option}"):
            _check_replaceable(path)
            place = next(parent for parent in path.absolute().parents if parent.exists())
            tempfile.TemporaryFile(dir=place).close()


def _check_replaceable(path: Path) -> None:
    """Refuse what a file may not take the place of: a folder, and a device or pipe, which root could replace."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "it is a folder")
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is a device or a pipe")


def write_atomic(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write through a temporary file beside ``path`` and move it into place.

    Raises:
        OutputError: The file cannot be written; what was there before is untouched.
    """
    with explained_write(path):
        _check_replaceable(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """Write text atomically, as UTF-8."""
    write_atomic(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, keys in their order."""
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def write_csv(path: Path, fields: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as CSV atomically, in the order of ``fields``; what else a row holds is left out."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fields, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def regular(path: Path) -> Path:
    """The path of a file; refuses a pipe or a device, whose reading may never end.

    Raises:
        OSError: It is one, or there is nothing.
    """
    if not (stat.S_ISREG(mode := path.stat().st_mode) or stat.S_ISDIR(mode)):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return path


@contextmanager
def explained_read(path: Path, remedy: str) -> Iterator[None]:
    """Turn a file that is missing, broken or of other content into one line with the remedy.

    Around the reading and the first use of what was read: a missing key or another type is a fault of the file.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror or error}; {remedy}") from error
    except KeyError as error:
        raise OutputError(f"{path} is broken (it has no {error}); {remedy}") from error
    except _BROKEN as error:
        raise OutputError(f"{path} is broken ({one_line(error)}); {remedy}") from error


def read_json(path: Path, remedy: str, kind: type = dict) -> Any:
    """Read JSON whose outermost value is of a kind.

    Raises:
        OutputError: It is missing, no JSON, or of another kind; the line ends with ``remedy``.
    """
    return _read(path, json.loads, remedy, kind)


def read_yaml(path: Path, remedy: str, kind: type = dict) -> Any:
    """Read YAML of plain values whose outermost value is of a kind.

    Raises:
        OutputError: It is missing, no YAML, or of another kind; the line ends with ``remedy``.
    """
    return _read(path, yaml.safe_load, remedy, kind)


def _read(path: Path, parse: Callable[[str], Any], remedy: str, kind: type) -> Any:
    with explained_read(path, remedy):
        value = parse(regular(path).read_text(encoding="utf-8"))
        if not isinstance(value, kind):
            raise TypeError(f"a {kind.__name__} is expected, not a {type(value).__name__}")
        return value
