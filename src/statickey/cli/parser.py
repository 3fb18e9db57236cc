"""Parsers made from the signatures of the commands' functions."""

import json
import re
from argparse import SUPPRESS, Action
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, Namespace

from statickey_cli import COMMANDS, EVERYWHERE, RECIPES, TRAINING, option_name

from .._checks import check_mapping, check_name, type_in_words
from .._files import regular
from .._plugins import load_plugins, loaded_plugins
from ..errors import StaticKeyError

DEFAULT_TASK = "classify"


def run(command: str, args: Sequence[str]) -> int:
    """Parse and run.

    Args:
        command: One of ``COMMANDS``.
        args: The arguments after it.

    Returns:
        The exit code.

    Raises:
        StaticKeyError: The arguments are not usable, or the command refuses.
    """
    words, taken = _taken(args)
    configs = {path: _content(path) for path in (_config_file(command, word) for word in taken["config"])}
    named = [_plugins_of(path, values) for path, values in configs.items()]
    load_plugins([source for sources in (*named, taken["plugin"]) for source in sources])
    tasks = [str(values["task"]) for values in configs.values() if "task" in values] + taken["task"]
    parser = new_parser(command, tasks[-1] if tasks else DEFAULT_TASK)
    actions = {action.dest: action for action in parser._actions if action.dest not in EVERYWHERE}
    given: dict[str, Any] = {}
    places: dict[str, Path] = {}
    for path, values in configs.items():
        given |= _checked(path, {k: v for k, v in values.items() if k != "task" or k not in actions}, actions)
        places |= dict.fromkeys(values, path)
    for word in words:
        places.pop(option_name(word) or "", None)
    for name in given.keys() & {name for name, action in actions.items() if action.nargs == "*"}:
        actions[name].default = given[name]  # which argparse takes where no word is given
    try:
        namespace = parser.parse_args(words, namespace=Namespace(given | {"plugin": list(loaded_plugins())}))
    except ArgumentError as error:
        raise StaticKeyError(_explained(str(error), command, actions, places)) from error
    options = {name: value for name, value in namespace.as_dict().items() if name in actions}
    for name, action in actions.items():
        if (
            action.nargs == "+" and options[name] is not None and not options[name]
        ):  # as of --mixers=--, which argparse lets pass
            place = f"{places[name]}: " if name in places else ""
            raise StaticKeyError(f"{place}{name} is given nothing; it must be {_takes(action)}")
    return import_module(f"{__package__}.{command}").run(options) or 0


def new_parser(command: str, task: str = DEFAULT_TASK) -> ArgumentParser:
    """The parser of a command, whose options are those of its function, and of the recipe of a task."""
    parser = ArgumentParser(
        prog=f"statickey {command}",
        description=COMMANDS[command],
        exit_on_error=False,
        allow_abbrev=False,
    )
    module = import_module(f"{__package__}.{command}")
    if command in TRAINING:
        module.add_options(parser, task)
    else:
        module.add_options(parser)
    choice = f", or a recipe of the package: {', '.join(recipes())}" if command in TRAINING else ""
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help=f"YAML file with any of these options{choice}. Options on the command line count more.",
    )
    parser.add_argument(
        "--plugin",
        type=list[str],
        default=[],
        metavar="FILE",
        help="Python file, or name of a module, to import first: it may register mixers, models and hosts. "
        "May be repeated.",
    )
    parser.add_argument("--debug", action="store_true", default=SUPPRESS, help="Show where a refusal arose.")
    return parser


def recipes() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def _taken(args: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The arguments without those that are read first, names with underscores; and what these were given.

    Raises:
        StaticKeyError: One of them was given nothing.
    """
    rest: list[str] = []
    taken: dict[str, list[str]] = {"config": [], "plugin": [], "task": []}
    words = iter(args)
    for word in words:
        if word == "--":
            rest += [word, *words]
            break
        name, equals, value = word.partition("=")
        option = option_name(name)
        if option is None:
            rest.append(word)
        elif option not in taken:
            rest.append("--" + name[2:].replace("-", "_") + equals + value)
        else:
            found = value if equals else next(words, "")
            if not found:
                takes = "a task" if option == "task" else "a file"
                raise StaticKeyError(f"{name} is given nothing; it takes the name of {takes}")
            taken[option].append(found)
    return rest, taken


def _config_file(command: str, word: str) -> Path:
    """The file that ``--config`` means; a recipe of the package where there is no file of that name.

    Raises:
        StaticKeyError: There is neither.
    """
    path = Path(word)
    named = recipes() if command in TRAINING else []
    if path.exists() and not path.is_dir():
        return path
    if word in named:
        return RECIPES / f"{word}.yaml"
    if path.is_dir():
        raise StaticKeyError(f"{word!r} is a folder; give a YAML file, such as {path / 'config.yaml'}")
    choice = f"unknown recipe {word!r}; choose one of {', '.join(named)}, or" if named else f"no file {word!r};"
    raise StaticKeyError(f"{choice} give a YAML file")


def _content(path: Path) -> dict[str, Any]:
    try:
        values = check_mapping("the content", yaml.safe_load(regular(path).read_text(encoding="utf-8")))
        json.dumps(values, default=str, skipkeys=True)  # fails where a list or mapping contains itself
    except RecursionError as error:
        raise StaticKeyError(f"{path}: its values are nested too deeply") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise StaticKeyError(f"{path}: {_one_line(str(error))}") from error
    return values


def _plugins_of(path: Path, values: dict[str, Any]) -> list[str]:
    """The plugins of a configuration, taken out of it."""
    found = values.pop("plugin", None)
    sources = [] if found is None else [found] if isinstance(found, str) else found
    if not isinstance(sources, list) or not all(isinstance(source, str) for source in sources):
        raise StaticKeyError(f"{path}: plugin={found!r} must be a file or a module's name, or a list of them")
    return sources


def _checked(path: Path, values: dict[str, Any], actions: dict[str, Action]) -> dict[str, Any]:
    """The options of a file; a single value where several may stand is a list of one.

    Raises:
        StaticKeyError: One does not exist, or has no value.
    """
    checked = {}
    for name, value in values.items():
        try:
            check_name("option", name, actions)
        except StaticKeyError as error:
            raise StaticKeyError(f"{path}: {error}") from error
        several = actions[name].nargs in ("+", "*")
        if value is None and (several or NoneType not in get_args(_hint(actions[name]))):
            raise StaticKeyError(
                f"{path}: {name} has no value; it must be {_takes(actions[name])}, or leave the line out"
            )
        checked[name] = [value] if several and not isinstance(value, list) else value
    return checked


def _explained(error: str, command: str, actions: dict[str, Action], places: dict[str, Path]) -> str:
    """What is wrong with which option, in one line.

    Args:
        error: What jsonargparse or argparse says.
        command: Of which command.
        actions: Its options.
        places: The file that an option was read from.
    """
    text = _one_line(error)
    if wrong := re.match(r'Parser key "(\w+)".*?(?:Given value|Got value): (.*)', text):
        name, value = wrong[1], wrong[2].rpartition("Given value: ")[2]
        place = f"{places[name]}: " if name in places else ""
        return f"{place}{name}={value} must be {_takes(actions[name])}"
    if wrong := re.match(r"argument --(\w+): expected", text):
        return f"{wrong[1]} is given nothing; it must be {_takes(actions[wrong[1]])}"
    if wrong := re.match(r"unrecognized arguments: --(\w+)", text):
        return f"{wrong[1]} is given as a word of its own, without --{wrong[1]}; see statickey {command} --help"
    text = text.replace("unrecognized arguments", "unexpected").replace(
        "the following arguments are required", "missing"
    )
    return f"{text}; see statickey {command} --help"


def _takes(action: Action) -> str:
    words = type_in_words(_hint(action))
    return f"{words}, or several" if action.nargs in ("+", "*") else words


def _hint(action: Action) -> Any:
    return getattr(action, "_typehint", action.type)


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines() if line.strip())
