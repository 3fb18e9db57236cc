"""Options that several commands share."""

from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentParser

from ..tasks import Machine, ClassificationRecipe


def add_run_options(parser: ArgumentParser) -> None:
    """Options of a recipe and of the machine, each under its own name."""
    for cls in (ClassificationRecipe, Machine):
        parser.add_class_arguments(cls, as_group=True)


def take(cls: type[Any], options: dict[str, Any]) -> Any:
    """Build a dataclass from its options, which are taken out of the others."""
    return cls(**{field.name: options.pop(field.name) for field in fields(cls)})
