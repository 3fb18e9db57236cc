"""Reading trained networks back, of any task."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from .._checks import check_folder
from ..errors import OutputError, StaticKeyError
from ..models import CONFIG_FILE, load_exactly
from .checkpoint import SUFFIX
from .published import published_model
from .registry import task_named
from .task import Task
from .weights import WEIGHTS_FILES, ModelCard


def load_model(source: str | Path, *, img_size: int | None = None, ema: bool = False) -> tuple[nn.Module, ModelCard]:
    """A trained network and how it was made.

    Args:
        source: Folder of a run, or a weights file with its ``config.json`` beside it.
        img_size: Build the network for this size; keys and position embeddings are resampled.
        ema: The averaged weights, where ``source`` is a folder.

    Returns:
        The network in evaluation mode, and its card.

    Raises:
        OutputError: There is no trained network, or it cannot be read.
    """
    check_folder(source=str(source))
    path = Path(source)
    if not path.exists():
        raise OutputError(f"there is no {str(source)!r}; give the folder of a finished run, or a weights file")
    folder = path if path.is_dir() else path.parent
    weights = path / WEIGHTS_FILES["ema" if ema else "last"] if path.is_dir() else path
    if ema and weights.name != WEIGHTS_FILES["ema"]:
        raise OutputError(f"{source} is one file, not the averaged weights; give its folder, or leave out --ema")
    if not weights.is_file():
        if any(path.glob(f"*{SUFFIX}")):
            raise OutputError(f"{source} holds an interrupted run; the same command that began it finishes it")
        raise OutputError(f"{source} holds no {weights.name}; give the folder of a finished run")
    if not (folder / CONFIG_FILE).is_file():
        raise OutputError(f"{weights} has no {CONFIG_FILE} beside it; give the folder of a finished run")
    card = ModelCard.read(folder / CONFIG_FILE)
    try:
        model = task_named(card.task).rebuild(card, img_size)
    except StaticKeyError as error:
        raise OutputError(f"cannot build the network of {folder}: {error}") from error
    load_exactly(model, weights)
    return model.eval(), card


def network_of(
    source: str, *, img_size: int | None, ema: bool, tasks: tuple[type[Task], ...], otherwise: str
) -> tuple[nn.Module, ModelCard, Task]:
    """What a command starts from: a trained network, its card and its task.

    Args:
        source: Folder of a run, or a pretrained model's name, as timm has it.
        img_size: Side of its images in pixels, which the card says then; default its own.
        ema: The averaged weights of a run.
        tasks: Those that will do.
        otherwise: What to say of another.

    Raises:
        OutputError: There is no such network.
        StaticKeyError: It is of another task.
    """
    if Path(source).exists():
        model, card = load_model(source, img_size=img_size, ema=ema)
    else:
        model, card = published_model(source, img_size)
    task = task_named(card.task)
    if not isinstance(task, tasks):
        raise StaticKeyError(f"{source} is of task {task.name}; {otherwise}")
    return model, card if img_size is None else replace(card, img_size=img_size), task
