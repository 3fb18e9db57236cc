"""What a comparison is: a recipe, and which mixers and seeds run it."""

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from .._checks import check_name
from .._files import write_text
from ..errors import OutputError, StaticKeyError
from ..layers import MIXERS
from ..tasks import Machine, Recipe, difference

CONFIG_FILE = "config.yaml"
_MERGED = ("mixers", "seeds")
_FREE = ("data", "data_dir", "mixers", "seeds", "out", *(field.name for field in fields(Machine)))
"""Options that may differ between calls into one folder; data count by their content."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """The arguments of ``compare``; see there."""

    recipe: Recipe
    machine: Machine
    mixers: tuple[str, ...]
    seeds: tuple[int, ...]
    score_on: Literal["test", "holdout"]
    out: str

    def __post_init__(self) -> None:
        for mixer in self.mixers:
            check_name("mixer", mixer, MIXERS)
        for name in _MERGED:
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise StaticKeyError(f"{name}={list(values)} must name at least one, none twice")
        if min(self.seeds) < 0:
            raise StaticKeyError(f"seeds={list(self.seeds)} must not be negative")
        if self.score_on not in ("test", "holdout"):
            raise StaticKeyError(f"score_on={self.score_on!r} must be 'test' or 'holdout'")
        if self.recipe.stream:
            raise StaticKeyError("stream=True: a comparison keeps its images in memory; leave out --stream")
        if self.machine.devices * self.machine.num_nodes > 1:
            raise StaticKeyError(
                f"devices={self.machine.devices}, num_nodes={self.machine.num_nodes}: a comparison trains one run at "
                "a time on one device; start one per device, each with its own --seeds and --out"
            )

    def to_dict(self) -> dict[str, Any]:
        """The arguments as plain values, as ``--config`` reads them."""
        which = {"mixers": list(self.mixers), "seeds": list(self.seeds), "score_on": self.score_on}
        return self.recipe.to_dict() | which | asdict(self.machine) | {"out": self.out}

    def protocol(self) -> dict[str, Any]:
        """What every run of the comparison shares."""
        return {k: v for k, v in self.to_dict().items() if k not in _FREE}

    def hash(self, data_fingerprint: str) -> str:
        """Identity of a run's circumstances: the protocol and the data it saw."""
        return self.recipe.hash(data_fingerprint, score_on=self.score_on)

    def joined(self, out: Path) -> "CompareConfig":
        """Check that this comparison belongs into ``out``, and join it with what is there.

        Returns:
            This configuration, with the mixers and seeds of earlier calls first: their runs are joined.

        Raises:
            OutputError: ``out`` holds a comparison under another protocol.
        """
        path = out / CONFIG_FILE
        if not path.is_file():
            return self
        try:
            earlier = yaml.safe_load(path.read_text(encoding="utf-8"))
            before = {k: v for k, v in earlier.items() if k not in _FREE}
            kept = {name: tuple(dict.fromkeys([*earlier[name], *getattr(self, name)])) for name in _MERGED}
        except (yaml.YAMLError, AttributeError, KeyError, TypeError, UnicodeDecodeError) as error:
            raise OutputError(f"{path} is not a comparison's configuration; choose another --out") from error
        if before != self.protocol():
            raise OutputError(
                f"{out} holds a comparison under another configuration "
                f"({difference(before, self.protocol())}); choose another --out, or repeat the earlier options"
            )
        return replace(self, mixers=kept["mixers"], seeds=kept["seeds"])

    def write(self, out: Path) -> None:
        """Write the configuration, which ``--config`` reads.

        Raises:
            OutputError: It cannot be written.
        """
        write_text(out / CONFIG_FILE, yaml.safe_dump(self.to_dict(), sort_keys=False))
