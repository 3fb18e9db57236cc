"""``statickey train``."""

from typing import Any

from jsonargparse import ArgumentParser

from ..tasks import Machine, ClassificationRecipe, train
from .options import add_run_options, take


def add_options(parser: ArgumentParser) -> None:
    """Options from the signature of ``train``."""
    parser.add_function_arguments(train, skip={"recipe", "machine", "console"})
    add_run_options(parser)


def run(options: dict[str, Any]) -> None:
    """Run the command."""
    train(take(ClassificationRecipe, options), machine=take(Machine, options), **options)
