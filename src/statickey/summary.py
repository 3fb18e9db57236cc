"""``statickey summary``: size and cost of models, as a table for the terminal, CSV and Markdown."""

import csv as csv_module
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ._checks import check_arguments, check_name
from ._files import check_writable, write_text
from .errors import StaticKeyError, UnknownNameError
from .models import ModelFigures, lsa_vit, model_figures, small_vit, static_key_former, static_key_vit

OURS = [*static_key_former.NAMES, *lsa_vit.NAMES, *static_key_vit.NAMES, *small_vit.NAMES]
PEERS = ("caformer_s18", "caformer_b36", "vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")
COLUMNS = ("model", "input", "params M", "GMACs", "activations M", "attention %", "published")
READING = (
    "GMACs: billions of multiply-accumulates of one image, by torch's counter on the unfused path and, for our"
    " models, in closed form too, which agree; FLOPs are twice that. activations: elements that products and"
    " convolutions write, attention maps included. attention %: part of the MACs inside attention, its projections"
    " included. published: parameters and GMACs, ≠ where they differ."
)


def summary(
    models: Sequence[str] = (),
    *,
    img_size: int | None = None,
    csv: Path | None = None,
    markdown: Path | None = None,
    console: Console | None = None,
) -> list[ModelFigures]:
    """Show parameters, multiply-accumulates and activations of models, beside the published figures.

    Nothing is computed with: models are built without memory, whatever their size.

    Args:
        models: Names, wildcards (``"cska*_s18"``), or a name with a mixer per stage
            (``"skaformer_s18=sepconv,sepconv,ska,mhsa"``); any timm model whose attention is known may join.
            Default: all of this package and five of timm to compare with.
        img_size: Side of the image in pixels; default each model's own.
        csv: Write the figures there too, in full.
        markdown: Write the table there too.
        console: Where to print; default the terminal.

    Returns:
        The figures, in the order asked for.

    Raises:
        UnknownNameError: No such model or mixer.
        StaticKeyError: A model refuses the image size or the mixers.
        OutputError: A file cannot be written.
    """
    check_arguments(summary, locals())
    console = Console() if console is None else console
    if not console.is_terminal and console.width < 140:
        console = Console(file=console.file, width=140)
    check_writable(csv=csv, markdown=markdown)
    wanted = _expand(models)
    steps = track(wanted, "counting", console=console, transient=True, disable=not console.is_terminal)
    figures = [model_figures(name, img_size=img_size, mixers=mixers) for name, mixers in steps]
    rows = [_cells(label, figure) for label, figure in zip(_labels(wanted), figures, strict=True)]
    notes = [f"{figure.name}: {text}" for figure in figures for text in figure.differences]
    table = Table(title="Models", title_justify="left", title_style="bold", caption_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("model", "input") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row, style="dim" if row[0] in PEERS else None)
    table.caption = READING + "".join(f"\n≠ {note}" for note in notes)
    console.print(table)
    if csv is not None:
        write_text(Path(csv), _csv(_labels(wanted), figures))
    if markdown is not None:
        write_text(Path(markdown), _markdown(rows, notes))
    return figures


def _expand(models: Sequence[str]) -> list[tuple[str, tuple[str, ...] | None]]:
    if not models:
        return [(name, None) for name in [*OURS, *PEERS]]
    wanted: list[tuple[str, tuple[str, ...] | None]] = []
    for item in models:
        name, equals, mixers = item.partition("=")
        if equals:
            if name not in static_key_former.NAMES:
                raise StaticKeyError(f"{item!r}: mixers per stage need a *former_* model, such as skaformer_s18=...")
            wanted.append((name, tuple(mixers.split(","))))
        elif any(letter in name for letter in "*?["):
            found = timm.list_models(name)
            if not found:
                raise UnknownNameError(f"no model matches {name!r}; statickey summary lists those of this package")
            wanted += [(match, None) for match in found]
        else:
            check_name("model", name, timm.list_models())
            wanted.append((name, None))
    return wanted


def _labels(wanted: Sequence[tuple[str, tuple[str, ...] | None]]) -> list[str]:
    return [name if mixers is None else f"{name}={','.join(mixers)}" for name, mixers in wanted]


def _cells(label: str, figure: ModelFigures) -> list[str]:
    published = ""
    if figure.published is not None:
        marks = [any(text.startswith(what) for text in figure.differences) for what in ("params", "GMACs")]
        values = (f"{figure.published.params_m:g} M", f"{figure.published.gmacs:.3g} G")
        published = " / ".join(f"{'≠ ' if mark else ''}{value}" for mark, value in zip(marks, values, strict=True))
    channels, height, width = figure.input_size
    return [
        label,
        f"{channels}x{height}x{width}",
        f"{figure.params / 1e6:.2f}",
        f"{figure.macs / 1e9:.3f}",
        f"{figure.activations / 1e6:.1f}",
        f"{100 * figure.attention_macs / figure.macs:.0f}",
        published,
    ]


def _csv(labels: Sequence[str], figures: Sequence[ModelFigures]) -> str:
    text = io.StringIO()
    fields = ["model", "input_size", "params", "macs", "attention_macs", "activations", "key_params", "key_macs"]
    writer = csv_module.DictWriter(
        text, [*fields, "published_params_m", "published_gmacs", "differences"], lineterminator="\n"
    )
    writer.writeheader()
    for label, figure in zip(labels, figures, strict=True):
        row: dict[str, Any] = {field: getattr(figure, field) for field in fields[2:]}
        row |= {"model": label, "input_size": "x".join(map(str, figure.input_size))}
        if figure.published is not None:
            row |= {"published_params_m": figure.published.params_m, "published_gmacs": figure.published.gmacs}
        writer.writerow(row | {"differences": "; ".join(figure.differences)})
    return text.getvalue()


def _markdown(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    lines = [COLUMNS, ["---"] * 2 + ["---:"] * (len(COLUMNS) - 2), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    head = "# Models\n\nMade by `statickey summary --markdown FILE`.\n\n"
    return f"{head}{table}\n\n{READING}\n\n" + "".join(f"- ≠ {note}\n" for note in notes)
