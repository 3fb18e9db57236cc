"""Converted models on disk: weights, and the mixers that make the same model of its host, in one file."""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.utils import unwrap_model
from torch import nn

from .._files import one_line, regular, write_atomic
from ..convert import CalibrationReport
from ..convert.recipe import convert_as_described, describe_mixers
from ..errors import OutputError, StaticKeyError
from .weights import load_exactly

_FIELD = "statickey"
"""Of the file's metadata, where other programs find nothing they would read."""


def save_converted(model: nn.Module, path: str | Path, report: CalibrationReport | None = None) -> None:
    """Write a converted model's weights, its mixers, and what was measured, to one safetensors file.

    Args:
        model: What ``convert`` changed, alone or in what wraps it.
        path: The file, ``NAME.safetensors``.
        report: What a calibrated ``convert`` gave.

    Raises:
        StaticKeyError: The model was not converted.
        OutputError: The file has another ending, or cannot be written.
    """
    if Path(path).suffix != ".safetensors":
        raise OutputError(f"{str(path)!r} must end in .safetensors, by which it is read; choose another name")
    model = unwrap_model(model)  # readers strip the names that DataParallel and torch.compile add
    mixers = describe_mixers(model)
    if not mixers:
        raise StaticKeyError(f"{type(model).__name__} was not converted; call statickey.convert first")
    told = {"mixers": mixers, "report": None if report is None else report.to_json()}
    state = {  # copies, as the format takes no two names of one tensor
        name: tensor.clone(memory_format=torch.contiguous_format).cpu() for name, tensor in model.state_dict().items()
    }
    content = safetensors.torch.save(state, metadata={_FIELD: json.dumps(told)})
    write_atomic(Path(path), lambda file: file.write(content))


def load_converted(host: nn.Module, path: str | Path) -> dict[str, Any] | None:
    """Make a fresh host the converted model in a file of ``save_converted``, in place.

    Args:
        host: Built as the one that was converted; a host of another input size gets resampled keys.
        path: The file.

    Returns:
        The report that was saved with it, as plain values, if any.

    Raises:
        OutputError: The file cannot be read, was not written by ``save_converted``, or is of another host.
    """
    host = unwrap_model(host)
    remedy = "give a file that statickey.save_converted wrote"
    try:
        with safetensors.safe_open(str(regular(Path(path))), framework="pt") as file:
            told = json.loads((file.metadata() or {})[_FIELD])
        mixers, report = told["mixers"], told["report"]
    except KeyError as error:
        raise OutputError(f"{path} does not say how a model was converted; {remedy}") from error
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror or error}; {remedy}") from error
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise OutputError(f"cannot read {path} ({one_line(error)}); {remedy}") from error
    try:
        convert_as_described(host, mixers)
    except StaticKeyError as error:
        raise OutputError(f"{path} is of another host: {error}") from error
    load_exactly(host, path)
    return report  # type: ignore[no-any-return]
