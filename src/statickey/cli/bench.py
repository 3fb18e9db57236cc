"""``statickey bench``."""

import inspect
from typing import Any

from jsonargparse import ArgumentParser

from ..bench import SUITES, bench


def add_options(parser: ArgumentParser) -> None:
    """Options from the signature of ``bench``; suites and mixers are given as words."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(bench).parameters.items()}
    parser.add_argument(
        "suites", nargs="*", type=str, default=list(defaults["suites"]), help=f"Any of {', '.join(SUITES)}."
    )
    parser.add_argument(
        "--mixers", nargs="+", type=str, default=list(defaults["mixers"]), help="Names of token mixers."
    )
    parser.add_function_arguments(bench, skip={"suites", "mixers", "console"}, as_positional=False)


def run(options: dict[str, Any]) -> None:
    """Run the command."""
    bench(**options)
