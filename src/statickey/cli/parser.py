"""Parsers made from the signatures of the commands' functions."""

from collections.abc import Sequence
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace

from .. import __version__
from ..errors import StaticKeyError
from .compare import compare_parser, run_compare
from .summary import run_summary, summary_parser

COMMANDS = {"compare": (compare_parser, run_compare), "summary": (summary_parser, run_summary)}


def run(args: Sequence[str]) -> None:
    """Parse and run.

    Raises:
        StaticKeyError: The arguments are not usable, or the command refuses.
    """
    parser = ArgumentParser(
        prog="statickey",
        description="Static-key attention for vision.",
        version=__version__,
        exit_on_error=False,
    )
    subcommands = parser.add_subcommands()
    for name, (make, _) in COMMANDS.items():
        sub = make()
        sub.add_argument("--config", action=ActionConfigFile, help="YAML file with any of these options.")
        subcommands.add_subcommand(name, sub)
    try:
        namespace: Namespace = parser.parse_args(list(args))
    except ArgumentError as error:
        raise StaticKeyError(_one_line(error)) from error
    options: dict[str, Any] = namespace[namespace.subcommand].as_dict()
    options.pop("config", None)
    COMMANDS[namespace.subcommand][1](options)


def _one_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
