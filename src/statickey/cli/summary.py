"""``statickey summary``."""

from typing import Any

from jsonargparse import ArgumentParser

from ..summary import summary


def add_options(parser: ArgumentParser) -> None:
    """Options from the signature of ``summary``; models are given as words."""
    parser.add_argument(
        "models",
        nargs="*",
        type=str,
        default=[],
        help="Names, wildcards ('cska*_s18'), or a name with a mixer per stage "
        "(skaformer_s18=sepconv,sepconv,ska,mhsa); default all.",
    )
    parser.add_function_arguments(summary, skip={"models", "console"}, as_positional=False)


def run(options: dict[str, Any]) -> None:
    """Run the command."""
    summary(**options)
