"""``statickey compare``."""

import inspect
from typing import Any

from jsonargparse import ArgumentParser

from ..compare import compare
from .options import add_run_options, recipe_and_machine


def add_options(parser: ArgumentParser, task: str) -> None:
    """Options from the signature of ``compare``; lists are given as words: ``--mixers mhsa ska``."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(compare).parameters.items()}
    parser.add_argument(
        "--mixers",
        nargs="+",
        type=str,
        default=list(defaults["mixers"]),
        help="Token mixers: NAME, cska:kernel_size=5, ska@-3,-2,-1.",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(defaults["seeds"]), help="One run each.")
    parser.add_function_arguments(compare, skip={"recipe", "machine", "mixers", "seeds", "console"})
    add_run_options(parser, task)


def run(options: dict[str, Any]) -> None:
    """Run the command."""
    recipe, machine = recipe_and_machine(options)
    compare(recipe, machine=machine, **options)
