"""Cases of options and configurations that are wrong in every generic way, drawn from the parsers themselves."""

import datetime
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from trial_stock import Stock

from statickey.cli.parser import new_parser
from statickey_cli import EVERYWHERE

MODEL = '{"depth": 1, "embed_dim": 8, "num_heads": 2}'
QUICK = ("--limit", "40", "--epochs", "1", "--model-args", MODEL, "--accelerator", "cpu")
BASE = {
    "train": ("train", *QUICK),
    "compare": ("compare", *QUICK, "--mixers", "ska", "--seeds", "0"),
    "evaluate": ("evaluate", "{run}", "--accelerator", "cpu"),
    "predict": ("predict", "{run}", "image.png", "--accelerator", "cpu"),
    "summary": ("summary", "skaformer_nano"),
    "bench": ("bench", "--rounds", "1", "--memory", "false", "--mixers", "ska"),
}
"""A command of each kind that runs, in a fraction of a second; ``{run}`` is a finished run."""

Verdict = Literal["refused", "ran", "either"]


@dataclass(frozen=True)
class Case:
    """A command and what must come of it."""

    name: str
    words: tuple[str, ...]
    verdict: Verdict = "refused"
    says: tuple[str, ...] = ()
    """A refusal names one of these."""
    prepare: Callable[[Path, Stock], Any] | None = None
    """Lays files into the folder of the case."""
    begins: bool = False
    """Whether a refusal may come when files have been written."""
    quick: bool = False
    """Whether it is always tried, not only among all cases."""


def nothing(folder: Path, stock: Stock) -> None:
    """Lay no file."""


VALUES: dict[str, Any] = {
    "empty": "",
    "nan": float("nan"),
    "inf": float("inf"),
    "minus inf": float("-inf"),
    "negative": -1,
    "zero": 0,
    "large": int("9" * 23),
    "fraction": 1.5,
    "true": True,
    "null": None,
    "word": "many",
    "unicode": "ünïcødé\u202e✓",
    "markup": "[bold]x[/nonsense]",
    "lines": "a\nb",
    "list": [1, "x"],
    "no list": [],
    "dict": {"a": 1},
    "folder": "folder",
    "no file": "nowhere/file",
    "binary": "binary.bin",
    "device": "/dev/full",
    "long": "x" * 3000,
}
"""What an option may be given."""
FILE_VALUES: dict[str, Any] = {
    "no dict": {},
    "date": datetime.date(2020, 2, 2),
    "bytes": b"\x00\xff",
    "nested": [[[{}]]],
    "nul": "a\0b",
    "keys": {1: {None: []}},
}
"""What a configuration may give besides."""
WORD_VALUES = {"no utf-8": "\udcff", "overflow": "1e999", "dashes": "--", "hex": "0x1g"}
"""What a command line may give besides."""
_NAMES = ("task", "model", "opt", "precision", "strategy", "mixer", "mixers", "suites", "models", "source", "weights")
"""Options of text that know what they may be."""
_HEAVY = {"compile", "stream", "logger"}
"""Options whose right values are tried elsewhere."""


def option_cases() -> Iterator[Case]:
    """Every option of every command with every value, on the command line and in a file."""
    rng = random.Random(2)
    words_of_kinds = {kind: _word(value) for kind, value in (VALUES | WORD_VALUES).items()}
    for command in BASE:
        options = _options(command)
        if command == "compare":  # a part of those it shares
            shared = sorted(options.keys() & _options("train").keys())
            options = {name: hint for name, hint in options.items() if name not in shared or rng.random() < 0.3}
        for option, hint in options.items():
            for kind, text in words_of_kinds.items():
                verdict = _verdict(command, option, hint, kind, text)
                name = f"{command} --{option} {kind}"
                if option in ("source", "files", "models", "suites"):
                    if kind != "dashes":
                        says = (*_called(option), repr(text)[:20], *([text[:20]] if text else []))
                        yield Case(name, _with_word(command, option, text), verdict, says)
                elif not (option in _HEAVY and verdict != "refused"):
                    says = (*_called(option), *_heard(text))
                    yield Case(name, (*BASE[command], f"--{option.replace('_', '-')}={text}"), verdict, says)
            for kind, value in (VALUES | FILE_VALUES).items():
                verdict = _verdict(command, option, hint, kind, value)
                if (option in _HEAVY and verdict != "refused") or (command, option) == ("predict", "source"):
                    continue  # words of the command line would take its place
                words = [*_without(command, option), "--config", "c.yaml"]
                prepare = _writes_option(option, value)
                says = (*_called(option), *_heard(str(value)))
                yield Case(f"{command} {option}: {kind}", tuple(words), verdict, says, prepare)


def _word(value: Any) -> str:
    """A value as the command line takes it."""
    text = value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True, width=9999)
    return text.removesuffix("\n").removesuffix("\n...")


def _called(option: str) -> tuple[str, ...]:
    """How a refusal may call an option; one of several names by what they are names of."""
    single = (option.removesuffix("s"),) if option in ("mixers", "models", "suites") else ()
    return (option, option.replace("_", "-"), *single)


def _heard(text: str) -> tuple[str, ...]:
    """Parts of a value by which a refusal may name it."""
    return ("refuses", "policy", *((text[:20], repr(text)[1:15]) if text.strip() else ()))


def _options(command: str) -> dict[str, Any]:
    actions = {action.dest: action for action in new_parser(command)._actions if action.dest not in EVERYWHERE}
    return {name: getattr(action, "_typehint", action.type or str) for name, action in actions.items()}


def _with_word(command: str, option: str, text: str) -> tuple[str, ...]:
    words = BASE[command]
    if option == "suites":
        return ("bench", text, *words[1:])
    return (command, *(text if i == (option == "files") else word for i, word in enumerate(words[1:])))


def _without(command: str, option: str) -> list[str]:
    """The words of a command without those that give an option."""
    words, kept = list(BASE[command]), []
    flag = f"--{option.replace('_', '-')}"
    skip = False
    for word in words:
        if word.startswith("--"):
            skip = word == flag
        if not skip:
            kept.append(word)
    if option in ("source", "models", "suites"):
        return [word for word in kept if word not in ("{run}", "skaformer_nano")]
    return [word for word in kept if word != "image.png"] if option == "files" else kept


def _verdict(command: str, option: str, hint: Any, kind: str, value: Any) -> Verdict:
    optional = NoneType in get_args(hint)
    if kind == "null" and (optional or option in ("files",)):
        return "either"
    types = {arg for arg in (get_args(hint) if optional else (hint,)) if arg is not NoneType}
    (plain,) = types if len(types) == 1 else (hint,)
    if plain is str or plain is Path or plain == "words":
        return _text_verdict(option, kind)
    if get_origin(plain) is Literal or plain is bool:
        return "either" if kind in ("true", "zero") and plain is bool else "refused"
    if plain is int:
        return "either" if kind == "zero" else "refused"
    if plain is float:
        return "either" if kind in ("zero", "fraction", "large") else "refused"
    if get_origin(plain) is dict or plain is dict:
        return "either" if kind in ("no dict", "null") else "refused"
    return "refused"


def _text_verdict(option: str, kind: str) -> Verdict:
    if option in _NAMES and not (option in ("mixers", "models", "suites", "source") and kind in ("list", "no list")):
        return "refused"
    if option == "data" and kind != "null":
        return "refused"
    if option in ("csv", "markdown", "out", "attention") and kind in ("folder", "device", "binary"):
        return "refused" if (option, kind) in (("csv", "folder"), ("markdown", "folder")) else "either"
    return "either"


BROKEN_YAML: dict[str, bytes] = {
    "empty": b"",
    "blank lines": b"\n\n\n",
    "comment": b"# nothing\n",
    "scalar": b"42",
    "text": b"epochs",
    "list": b"- epochs: 3",
    "null": b"~",
    "tab": b"epochs:\t\t3\n\tlr: 1",
    "unclosed list": b"mean: [0.5, 0.5",
    "unclosed dict": b"model_args: {depth: 1",
    "unclosed quote": b"data: 'digits",
    "bad indent": b"epochs: 1\n  lr: 0.1",
    "no colon": b"epochs 3\nlr 4",
    "two documents": b"epochs: 1\n---\nepochs: 2",
    "bad alias": b"epochs: *nothing",
    "recursive": b"model_args: &a {depth: *a}",
    "recursive list": b"mean: &a [*a]",
    "python object": b"data: !!python/object/apply:os.system ['touch ran']",
    "python name": b"data: !!python/name:os.system",
    "unknown tag": b"data: !mine digits",
    "number as key": b"3: 4",
    "list as key": b"? [1, 2]\n: 3",
    "null as key": b"~: 3",
    "dict as key": b"? {a: 1}\n: 3",
    "empty key": b"'': 3",
    "dotted key": b"model_args.depth: 3",
    "dashed key": b"batch-size: 3",
    "unknown key": b"epohcs: 3",
    "print_config": b"print_config: true",
    "help": b"help: true",
    "debug": b"debug: true",
    "config in config": b"config: c.yaml",
    "binary": bytes(range(256)),
    "latin-1": "data: Üü".encode("latin-1"),
    "utf-16": "epochs: 1".encode("utf-16"),
    "nul": b"epochs: 1\0",
    "zeros": bytes(1000),
    "deep": b"model_args: " + b"[" * 3000 + b"]" * 3000,
    "deep dict": b"model_args: " + b"{a: " * 3000 + b"}" * 3000,
    "json": b'{"epochs": 1, "lr": }',
    "merge": b"<<: 3",
    "date": b"epochs: 2020-02-30",
    "sexagesimal": b"epochs: 1:70",
    "octal": b"epochs: 0o9",
    "huge int": b"epochs: " + b"9" * 6000,
    "control": b"data: \x07bell",
    "escape": b'data: "\\xZZ"',
    "nested list": b"mixers: [[ska]]",
    "mixer twice": b"mixers: [ska, ska]",
    "no mixer": b"mixers: []",
    "no seed": b"seeds: []",
    "seed twice": b"seeds: [1, 1]",
    "negative seed": b"seeds: [-1]",
    "unknown task": b"task: clasify",
    "task list": b"task: [classify]",
    "task null": b"task:",
    "task dict": b"task: {a: 1}",
    "plugin number": b"plugin: 3",
    "plugin nowhere": b"plugin: [nowhere.py]",
    "plugin nested": b"plugin: [[a]]",
    "plugin dict": b"plugin: {a: 1}",
    "plugin empty text": b"plugin: ''",
}
"""Content of a configuration of ``compare``."""


_HARMLESS = {
    *("json", "nested list", "empty", "blank lines", "comment", "null", "merge", "sexagesimal", "dotted key"),
}
"""Those that may be read."""


def yaml_cases() -> Iterator[Case]:
    """Configurations broken as files."""
    for kind, content in BROKEN_YAML.items():
        verdict: Verdict = "refused"
        if kind in _HARMLESS:
            verdict = "either"
        words = ("compare", *QUICK, "--config", "c.yaml")
        if "mixer" not in kind:
            words += ("--mixers", "ska")
        if "seed" not in kind:
            words += ("--seeds", "0")
        if any(part in kind for part in ("octal", "date", "huge int", "sexagesimal")):
            words = tuple(word for i, word in enumerate(words) if "--epochs" not in words[max(i - 1, 0) : i + 1])
        yield Case(
            f"yaml {kind}",
            words,
            verdict,
            ("c.yaml", "plugin", "task", "mixers", "seed"),
            _writes("c.yaml", content),
            quick=True,
        )
    for command in BASE:
        for kind, path in {"folder": "folder", "device": "/dev/zero", "binary": "binary.bin", "nul": "a\0b"}.items():
            yield Case(f"{command} --config {kind}", (*BASE[command], "--config", path), says=(path, repr(path)))
        yield Case(f"{command} --config pipe", (*BASE[command], "--config", "p"), says=("'p'", "p"), prepare=_pipe)
        yield Case(f"{command} --config null device", (*BASE[command], "--config", os.devnull), "either")


def _pipe(folder: Path, stock: Stock) -> None:
    os.mkfifo(folder / "p")


def _writes_option(option: str, value: Any) -> Callable[[Path, Stock], None]:
    def write(folder: Path, stock: Stock) -> None:
        (folder / "c.yaml").write_text(yaml.safe_dump({option: value}, allow_unicode=True), encoding="utf-8")

    return write


def _writes(name: str, content: bytes) -> Callable[[Path, Stock], None]:
    def write(folder: Path, stock: Stock) -> None:
        (folder / name).write_bytes(content)

    return write


PLUGINS: dict[str, bytes] = {
    "syntax": b"def f(:\n",
    "indent": b"  x = 1\n",
    "raises": b"raise RuntimeError('no')\n",
    "raises without words": b"raise ValueError\n",
    "several lines": b"raise ValueError('one\\ntwo\\nthree')\n",
    "exits": b"import sys\nsys.exit(3)\n",
    "exits quietly": b"raise SystemExit\n",
    "import missing": b"import nowhere_at_all\n",
    "name": b"undefined\n",
    "zero": b"1 / 0\n",
    "recursion": b"def f(): f()\nf()\n",
    "binary": bytes(range(256)),
    "nul": b"x = 1\0\n",
    "latin-1": b"x = '\xfc'\n",
    "refusal": b"from statickey.errors import StaticKeyError\nraise StaticKeyError('not so')\n",
    "no mixer": b"from statickey import MIXERS\nMIXERS.register('x')(3)\n",
    "text of number": b"raise OSError(3)\n",
}


def plugin_cases() -> Iterator[Case]:
    """Plugins that fail, by command."""
    rng = random.Random(0)
    for kind, content in PLUGINS.items():
        for command in sorted(BASE) if kind in ("syntax", "exits") else rng.sample(sorted(BASE), 2):
            words = (*BASE[command], "--plugin", "mine.py")
            yield Case(f"{command} plugin {kind}", words, says=("mine.py",), prepare=_writes("mine.py", content))
    for word in (
        "nowhere.py",
        "nowhere",
        "folder",
        "folder/",
        "binary.bin",
        "..",
        ".",
        "a b",
        "os.nowhere",
        "ü.py",
        "/dev/null",
        "a\0b",
        ".a",
        "a..b",
    ):
        yield Case(f"plugin {word!r}", (*BASE["summary"], "--plugin", word), "refused", (word, repr(word)))
