"""Writing files so that a reader sees the old content or the new, never a part."""

import errno
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from .errors import OutputError


@contextmanager
def explained_write(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write ``path`` into one line with the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            remedy = "the disk is full; free some space and run the same command again, nothing done is lost"
        elif error.errno in (errno.EEXIST, errno.ENOTDIR):
            remedy = "a file is where a folder should be; choose another --out"
        else:
            remedy = "choose another --out or change its permissions"
        raise OutputError(f"cannot write {path}: {error.strerror or error}; {remedy}") from error


def write_atomic(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write through a temporary file beside ``path`` and move it into place.

    Raises:
        OutputError: The file cannot be written; what was there before is untouched.
    """
    with explained_write(path):
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
