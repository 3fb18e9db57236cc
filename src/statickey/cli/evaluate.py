"""``statickey evaluate``."""

from typing import Any

from jsonargparse import ArgumentParser

from ..tasks import evaluate


def add_options(parser: ArgumentParser) -> None:
    """Options from the signature of ``evaluate``."""
    parser.add_function_arguments(evaluate, skip={"console"}, as_positional=True)


def run(options: dict[str, Any]) -> None:
    """Run the command."""
    evaluate(**options)
