"""Parsers made from the signatures of the commands' functions."""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace

from .. import __version__
from ..errors import StaticKeyError

COMMANDS = {
    "compare": "Train one network with several token mixers and seeds, and compare them.",
    "train": "Train one network.",
    "evaluate": "Score a trained network.",
    "predict": "Classify images with a trained network.",
    "bench": "Measure speed and memory against timm and against the machine's limits.",
    "summary": "Parameters, multiply-accumulates and activations of models, beside the published figures.",
}
"""Commands, each a module of this package with ``parser`` and ``run``, read only when it is asked for."""

RECIPES = Path(__file__).parents[1] / "recipes"


def run(args: Sequence[str]) -> int:
    """Parse and run.

    Returns:
        The exit code.

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
    execute: Callable[[dict[str, Any]], int | None] | None = None
    for name, description in COMMANDS.items():
        sub = ArgumentParser(exit_on_error=False, description=description)
        if name in args[:1]:
            module = import_module(f"{__package__}.{name}")
            module.add_options(sub)
            sub.add_argument(
                "--config",
                action=ActionConfigFile,
                help=f"YAML file with any of these options, or a recipe of the package: {', '.join(recipes())}.",
            )
            execute = module.run
        subcommands.add_subcommand(name, sub, help=description)
    try:
        namespace: Namespace = parser.parse_args(_with_recipes(args))
    except ArgumentError as error:
        raise StaticKeyError(_one_line(error)) from error
    options: dict[str, Any] = namespace[namespace.subcommand].as_dict()
    options.pop("config", None)
    assert execute is not None
    return execute(options) or 0


def recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _with_recipes(args: Sequence[str]) -> list[str]:
    """The arguments with names of recipes as the paths of their files, where no file has such a name."""
    words = [word for arg in args for word in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    for i, word in enumerate(words[1:], start=1):
        if words[i - 1] == "--config" and word in recipes() and not Path(word).is_file():
            words[i] = str(RECIPES / f"{word}.yaml")
    return words


def _one_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
