"""``statickey compare``."""

import inspect
from typing import Any

from jsonargparse import ArgumentParser

from ..compare import compare


def compare_parser() -> ArgumentParser:
    """Options from the signature of ``compare``; lists are given as words: ``--mixers mhsa ska``."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(compare).parameters.items()}
    parser = ArgumentParser(
        exit_on_error=False,
        description="Train one network with several token mixers and seeds, and compare them.",
    )
    parser.add_argument(
        "--mixers", nargs="+", type=str, default=list(defaults["mixers"]), help="Names of token mixers."
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(defaults["seeds"]), help="One run each.")
    parser.add_function_arguments(compare, skip={"mixers", "seeds", "console"}, as_positional=False)
    return parser


def run_compare(options: dict[str, Any]) -> None:
    """Run the command."""
    compare(**options)
