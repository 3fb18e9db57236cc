"""What a comparison is: everything that decides a run, apart from which mixer and seed it is of."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from .._checks import check_name, check_positive, check_rate
from .._files import write_text
from ..data import OnBadImage
from ..errors import OutputError, StaticKeyError
from ..layers import MIXERS

CONFIG_FILE = "config.yaml"
_MERGED = ("mixers", "seeds")
_NOT_PART_OF_A_RUN = ("mixers", "seeds", "out", "data", "data_dir")  # data count by their content


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """The arguments of ``compare``; see there."""

    data: str
    data_dir: str | None
    mixers: tuple[str, ...]
    seeds: tuple[int, ...]
    model: str
    model_args: dict[str, Any]
    img_size: int | None
    limit: int | None
    on_bad_image: OnBadImage
    epochs: int
    batch_size: int
    lr: float | None
    weight_decay: float
    warmup_epochs: float
    label_smoothing: float
    clip_grad: float
    ema_decay: float
    crop_padding: int | None
    flip: bool | None
    holdout: float
    score_on: Literal["test", "holdout"]
    accelerator: str
    precision: str
    out: str

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "CompareConfig":
        """From the arguments of ``compare``, as plain values; others of its locals are ignored."""
        values = {field.name: arguments[field.name] for field in fields(cls)}
        for name in ("data", "data_dir", "out"):
            values[name] = None if values[name] is None else str(values[name])
        values["mixers"], values["seeds"] = tuple(values["mixers"]), tuple(values["seeds"])
        args = values["model_args"]
        values["model_args"] = {} if args is None else json.loads(json.dumps(dict(args)))
        return cls(**values)

    def __post_init__(self) -> None:
        for mixer in self.mixers:
            check_name("mixer", mixer, MIXERS)
        for name in ("mixers", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise StaticKeyError(f"{name}={list(values)} must name at least one, none twice")
        if min(self.seeds) < 0:
            raise StaticKeyError(f"seeds={list(self.seeds)} must not be negative")
        check_positive(epochs=self.epochs, batch_size=self.batch_size)
        if self.img_size is not None:
            check_positive(img_size=self.img_size)
        if self.lr is not None and not self.lr > 0:
            raise StaticKeyError(f"lr={self.lr} must be positive")
        check_rate(label_smoothing=self.label_smoothing, ema_decay=self.ema_decay)
        if not 0 < self.holdout < 1:
            raise StaticKeyError(
                f"holdout={self.holdout} must be in (0, 1): the learning curves need held-out images"
            )
        for name in ("weight_decay", "warmup_epochs", "clip_grad", "crop_padding"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise StaticKeyError(f"{name}={getattr(self, name)} must not be negative")
        if self.score_on not in ("test", "holdout"):
            raise StaticKeyError(f"score_on={self.score_on!r} must be 'test' or 'holdout'")

    def to_dict(self) -> dict[str, Any]:
        """The arguments as plain values, in order."""
        values = asdict(self)
        return values | {"mixers": list(self.mixers), "seeds": list(self.seeds)}

    def protocol(self) -> dict[str, Any]:
        """What every run of the comparison shares."""
        return {k: v for k, v in self.to_dict().items() if k not in _NOT_PART_OF_A_RUN}

    def learning_rate(self, img_size: int) -> float:
        """The peak learning rate: as given, or what mhsa trains best with on images of this size."""
        if self.lr is not None:
            return self.lr
        return 3e-3 if img_size <= 16 else 1e-3

    def hash(self, data_fingerprint: str) -> str:
        """Identity of a run's circumstances: the protocol and the data it saw."""
        text = json.dumps([self.protocol(), data_fingerprint], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def joined(self, out: Path) -> "CompareConfig":
        """Check that this comparison belongs into ``out``, and join it with what is there.

        Returns:
            This configuration, with the mixers and seeds of earlier calls first: their runs are joined.

        Raises:
            OutputError: ``out`` holds a comparison under another protocol.
        """
        path = out / CONFIG_FILE
        merged = self
        if path.is_file():
            try:
                earlier = yaml.safe_load(path.read_text(encoding="utf-8"))
                before = {k: v for k, v in earlier.items() if k not in _NOT_PART_OF_A_RUN}
                kept = {name: tuple(dict.fromkeys([*earlier[name], *getattr(self, name)])) for name in _MERGED}
            except (yaml.YAMLError, AttributeError, KeyError, TypeError, UnicodeDecodeError) as error:
                raise OutputError(f"{path} is not a comparison's configuration; choose another --out") from error
            if before != self.protocol():
                raise OutputError(
                    f"{out} holds a comparison under another configuration "
                    f"({_difference(before, self.protocol())}); choose another --out, or repeat the earlier options"
                )
            merged = replace(self, mixers=kept["mixers"], seeds=kept["seeds"])
        return merged

    def write(self, out: Path) -> None:
        """Write the configuration, which ``--config`` reads.

        Raises:
            OutputError: It cannot be written.
        """
        write_text(out / CONFIG_FILE, yaml.safe_dump(self.to_dict(), sort_keys=False))


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    names = [*before, *(name for name in now if name not in before)]
    changed = [n for n in names if before.get(n, "absent") != now.get(n, "absent")]
    return "; ".join(f"{n}: {before.get(n, 'absent')} there, {now.get(n, 'absent')} here" for n in changed)
