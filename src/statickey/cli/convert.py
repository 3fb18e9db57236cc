"""``statickey convert``."""

from typing import Any

from jsonargparse import ArgumentParser

from ..tasks import convert_run


def add_options(parser: ArgumentParser) -> None:
    """Options from the signature of ``convert_run``."""
    parser.add_function_arguments(convert_run, skip={"console"}, as_positional=True)


def run(options: dict[str, Any]) -> None:
    """Run the command."""
    convert_run(**options)
