"""Scoring a network on some images, by all processes that take part."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import distributed, nn

from .._files import one_line
from ..data import PlannedDataModule
from ..errors import DataError, StaticKeyError
from .task import Arrays, Evidence, Task


@torch.inference_mode()
def outputs_on(
    task: Task, model: nn.Module, module: PlannedDataModule, loader: Any, precision: str = "32-true"
) -> Iterator[tuple[Any, Any]]:
    """What a network says of each batch of a loader, and the truth.

    Args:
        task: What the network has learned.
        model: The network; it is left in evaluation mode.
        module: The data module, which prepares batches.
        loader: Yields its evaluation batches.
        precision: Lightning's precision; mixed ones score under autocast.

    Yields:
        The task's outputs and targets, on the CPU.
    """
    model.eval()
    device = next(model.parameters()).device
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    for batch in loader:
        prepared = module.on_after_batch_transfer(move_data_to_device(batch, device), 0)
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            said = task.outputs(model, prepared)
        yield move_data_to_device(said, "cpu")


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

    Raises:
        DataError: An image cannot be read, here or on another process, which would else wait for this one.
    """
    own: list[Arrays] = []
    failure = None
    try:
        with explained_workers():
            for outputs, targets in outputs_on(task, model, module, loader, precision):
                own.append(task.evidence([outputs], [targets]).arrays())
    except DataError as error:
        failure = str(error)
    parts: list[Any] = [(own, failure)]
    if distributed.is_available() and distributed.is_initialized():
        parts = [None] * distributed.get_world_size()
        distributed.all_gather_object(parts, ([dict(arrays) for arrays in own], failure))
    for _, reason in parts:
        if reason is not None:
            raise DataError(reason)
    present = [arrays for arrays_of_process, _ in parts for arrays in arrays_of_process]
    if not present:
        raise DataError("there is no image to score; mend the data")
    return task.evidence_from({name: np.concatenate([arrays[name] for arrays in present]) for name in present[0]})


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


@contextmanager
def explained_peers() -> Iterator[None]:
    """Say in one line that another process of the run is gone, where this one notices while it waits for it.

    Raises:
        StaticKeyError: The connection to it broke, or it did not answer in time.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(
            error
        ):  # gloo's have no type of their own
            raise
        reason = re.sub(r"^\[[^]]*\] ", "", one_line(error)).partition(". ")[0]  # without the place in its source
        raise StaticKeyError(
            f"another process of this run has ended or does not answer ({reason}); see what it said, the same "
            "command goes on where it stopped"
        ) from error
