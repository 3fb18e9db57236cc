"""``statickey predict``."""

from typing import Any

from jsonargparse import ArgumentParser

from ..tasks import predict


def add_options(parser: ArgumentParser) -> None:
    """Options from the signature of ``predict``; images are given as words."""
    parser.add_argument("source", type=str, help="Folder of a run, or one of its weights files.")
    parser.add_argument(
        "files", nargs="+", type=str, help="Image files, folders, wildcards, or - for names on standard input."
    )
    parser.add_function_arguments(predict, skip={"source", "files", "console"})


def run(options: dict[str, Any]) -> int:
    """Run the command; 1 where a file was skipped."""
    return 1 if predict(**options).skipped else 0
