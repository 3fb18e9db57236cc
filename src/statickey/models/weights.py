"""Reading weights from files, without running code, with refusals in one line."""

from pathlib import Path
from typing import Any

import safetensors
import torch
from timm.models import load_state_dict
from torch import Tensor, nn

from .._files import one_line
from ..errors import OutputError, StaticKeyError
from .checkpoint import LoadReport, check_finite, checkpoint_filter_fn, warm_start

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
"""What a folder that timm's ``local-dir:`` takes holds."""


def read_weights(path: str | Path) -> dict[str, Any]:
    """The state dict in a file, safetensors or a timm checkpoint; code in it is never run.

    Raises:
        OutputError: There is no such file, or it holds no weights, or NaN.
    """
    if not Path(path).is_file():
        raise OutputError(f"no weights file {str(path)!r}; give a .safetensors file or a timm checkpoint")
    try:
        state = dict(load_state_dict(str(path), weights_only=True))
    except Exception as error:  # foreign bytes make the unpickler fail in any way
        reason = one_line(error)
        if isinstance(error, safetensors.SafetensorError):
            reason = f"not a safetensors file ({reason})"
        raise OutputError(
            f"cannot read weights from {path}: {reason}; give a .safetensors file or a timm checkpoint"
        ) from error
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.layout != torch.strided:
            raise OutputError(f"{path}: {name} is a {tensor.layout} tensor; save it as a dense one")
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.float().isnan().any():
            raise OutputError(f"{path}: {name} holds NaN; the run behind it diverged, give weights from before that")
    return state


def start_from(model: nn.Module, path: str | Path) -> LoadReport:
    """Load everything of a weights file that fits; see ``warm_start``.

    A classifier's weights go into the backbone of a detector or segmenter.

    Raises:
        OutputError: The file cannot be read, nothing of it fits, or a parameter in it is not finite.
    """
    state = read_weights(path)
    body = getattr(getattr(model, "pyramid", None), "body", None)
    of_classifier = not any("pyramid." in name for name in state)
    try:
        return warm_start(body if isinstance(body, nn.Module) and of_classifier else model, state)
    except StaticKeyError as error:
        raise OutputError(f"{path}: {error}") from error


def load_exactly(model: nn.Module, path: str | Path) -> None:
    """Load a weights file of this very model, of any of its input sizes.

    Raises:
        OutputError: The file cannot be read, or is of another model; the message names the first tensor.
    """
    state = read_weights(path)
    try:
        given = checkpoint_filter_fn(state, model)
        check_finite(model, given)
    except StaticKeyError as error:
        raise OutputError(f"{path}: {error}") from error
    own = model.state_dict()
    remedy = f"give weights and {CONFIG_FILE} of one run"
    missing = [name for name in own if name not in given]
    foreign = [name for name in given if name not in own]
    if missing or foreign:
        raise OutputError(
            f"{path} is of another model: "
            + (f"it lacks {missing[0]!r}" if missing else f"the model has no {foreign[0]!r}")
            + f" ({len(missing)} missing, {len(foreign)} foreign tensors); {remedy}"
        )
    for name, tensor in own.items():
        if not isinstance(tensor, Tensor) or name.endswith("_extra_state"):
            continue
        if tensor.shape != given[name].shape:
            what = "number of classes" if tensor.shape[1:] == given[name].shape[1:] else "shape"
            raise OutputError(
                f"{path} is of another model: {name} is {tuple(given[name].shape)} there, {tuple(tensor.shape)} "
                f"here (another {what}); {remedy}"
            )
    model.load_state_dict(given)
