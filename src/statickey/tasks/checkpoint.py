"""Checkpoints that are whole or absent, are checked by content, and are read without running code."""

import hashlib
import io
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from .._files import regular, write_atomic
from ..errors import OutputError

_CHECKSUM = "statickey-sha256"
SUFFIX = ".ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """torch's checkpoint files with one entry more, the SHA-256 of all others; saved beside the target, then moved.

    ``torch.load(path, weights_only=True)`` reads them too.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a training state.

        Raises:
            OutputError: The file cannot be written; the previous checkpoint is untouched.
        """
        # through memory: torch.save hides a full disk behind an error of its own archive writer
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with zipfile.ZipFile(buffer, "a") as archive:
            root = archive.namelist()[0].partition("/")[0]
            archive.writestr(f"{root}/{_CHECKSUM}", _checksum(archive))
        write_atomic(Path(path), lambda file: file.write(buffer.getbuffer()))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> Any:
        """Load a training state of tensors and plain values.

        Raises:
            OutputError: The file is torn, or holds anything else.
        """
        check_whole(Path(path))
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise OutputError(f"{path} is not a checkpoint of this program ({_reason(error)}); delete it") from error


def check_whole(path: Path) -> None:
    """Refuse a file that is not a checkpoint of this program, or not all of one.

    Raises:
        OutputError: The file is foreign, torn or cannot be read.
    """
    try:
        with zipfile.ZipFile(regular(path)) as archive:
            stored = [archive.read(name).decode() for name in archive.namelist() if name.endswith("/" + _CHECKSUM)]
            found = _checksum(archive)
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise OutputError(f"{path} is not a checkpoint of this program ({_reason(error)}); delete it") from error
    if stored != [found]:
        raise OutputError(f"{path} is not a whole checkpoint of this program (checksum); delete it")


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a folder.

    Returns:
        Its path, or None where the folder has no checkpoint, and why newer ones were passed over.

    Raises:
        OutputError: There are checkpoints, and all are broken.
    """
    reasons: list[str] = []
    for path in sorted(folder.glob(f"*{SUFFIX}"), reverse=True):  # names carry the epoch
        try:
            AtomicCheckpointIO().load_checkpoint(path)
        except OutputError as error:
            reasons.append(str(error))
        else:
            return path, reasons
    if reasons:
        raise OutputError(f"{reasons[0]} to start this run anew")
    return None, reasons


def _checksum(archive: zipfile.ZipFile) -> str:
    digest = hashlib.sha256()
    for name in sorted(archive.namelist()):
        if not name.endswith("/" + _CHECKSUM):
            digest.update(name.encode())
            digest.update(archive.read(name))
    return digest.hexdigest()


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
