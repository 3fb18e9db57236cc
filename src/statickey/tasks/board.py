"""TensorBoard's files, whose writing fails in one line."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from .._files import explained_write


class Board(TensorBoardLogger):
    """Lightning's logger, which hides a full disk behind other errors."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write numbers.

        Raises:
            OutputError: They cannot be written.
        """
        with explained_board(self):
            super().log_metrics(metrics, step)

    @property
    def experiment(self) -> Any:
        """The writer, which opens its file when first asked for.

        Raises:
            OutputError: It cannot be written.
        """
        with explained_board(self):
            return super().experiment

    def save(self) -> None:
        """Write what is pending.

        Raises:
            OutputError: It cannot be written.
        """
        with explained_board(self):
            super().save()

    def finalize(self, status: str) -> None:
        """Write what is pending, and close.

        Raises:
            OutputError: It cannot be written.
        """
        with explained_board(self):
            super().finalize(status)


@contextmanager
def explained_board(board: TensorBoardLogger) -> Iterator[None]:
    """Say in one line that a board cannot be written.

    Raises:
        OutputError: It cannot; the message names its folder.
    """
    with explained_write(Path(board.log_dir)):
        try:
            yield
        except ValueError as error:  # Lightning's for whatever goes wrong with a number
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from None
            raise


@contextmanager
def quiet_writers() -> Iterator[None]:
    """No traceback of TensorBoard's own thread: what goes wrong there is raised where the next thing is logged."""
    before = threading.excepthook

    def hook(args: Any) -> None:
        if type(args.thread).__name__ != "_AsyncWriterThread":
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
