"""What stands in place of a network's attention, and where: a mixer, its arguments and layers."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from .._checks import check_mapping, check_name
from ..convert.swap import Layers
from ..errors import StaticKeyError
from ..layers import MIXERS

_FLOAT = re.compile(r"[-+]?\d*\.?\d+[eE][-+]?\d+")
"""Numbers such as 1e-3, which YAML takes for text without a point."""
FORM = (
    "MIXER[:NAME=VALUE,...][@LAYER,...], such as cska:kernel_size=5, ska:key_size=[4,4] (a pair in brackets) or "
    "ska@-3,-2,-1"
)


@dataclass(frozen=True)
class Swap:
    """A mixer in place of attention.

    Its text is ``MIXER[:NAME=VALUE,...][@LAYER,...]``: ``ska``, ``cska:kernel_size=5``, ``ska@-3,-2,-1``,
    ``fcska:kernel_size=5@blocks.1*``.

    Args:
        mixer: A name in ``MIXERS``.
        layers: As in ``convert``: ``"all"``, or indices or names of layers.
        mixer_args: Further constructor arguments of the mixer.
    """

    mixer: str
    layers: Layers = "all"
    mixer_args: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name("mixer", self.mixer, MIXERS)
        check_mapping("mixer_args", self.mixer_args)
        if not isinstance(self.layers, str | int | list | tuple):
            raise StaticKeyError(f'layers={self.layers!r} names no module; pass "all", indices or name patterns')
        if self.layers != "all":
            layers: Any = (self.layers,) if isinstance(self.layers, str | int) else self.layers
            object.__setattr__(self, "layers", tuple(layers))

    def __str__(self) -> str:
        args = ",".join(f"{name}={_shown(value)}" for name, value in sorted(self.mixer_args.items()))
        where = "" if self.layers == "all" else "@" + ",".join(map(str, self.layers))  # type: ignore[arg-type]
        return self.mixer + (f":{args}" if args else "") + where

    @staticmethod
    def name_in(text: str) -> str:
        """The mixer's name in a swap's text, whether or not it is known."""
        return text.partition("@")[0].partition(":")[0]

    @classmethod
    def parse(cls, text: "str | Swap") -> "Swap":
        """Read a swap's text.

        Raises:
            UnknownNameError: No mixer of that name.
            StaticKeyError: The text is not of that form.
        """
        if isinstance(text, Swap):
            return text
        if not isinstance(text, str):
            raise StaticKeyError(f"mixer {text!r} must be text: {FORM}")
        rest, at, where = text.partition("@")
        mixer, colon, args = rest.partition(":")
        check_name("mixer", mixer, MIXERS)
        if (at and not where) or (colon and not args):
            raise StaticKeyError(f"mixer {text!r} ends too soon; write {FORM}")
        layers: Any = "all" if where in ("", "all") else [_number_or_text(item) for item in where.split(",")]
        return cls(mixer, layers, _arguments(text, args))

    @classmethod
    def parse_all(cls, text: "str | Swap") -> "list[Swap]":
        """Read one swap, or several, one after another, with ``;`` between."""
        return [cls.parse(part) for part in (text.split(";") if isinstance(text, str) else [text])]


def _arguments(text: str, args: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in re.split(r",(?![^\[]*\])", args) if args else []:  # a list in brackets is one value
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier() or name in found:
            raise StaticKeyError(f"mixer {text!r} has {item!r}; write {FORM}")
        try:
            found[name] = float(value) if _FLOAT.fullmatch(value) else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise StaticKeyError(f"mixer {text!r} has {item!r}, whose value cannot be read; write {FORM}") from error
    return found


def _number_or_text(item: str) -> int | str:
    return int(item) if re.fullmatch(r"-?\d+", item) else item


def _shown(value: Any) -> str:
    """A value as YAML on one line."""
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10_000)
        .removesuffix("\n...\n")
        .strip()
        .replace(", ", ",")
    )
