"""Parsers made from the signatures of the commands' functions."""

import re
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace

from .. import __version__
from .._checks import check_mapping, check_name
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

_TRAINING = ("compare", "train")
"""Commands that recipes are for."""

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
    options: list[str] = []
    for name, description in COMMANDS.items():
        sub = ArgumentParser(exit_on_error=False, description=description)
        if name in args[:1]:
            module = import_module(f"{__package__}.{name}")
            module.add_options(sub)
            named = recipes() if name in _TRAINING else []
            choice = f", or a recipe of the package: {', '.join(named)}" if named else ""
            sub.add_argument(
                "--config", action=ActionConfigFile, help=f"YAML file with any of these options{choice}."
            )
            options = [key for key in sub.get_defaults().as_dict() if key != "config"]
            args = _with_configs(args, options, named)
            execute = module.run
        subcommands.add_subcommand(name, sub, help=description)
    try:
        namespace: Namespace = parser.parse_args(args)
    except ArgumentError as error:
        if mistyped := re.match(r"unrecognized arguments: --(\w+)", str(error)):
            check_name("option", mistyped[1], options)
        raise StaticKeyError(_one_line(error)) from error
    values: dict[str, Any] = namespace[namespace.subcommand].as_dict()
    values.pop("config", None)
    assert execute is not None
    return execute(values) or 0


def recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _with_configs(args: Sequence[str], options: Sequence[str], named: Sequence[str]) -> list[str]:
    """The arguments with names of recipes as the paths of their files, where no file has such a name.

    Raises:
        StaticKeyError: There is neither such a file nor such a recipe, or the file is not of options.
    """
    words = [word for arg in args for word in (arg.split("=", 1) if arg.startswith("--config=") else [arg])]
    for i, word in enumerate(words[1:], start=1):
        if words[i - 1] != "--config":
            continue
        if not Path(word).exists():
            if word not in named:
                choice = (
                    f"unknown recipe {word!r}; choose one of {', '.join(named)}, or"
                    if named
                    else f"no file {word!r};"
                )
                raise StaticKeyError(f"{choice} give a YAML file")
            words[i] = str(RECIPES / f"{word}.yaml")
        _check_config(Path(words[i]), options)
    return words


def _check_config(path: Path, options: Sequence[str]) -> None:
    if not path.is_file():  # a pipe is read once
        return
    try:
        values = check_mapping("the content", yaml.safe_load(path.read_text(encoding="utf-8")))
        for name in values:
            check_name("option", name, options)
    except (StaticKeyError, OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StaticKeyError(f"{path}: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
