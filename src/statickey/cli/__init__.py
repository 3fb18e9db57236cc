"""The command line: ``statickey COMMAND``."""

import re
import sys
from collections.abc import Sequence

from statickey_cli import TRAINING, answer, to_the_end

from ..errors import StaticKeyError

_TRAIN_HINT = "statickey: this command needs the training extra: pip install 'statickey[train]'"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the program's name; default those of the process.

    Returns:
        0, 1 where ``predict`` skipped a file or ``checks`` found a fault, 2 after a refusal (one line on standard
        error; ``--debug`` shows where it arose), or 130 after Ctrl-C.
    """
    args = sys.argv[1:] if argv is None else list(argv)
    return to_the_end(lambda: _run(args))


def _run(args: list[str]) -> int:
    code = answer(args)
    if code is not None:
        return code
    debug = "--debug" in args
    command, *words = [arg for arg in args if arg != "--debug"]
    try:
        from .parser import run

        return run(command, words)
    except ModuleNotFoundError as error:
        if debug or (error.name or "").startswith("statickey"):
            raise
        print(f"{_TRAIN_HINT} ({error.name} is missing)", file=sys.stderr)  # noqa: T201
        return 2
    except StaticKeyError as error:
        if debug:
            raise
        print(f"statickey: {_on_one_line(error)}", file=sys.stderr)  # noqa: T201
        return 2
    except OSError as error:
        if debug or error.filename is None:
            raise
        print(f"statickey: cannot use {str(error.filename)!r}: {error.strerror}", file=sys.stderr)  # noqa: T201
        return 2
    except (MemoryError, RuntimeError) as error:
        asked = _memory(error)
        if debug or asked is None:
            raise
        print(f"statickey: out of memory{asked}; choose a smaller model, image size or batch", file=sys.stderr)  # noqa: T201
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        goes_on = "; the same command continues where it stopped" if command in TRAINING else ""
        print(f"statickey: interrupted{goes_on}", file=sys.stderr)  # noqa: T201
        return 130


def _memory(error: Exception) -> str | None:
    """How much memory was asked for and not there, as far as the error says; None if it is another error."""
    text = str(error)
    if not isinstance(error, MemoryError) and not re.search("out of memory|DefaultCPUAllocator", text):
        return None
    amount = re.search(r"allocate ([\d.]+ \w+)", text)
    return "" if amount is None else f", {amount[1]} were asked for"


def _on_one_line(error: StaticKeyError) -> str:
    """What an error says, with line breaks and other control characters of quoted names written out."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in str(error))
