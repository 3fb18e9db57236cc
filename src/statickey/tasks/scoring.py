"""Scoring a network on some images, by all processes that take part."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import distributed, nn

from ..data import PlannedDataModule
from ..errors import DataError
from .task import Evidence, Task


@torch.inference_mode()
def outputs_on(
    task: Task, model: nn.Module, module: PlannedDataModule, loader: Any, precision: str = "32-true"
) -> tuple[list[Any], list[Any]]:
    """What a network says of all batches of a loader, and the truth.

    Args:
        task: What the network has learned.
        model: The network; it is left in evaluation mode.
        module: The data module, which prepares batches.
        loader: Yields its evaluation batches.
        precision: Lightning's precision; mixed ones score under autocast.

    Returns:
        The task's outputs and targets, one each a batch, on the CPU.
    """
    model.eval()
    device = next(model.parameters()).device
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    outputs, targets = [], []
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        for batch in loader:
            prepared = module.on_after_batch_transfer(move_data_to_device(batch, device), 0)
            said, truth = task.outputs(model, prepared)
            outputs.append(move_data_to_device(said, "cpu"))
            targets.append(move_data_to_device(truth, "cpu"))
    return outputs, targets


def score(
    task: Task, model: nn.Module, module: PlannedDataModule, loader: Any, precision: str = "32-true"
) -> Evidence:
    """The evidence of all processes, each of which goes through its own part of the images.

    Args:
        task: What the network has learned.
        model: The network, the same on every process.
        module: The data module.
        loader: This process's part of the images; the parts follow each other in the order of the processes.
        precision: Lightning's precision.

    Returns:
        The evidence, the same on every process.
    """
    outputs, targets = outputs_on(task, model, module, loader, precision)
    own = task.evidence(outputs, targets) if outputs else None
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        if own is None:
            raise DataError("there is no image to score; mend the data")
        return own
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, None if own is None else dict(own.arrays()))
    present = [part for part in parts if part is not None]
    if not present:
        raise DataError("there is no image to score; mend the data")
    return task.evidence_from({name: np.concatenate([part[name] for part in present]) for name in present[0]})


@contextmanager
def explained_workers() -> Iterator[None]:
    """Say in one line what befell a loader worker.

    Raises:
        DataError: A worker met a bad image, or died.
    """
    try:
        yield
    except DataError as error:
        if not str(error).startswith("Caught"):  # as torch passes on what a worker raised
            raise
        raise DataError(" ".join(str(error).rpartition("DataError: ")[2].split())) from error
    except RuntimeError as error:
        reason = next(iter(str(error).splitlines()), "")
        if "DataLoader worker" not in reason:
            raise
        raise DataError(
            f"{reason}; out of memory? use fewer --num-workers, the same command goes on where it stopped"
        ) from error
