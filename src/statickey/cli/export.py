"""``statickey export``."""

from typing import Any, get_args

from jsonargparse import ArgumentParser

from ..export import Format, export_run


def add_options(parser: ArgumentParser) -> None:
    """Options from the signature of ``export_run``; formats are given as words."""
    parser.add_argument(
        "source", type=str, help="Folder of a run or a converted network, or a pretrained model's name."
    )
    parser.add_argument("--formats", nargs="+", type=str, default=["onnx"], help=f"Of {', '.join(get_args(Format))}.")
    parser.add_function_arguments(export_run, skip={"source", "formats", "console"}, as_positional=False)


def run(options: dict[str, Any]) -> None:
    """Run the command."""
    export_run(**options)
