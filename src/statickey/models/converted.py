"""Converted models on disk: weights, and the conversions that make the same model of its host, in one file."""

import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import nn

from .._files import one_line, regular, write_atomic
from ..convert import CalibrationReport, convert
from ..errors import OutputError, StaticKeyError
from .weights import load_exactly

_FIELD = "statickey"
"""Of the file's metadata, where other programs find nothing they would read."""


def save_converted(model: nn.Module, path: str | Path, report: CalibrationReport | None = None) -> None:
    """Write a converted model's weights, how it was converted, and what was measured, to one safetensors file.

    Args:
        model: What ``convert`` changed.
        path: The file.
        report: What a calibrated ``convert`` gave.

    Raises:
        StaticKeyError: The model was not converted.
        OutputError: The file cannot be written.
    """
    conversions: Any = getattr(model, "conversions", ())
    if not conversions:
        raise StaticKeyError(f"{type(model).__name__} was not converted; call statickey.convert first")
    told = {"conversions": conversions, "report": None if report is None else report.to_json()}
    state = {name: tensor.contiguous().cpu() for name, tensor in model.state_dict().items()}
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
    remedy = "give a file that statickey.save_converted wrote"
    try:
        with safetensors.safe_open(str(regular(Path(path))), framework="pt") as file:
            told = json.loads((file.metadata() or {})[_FIELD])
        conversions, report = told["conversions"], told["report"]
    except KeyError as error:
        raise OutputError(f"{path} does not say how a model was converted; {remedy}") from error
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror or error}; {remedy}") from error
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise OutputError(f"cannot read {path} ({one_line(error)}); {remedy}") from error
    done = json.loads(json.dumps(getattr(host, "conversions", ())))  # of a host that is built with mixers
    left = conversions[len(done) :] if conversions[: len(done)] == done else conversions
    try:
        for step in left:
            convert(host, **step)
    except StaticKeyError as error:
        raise OutputError(f"{path} is of another host: {error}") from error
    load_exactly(host, path)
    return report  # type: ignore[no-any-return]
