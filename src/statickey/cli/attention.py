"""``statickey attention``."""

from typing import Any

from jsonargparse import ArgumentParser

from ..tasks import show_attention


def add_options(parser: ArgumentParser) -> None:
    """Options from the signature of ``show_attention``; sources and images are given as words."""
    parser.add_argument(
        "sources",
        nargs="+",
        type=str,
        help="Folders of runs, converted networks or comparisons, or names of pretrained models.",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        type=str,
        help="Image files, folders of them or wildcards; default test images of the data.",
    )
    parser.add_function_arguments(show_attention, skip={"sources", "images", "console"}, as_positional=False)


def run(options: dict[str, Any]) -> None:
    """Run the command."""
    show_attention(**options)
