"""One run: what it is, where it lies, and whether it is finished."""

import hashlib
import inspect
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from torch import nn

from .._files import explained_read, read_json, regular
from ..data import DataSet, PlannedDataModule
from ..errors import OutputError
from ..layers import MIXERS
from ..models import Swap, start_from
from .recipe import Machine, Recipe
from .start import RESULT_FILE, start_file
from .task import ScoreOn, Task
from .weights import WEIGHTS_FILES

PREDICTIONS_FILE = "predictions.npz"
_NEEDED = {
    **dict.fromkeys(("config_hash", "data"), str),
    **dict.fromkeys(("mixer", "data_dir"), str | None),
    **{"seed": int, "config": dict, "curve": list},
}
"""What a result is read for, and of which kind it is."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A task's recipe on its data, with one mixer and seed, in a folder.

    Args:
        task: What is learned.
        recipe: How.
        machine: On what.
        data: From what, as the task reads it.
        mixer: What stands in place of the network's attention, as text; None leaves it.
        seed: Seed of weights, order and augmentation.
        path: The run's folder.
        ids: Identities of its circumstances, the one it writes first.
        score_on: Score the test images or the held-out ones.
    """

    task: Task
    recipe: Recipe
    machine: Machine
    data: DataSet
    mixer: str | None
    seed: int
    path: Path
    ids: tuple[str, ...]
    score_on: ScoreOn = "test"

    @property
    def result(self) -> Path:
        """Written last: where it is this run's, the run is finished."""
        return self.path / RESULT_FILE

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.result.is_file()

    def read_result(self) -> dict[str, Any]:
        """What the finished run wrote.

        Raises:
            OutputError: It is not whole, or not this run's.
        """
        result = read_result(self.path)
        check_mixer_source(self.path, result)
        if result["config_hash"] not in self.ids:
            raise OutputError(
                f"{self.path} holds a finished run on other data or under another configuration "
                f"({result['config_hash']}, now {self.ids[0]}); choose another --out"
            )
        return result

    def new_model(self) -> nn.Module:
        """The network with fresh weights, or those the recipe starts from."""
        model = self.task.build(self.recipe, self.data, self.mixer, self.seed)
        if self.recipe.weights is not None:
            start_from(model, start_file(self.recipe.weights, self.mixer, self.seed))
        return model

    def data_module(self) -> PlannedDataModule:
        """The run's batches."""
        return self.task.data_module(self.recipe, self.data, self.seed, self.machine.num_workers)


def mixer_source(mixer: str | None) -> str | None:
    """A hash of the code of a mixer that is not this package's; its runs are of that code alone."""
    cls = None if mixer is None else MIXERS[Swap.parse(mixer).mixer]
    if cls is None or cls.__module__.startswith("statickey."):
        return None
    try:
        return hashlib.sha256(inspect.getsource(cls).encode()).hexdigest()[:16]
    except (OSError, TypeError):  # defined at a prompt, say
        return None


def check_mixer_source(path: Path, result: dict[str, Any]) -> None:
    """Refuse a finished run of other code of its mixer than today's.

    Raises:
        OutputError: It is.
    """
    mixer = result["mixer"]
    if mixer is None or Swap.name_in(mixer) not in MIXERS:  # of a plugin that is not loaded
        return
    now = mixer_source(mixer)
    if result.get("mixer_source", now) != now:
        raise OutputError(
            f"{path} is of earlier code of the mixer {mixer!r}; choose another --out, or delete this folder"
        )


def read_result(path: Path) -> dict[str, Any]:
    """What a finished run wrote into its folder, its weights checked to be there.

    Raises:
        OutputError: A file is missing, torn or of something else.
    """
    remedy = "delete this folder to repeat the run, or choose another --out"
    result: dict[str, Any] = read_json(path / RESULT_FILE, remedy)
    with explained_read(path, remedy):
        for name, kind in _NEEDED.items():
            if not isinstance(result[name], kind):
                raise TypeError(f"its {name} is {reprlib.repr(result[name])}")
    for name in WEIGHTS_FILES.values():
        try:
            with safetensors.safe_open(
                regular(path / name), "pt"
            ):  # reads the header, and holds the file's size against it
                pass
        except (OSError, safetensors.SafetensorError) as error:
            raise OutputError(f"{path / name} is missing or torn ({error}); {remedy}") from error
    return result
