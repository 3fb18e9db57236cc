"""A training step whose loss was not finite, kept on disk so that it can be taken again."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, distributed, nn

from .._files import explained_read, read_json, regular, write_atomic, write_json
from ..errors import OutputError, StaticKeyError
from ..models import CONFIG_FILE, MaskWindows
from .recipe import Recipe
from .registry import task_named
from .weights import WEIGHTS_FILES, ModelCard, write_model

REPLAY_FILE = "replay.json"
_BATCH_FILE = "batch-{}.safetensors"
_NAMED = {"MaskWindows": MaskWindows}
"""Named tuples that a batch may hold."""
_RNG_STATE = "rng_state"


@dataclass(frozen=True)
class Step:
    """A training step of one process, as it began, and what came of it."""

    epoch: int
    number: int
    batch: Any
    rng_state: Tensor
    """Of torch's generator on the CPU, which draws inside the network."""
    losses: Mapping[str, Tensor]


@dataclass(frozen=True)
class DivergedFolder:
    """Where a run keeps the step at which it diverged.

    Args:
        path: The folder.
        card: How the network is built again.
    """

    path: Path
    card: ModelCard

    def keep(
        self,
        step: Step,
        finite: bool,
        *,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        recipe: Recipe,
        seed: int,
        precision: str,
        rank: int = 0,
    ) -> str:
        """Write the step; all processes take part, each with the batch that it saw, if that went wrong.

        Args:
            step: This process's step.
            finite: Whether it was well on this process.
            model: The network.
            weights: All of its weights, on the first process.
            recipe: The run's, its defaults filled in.
            seed: The run's.
            precision: Lightning's name of it.
            rank: This process.

        Returns:
            A clause that says where it is, or why it is not.
        """
        problem = None
        try:
            if not finite:
                self._write_batch(step, rank)
        except StaticKeyError as error:
            problem = str(error)
        losses = None if finite else {name: _plain(value.item()) for name, value in step.losses.items()}
        seen: list[Any] = [(losses, problem)]
        if distributed.is_available() and distributed.is_initialized():
            seen = [None] * distributed.get_world_size()
            distributed.all_gather_object(seen, (losses, problem))
        problems = [why for _, why in seen if why is not None]
        if rank == 0 and not problems:
            facts = {
                "task": self.card.task,
                "seed": seed,
                "epoch": step.epoch,
                "step": step.number,
                "losses": {str(i): own for i, (own, _) in enumerate(seen) if own is not None},
                "broken_weights": [name for name, value in weights.items() if not value.isfinite().all()],
                "precision": precision,
                "recipe": recipe.to_dict(),
            }
            try:
                write_model(self.path, "last", model, self.card, weights)
                write_json(self.path / REPLAY_FILE, facts)
            except OutputError as error:
                problems.append(str(error))
        if problems:
            return f"the step could not be kept: {problems[0]}"
        return f"weights, batch and seeds are in {self.path}, statickey.tasks.replay repeats the step"

    def _write_batch(self, step: Step, rank: int) -> None:
        tensors = {_RNG_STATE: step.rng_state}
        form = json.dumps(_taken_apart(step.batch, "batch", tensors))
        content = safetensors.torch.save(tensors, {"form": form})
        write_atomic(self.path / _BATCH_FILE.format(rank), lambda file: file.write(content))


def replay(folder: str | Path, *, rank: int | None = None, device: str = "cpu") -> dict[str, Tensor]:
    """Take the step again at which a run diverged: build its network, load its weights, compute its losses.

    A run whose loss is not finite leaves the folder ``diverged`` behind: ``model.safetensors``, the weights before
    the step; ``config.json``, how the network is built; ``batch-RANK.safetensors``, what each process that met such
    a loss had computed it on; and ``replay.json`` with task, recipe, seed, epoch, step and losses. On a CPU every
    step is looked at; on an accelerator the first of fifty is, and the weights are those it met, which an earlier
    step may have broken. Weights that are not finite are named as ``broken_weights``.

    Args:
        folder: That folder.
        rank: Which process's step; default the first that is there.
        device: Where to compute.

    Returns:
        The losses by name, scalars with their graph, for a debugger or ``torch.autograd.detect_anomaly``.

    Raises:
        OutputError: The folder does not hold such a step, or not of this process.
    """
    path, remedy = Path(folder), "give the folder `diverged` of a run whose loss was not finite"
    facts = read_json(path / REPLAY_FILE, remedy)
    with explained_read(path / REPLAY_FILE, remedy):
        task = task_named(facts["task"])
        recipe = task.recipe_class(**facts["recipe"])
        ranks = [int(number) for number in facts["losses"]]
        precision = facts["precision"]
    if rank is not None and rank not in ranks:
        raise OutputError(f"{path} has no step of process {rank}; give one of {', '.join(map(str, ranks))}")
    with torch.random.fork_rng(devices=[]):
        model = task.rebuild(ModelCard.read(path / CONFIG_FILE)).to(device).train()
    weights, place = path / WEIGHTS_FILES["last"], path / _BATCH_FILE.format(ranks[0] if rank is None else rank)
    try:
        model.load_state_dict(safetensors.torch.load_file(regular(weights), device))
        tensors = safetensors.torch.load_file(regular(place))
        with safetensors.safe_open(place, "pt") as file:
            batch = _put_together(json.loads(file.metadata()["form"]), tensors)
    except (OSError, RuntimeError, LookupError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise OutputError(f"{path} is not whole ({str(error).splitlines()[0]}); {remedy}") from error
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    with (
        torch.random.fork_rng(devices=[]),
        torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None),
    ):
        torch.set_rng_state(tensors[_RNG_STATE])
        return task.losses(model, move_data_to_device(batch, torch.device(device)), recipe)


def _plain(number: float) -> float | str:
    """A number as JSON has it; one that is not finite by its name."""
    return number if math.isfinite(number) else str(number)


def _taken_apart(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The form of a batch as JSON has it; its tensors by name go into ``tensors``.

    Raises:
        StaticKeyError: It holds something else than tensors, plain values, lists, tuples and dicts.
    """
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _taken_apart(part, f"{name}.{key}", tensors) for key, part in value.items()}}
    kind = type(value).__name__
    if type(value) in (list, tuple, *_NAMED.values()):
        return {kind: [_taken_apart(part, f"{name}.{i}", tensors) for i, part in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    raise StaticKeyError(f"{name} is a {kind}, of which no file is made; give tensors, plain values, lists and dicts")


def _put_together(form: dict[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    ((kind, value),) = form.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "value":
        return value
    if kind == "dict":
        return {key: _put_together(part, tensors) for key, part in value.items()}
    parts = [_put_together(part, tensors) for part in value]
    return parts if kind == "list" else tuple(parts) if kind == "tuple" else _NAMED[kind](*parts)
