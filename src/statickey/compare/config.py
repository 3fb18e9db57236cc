"""What a comparison is: a recipe, and which mixers and seeds run it."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from .._checks import check_choice, check_seed
from .._files import read_yaml, write_text
from .._plugins import loaded_plugins
from ..errors import OutputError, StaticKeyError
from ..models import Swap
from ..tasks import Machine, Recipe, ScoreOn, Task, difference, identities, task_of

CONFIG_FILE = "config.yaml"
_LONGEST_NAME = 200
_MAY_DIFFER = (
    "data",
    "data_dir",
    "weights",
    "mixers",
    "seeds",
    "out",
    "plugin",
    *(field.name for field in fields(Machine)),
)
"""Options that may differ between calls into one folder; data and weights count by their content."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """The arguments of ``compare``; see there. Mixers are kept as text."""

    recipe: Recipe
    machine: Machine
    mixers: tuple[str, ...]
    seeds: tuple[int, ...]
    score_on: ScoreOn
    out: str
    plugins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("mixers", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise StaticKeyError(f"{name}={list(values)} must name at least one, none twice")
        for seed in self.seeds:
            check_seed(seed)
        names: dict[str, str] = {}
        for mixer in self.mixers:
            name = run_name(mixer, 0)
            if len(name) > _LONGEST_NAME:
                raise StaticKeyError(f"mixer {mixer!r} is too long for a folder's name; use patterns of layers")
            if name in names:
                raise StaticKeyError(
                    f"mixers {names[name]!r} and {mixer!r} would share a folder; write one differently"
                )
            names[name] = mixer
        check_choice(score_on=(self.score_on, ("test", "holdout")))
        if getattr(self.recipe, "stream", False):
            raise StaticKeyError("stream=True: a comparison keeps its images in memory; leave out --stream")
        if self.machine.processes > 1:
            raise StaticKeyError(
                f"devices={self.machine.devices}, num_nodes={self.machine.num_nodes}: a comparison's run is on one "
                "device; start the same command once per device, and the processes share the runs of one --out"
            )

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        machine: Machine,
        mixers: Sequence[str | Swap],
        seeds: Sequence[int],
        score_on: ScoreOn,
        out: str,
    ) -> "CompareConfig":
        """The configuration of a call, its mixers and precision settled."""
        for name, values in (("mixers", mixers), ("seeds", seeds)):
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise StaticKeyError(f"{name}={values!r} must be a list")
        return cls(
            recipe=recipe.on(machine),
            machine=machine,
            mixers=tuple(str(Swap.parse(mixer)) for mixer in mixers),
            seeds=tuple(seeds),
            score_on=score_on,
            out=out,
            plugins=loaded_plugins(),
        )

    @property
    def task(self) -> Task:
        """What is learned."""
        return task_of(self.recipe)

    def to_dict(self) -> dict[str, Any]:
        """The arguments as plain values, as ``--config`` reads them."""
        plugins = {"plugin": list(self.plugins)} if self.plugins else {}
        which = {"mixers": list(self.mixers), "seeds": list(self.seeds), "score_on": self.score_on}
        task = {"task": self.task.name}
        return plugins | task | self.recipe.to_dict() | which | asdict(self.machine) | {"out": self.out}

    def ids(self, data_fingerprint: str) -> tuple[str, ...]:
        """Identities of all its runs' circumstances: the protocol and the data they see."""
        return identities(self.recipe, self.task.name, data_fingerprint, {"score_on": self.score_on})

    def joined(self, out: Path) -> "CompareConfig":
        """Check that this comparison belongs into ``out``, and join it with what is there.

        Returns:
            This configuration, with the mixers, seeds and plugins of earlier calls first: their runs are joined.

        Raises:
            OutputError: ``out`` holds a comparison under another protocol.
        """
        path = out / CONFIG_FILE
        if not path.is_file():
            return self
        earlier = read_yaml(path, "choose another --out")
        differs = difference(earlier, self.to_dict(), {"task": "classify"} | self.recipe.defaults(), _MAY_DIFFER)
        if differs:
            raise OutputError(
                f"{out} holds a comparison under another configuration ({differs}); choose another --out, or repeat "
                "the earlier options"
            )
        try:
            mixers = dict.fromkeys([*map(str, earlier["mixers"]), *self.mixers])
            seeds = dict.fromkeys([*map(int, earlier["seeds"]), *self.seeds])
            plugins = dict.fromkeys([*map(str, earlier.get("plugin", ())), *self.plugins])
        except (KeyError, TypeError, ValueError) as error:
            raise OutputError(f"{path} is not a comparison's configuration; choose another --out") from error
        return replace(self, mixers=tuple(mixers), seeds=tuple(seeds), plugins=tuple(plugins))

    def write(self, out: Path) -> None:
        """Write the configuration, which ``--config`` reads.

        Raises:
            OutputError: It cannot be written.
        """
        write_text(out / CONFIG_FILE, yaml.safe_dump(self.to_dict(), sort_keys=False))


def run_name(mixer: str, seed: int) -> str:
    """The name of a run's folder, of letters that any file system takes."""
    return f"{re.sub(r'[^A-Za-z0-9_.,=@+-]', '_', mixer)}-seed{seed}"
