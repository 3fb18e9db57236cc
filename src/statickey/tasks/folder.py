"""A folder of results, which one process at a time writes."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .._files import explained_write
from ..errors import OutputError


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Hold the folder; the lock goes with the process, however it ends.

    Raises:
        OutputError: Another process holds it, or the folder cannot be written.
    """
    with explained_write(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise OutputError(f"another process is writing to {root}; wait for it or choose another --out") from error
    try:
        yield
    finally:
        lock.release()
