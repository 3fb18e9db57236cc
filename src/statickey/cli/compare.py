"""``statickey compare``."""

from typing import Any

from jsonargparse import ArgumentParser

from ..compare import compare
from ..compare.main import MIXERS
from .options import add_run_options, recipe_and_machine


def add_options(parser: ArgumentParser, task: str) -> None:
    """Options from the signature of ``compare``; lists are given as words: ``--mixers mhsa ska``."""
    mixers, few = ", ".join(MIXERS), ", ".join(MIXERS[:2])
    parser.add_argument(
        "--mixers",
        nargs="+",
        type=str,
        help=f"Token mixers: NAME, cska:kernel_size=5, ska@-3,-2,-1. Default {mixers}; {few} on the built-in scenes.",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        help="One run each. Default 0 1 2; 0 on the built-in scenes, for a first look.",
    )
    parser.add_function_arguments(compare, skip={"recipe", "machine", "mixers", "seeds", "console"})
    add_run_options(parser, task)


def run(options: dict[str, Any]) -> None:
    """Run the command."""
    recipe, machine = recipe_and_machine(options)
    compare(recipe, machine=machine, **options)
