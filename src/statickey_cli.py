"""The console script: what needs no torch is answered here, the rest by ``statickey.cli``.

``import statickey`` registers the models with timm, and so loads torch, which takes seconds. Hence this module
stands beside the package and reads its sources where others would import them.
"""

import ast
import difflib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TypeVar

COMMANDS = {
    "compare": "Train one network with several token mixers and seeds, and compare them.",
    "train": "Train one network.",
    "evaluate": "Score a trained network.",
    "predict": "Classify images with a trained network.",
    "convert": "Give a trained classifier static keys, without training.",
    "attention": "Show where networks look: a page to move over, and pictures.",
    "export": "Write a trained network for other programs: ONNX, also in int8, torch.export, a hub's folder.",
    "bench": "Measure speed and memory against timm and against the machine's limits.",
    "summary": "Parameters, multiply-accumulates and activations of models, beside the published figures.",
    "checks": "Show versions, devices and kernels, and test that all compute what they should here.",
}
"""What each command does; each is a module of ``statickey.cli``."""

EVERYWHERE = {"config", "debug", "help", "plugin", "print_config"}
"""Options of every command."""

T = TypeVar("T")
_PACKAGE = Path(__file__).with_name("statickey")
RECIPES = _PACKAGE / "recipes"
_SIGNATURES = {
    "compare": ("compare.compare", "tasks.ClassificationRecipe", "tasks.Machine"),
    "train": ("tasks.train", "tasks.ClassificationRecipe", "tasks.Machine"),
    "evaluate": ("tasks.evaluate",),
    "predict": ("tasks.predict",),
    "convert": ("tasks.convert_run",),
    "attention": ("tasks.show_attention",),
    "export": ("export.export_run",),
    "bench": ("bench.bench",),
    "summary": ("summary.summary",),
    "checks": ("checks.checks",),
}
"""The functions and dataclasses whose parameters and fields are a command's options."""
TRAINING = ("compare", "train")
"""Commands that take a task and its recipe; ``_SIGNATURES`` has the recipe of the first task."""
_NO_OPTIONS = {"recipe", "machine", "console"}
"""Parameters that are made of options, or of none."""


def main() -> int:
    """Run one command; the exit code of ``statickey.cli.main``."""
    args = sys.argv[1:]
    code = to_the_end(lambda: answer(args))
    if code is None:
        try:
            from statickey.cli import main as run
        except KeyboardInterrupt:
            return 130

        code = run(args)
    return code


def to_the_end(command: Callable[[], T]) -> T | int:
    """Run a command, and see what it printed through.

    Returns:
        What it returns; 2 where standard output is full, in one line, and 1 where whoever read it has left.
    """
    try:
        try:
            return command()
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter tries once more
        if error.errno == errno.EPIPE:
            return 1
        return _refuse(f"cannot write to standard output: {error.strerror}; free some space or write elsewhere")


def answer(args: Sequence[str]) -> int | None:
    """Answer what the sources alone can tell: help, the version, and names that do not exist.

    Returns:
        The exit code; None where the command is to run.
    """
    command, *words = [arg for arg in args if arg != "--debug"] or ["--help"]
    if command in ("-h", "--help"):
        return _say(_help())
    if command == "--version":
        return _say(f"statickey {_version()}")
    if command.startswith("-"):
        return _refuse(f"{command} comes before the command; statickey --help lists the commands")
    if command not in COMMANDS:
        return _refuse(_unknown("command", command, COMMANDS))
    extended = command in TRAINING and _is_extended(words)
    for word in words:
        if word == "--" or extended:
            break
        name = option_name(word)
        if name is not None and name not in options(command) | EVERYWHERE:
            return _refuse(_unknown("option", name, options(command)))
    return None


@cache
def options(command: str) -> frozenset[str]:
    """Names of the options that a command has of its own, words without dashes included."""
    names: set[str] = set()
    for signature in _SIGNATURES[command]:
        module, _, name = signature.rpartition(".")
        names.update(_names(_source(_PACKAGE / module), name))
    own = {"task"} if command in TRAINING else set()
    return frozenset(names - _NO_OPTIONS | own)


def _is_extended(words: Sequence[str]) -> bool:
    """Whether another task, or a plugin, may bring options of its own."""
    pairs = []
    for i, word in enumerate(words, start=1):
        name, equals, value = word.partition("=")
        pairs.append((name, value if equals else "".join(words[i : i + 1])))
    if any(name in ("--task", "--plugin") for name, _ in pairs):
        return True
    named = (value for name, value in pairs if name == "--config")
    files = (path for value in named for path in (Path(value), RECIPES / f"{value}.yaml") if path.is_file())
    return any(re.search(r"^(task|plugin):", file.read_text(errors="replace"), re.M) for file in files)


def option_name(word: str) -> str | None:
    """The option that ``--a-b=1``, ``--a-b.c`` or ``--a-b+`` sets, ``a_b``; None for other words."""
    if not word.startswith("--"):
        return None
    return word[2:].partition("=")[0].partition(".")[0].rstrip("+").replace("-", "_")


def _names(file: Path, name: str) -> Iterator[str]:
    """Parameters of a function, or fields of a dataclass and of its bases within the package."""
    found = _find(file, name)
    if found is None:
        return
    file, node = found
    if isinstance(node, ast.FunctionDef):
        yield from (argument.arg for argument in (*node.args.args, *node.args.kwonlyargs))
        return
    for base in node.bases:
        if isinstance(base, ast.Name):
            yield from _names(file, base.id)
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and "ClassVar" not in ast.unparse(line.annotation):
            yield ast.unparse(line.target)


def _find(file: Path, name: str) -> tuple[Path, ast.FunctionDef | ast.ClassDef] | None:
    """The definition behind a name of a file, through imports from others of the package."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return file, node
        if isinstance(node, ast.ImportFrom) and node.level:
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    module = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                    return _find(_source(module), alias.name)
    return None


def _source(module: Path) -> Path:
    return module / "__init__.py" if module.is_dir() else module.with_suffix(".py")


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """In the words of ``statickey._checks.check_name``."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.4)
    hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(names[:12])}"
    return f"unknown {kind} {name!r}; {hint}"


def _version() -> str:
    lines = _source(_PACKAGE).read_text(encoding="utf-8").splitlines()
    line = next(line for line in lines if line.startswith("__version__"))
    return str(ast.literal_eval(line.partition("=")[2].strip()))


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {description}" for name, description in COMMANDS.items()]
    return "\n".join(
        [
            "usage: statickey COMMAND [options]",
            "",
            "Static-key attention for vision.",
            "",
            *lines,
            "",
            "statickey COMMAND --help shows a command's options; with --debug, a refusal shows where it arose.",
            "statickey --version shows the version.",
        ]
    )


def _say(text: str) -> int:
    print(text)  # noqa: T201
    return 0


def _refuse(text: str) -> int:
    print(f"statickey: {text}", file=sys.stderr)  # noqa: T201
    return 2
