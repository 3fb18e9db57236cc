"""``statickey train``."""

from typing import Any

from jsonargparse import ArgumentParser

from ..tasks import train
from .options import add_run_options, recipe_and_machine


def add_options(parser: ArgumentParser, task: str) -> None:
    """Options from the signature of ``train``."""
    parser.add_function_arguments(train, skip={"recipe", "machine", "console"})
    add_run_options(parser, task)


def run(options: dict[str, Any]) -> None:
    """Run the command."""
    recipe, machine = recipe_and_machine(options)
    train(recipe, machine=machine, **options)
