"""``statickey compare``."""

import inspect
from typing import Any

from jsonargparse import ArgumentParser

from ..compare import compare
from ..tasks import Machine, ClassificationRecipe
from .options import add_run_options, take


def add_options(parser: ArgumentParser) -> None:
    """Options from the signature of ``compare``; lists are given as words: ``--mixers mhsa ska``."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(compare).parameters.items()}
    parser.add_argument(
        "--mixers", nargs="+", type=str, default=list(defaults["mixers"]), help="Names of token mixers."
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(defaults["seeds"]), help="One run each.")
    parser.add_function_arguments(compare, skip={"recipe", "machine", "mixers", "seeds", "console"})
    add_run_options(parser)


def run(options: dict[str, Any]) -> None:
    """Run the command."""
    compare(take(ClassificationRecipe, options), machine=take(Machine, options), **options)
