"""``statickey checks``."""

from typing import Any

from jsonargparse import ArgumentParser

from ..checks import checks


def add_options(parser: ArgumentParser) -> None:
    """Options from the signature of ``checks``."""
    parser.add_function_arguments(checks, skip={"console"}, as_positional=False)


def run(options: dict[str, Any]) -> int:
    """Run the command; 1 where something computes what it should not."""
    return int(not all(each.passed for each in checks(**options)))
