"""Checkpoints that are whole or absent, and are read without running code."""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from .._files import write_atomic
from ..errors import OutputError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Saves beside the target and moves into place (Lightning's own goes through the temporary folder)."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a training state.

        Raises:
            OutputError: The file cannot be written; the previous checkpoint is untouched.
        """
        # through memory: torch.save hides a full disk behind an error of its own archive writer
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomic(Path(path), lambda file: file.write(buffer.getbuffer()))

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = True) -> Any:
        """Load a training state of tensors and plain values.

        Raises:
            OutputError: The file is torn, or holds anything else.
        """
        try:
            return torch.load(path, map_location=map_location, weights_only=True)
        except (RuntimeError, EOFError, OSError, ValueError, KeyError, pickle.UnpicklingError) as error:
            reason = str(error).splitlines()[0]
            raise OutputError(
                f"{path} is not a checkpoint of this program ({reason}); delete it to start this run anew"
            ) from error
