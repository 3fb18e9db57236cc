"""Folders of results, each of which one process at a time writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .._files import explained_write
from ..errors import OutputError


@contextmanager
def free(folder: Path, wait: float = 0) -> Iterator[bool]:
    """Hold a folder if it is free; the lock goes with the process, however it ends.

    Args:
        folder: It is made where it does not exist.
        wait: How many seconds to wait for another process that holds it.

    Returns:
        Whether it is held.

    Raises:
        OutputError: The folder cannot be written.
    """
    with explained_write(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=wait)
        except Timeout:
            held = False
        else:
            held = True
    try:
        yield held
    finally:
        if held:
            lock.release()


@contextmanager
def locked(folder: Path, wait: float = 0) -> Iterator[None]:
    """Hold a folder.

    Raises:
        OutputError: Another process holds it, or it cannot be written.
    """
    with free(folder, wait) as held:
        if not held:
            raise OutputError(f"another process is writing to {folder}; wait for it or choose another --out")
        yield
