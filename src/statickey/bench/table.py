"""Rows as tables."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from .measure import KINDS

READING = (
    "ms: median of the rounds; ratio: median of the ratios round by round, with quartiles, of the first name to the"
    " second; MB: peak memory beyond weights and input; limit: the least time by this machine's measured matrix"
    " product and copy, as a share of the time taken; time in: where it went, in %, by torch's profiler."
)
_PLACE = ("device", "threads", "dtype", "compiled", "torch", "timm", "python")
_PHASES = {"forward": "forward", "training": "forward and backward", "step": "training step with AdamW"}
COLUMNS = ("contender", "ms", "ratio", "quartiles", "target", "MB", "ratio", "limit", "time in")
GRID_SUITE = "shapes"
"""Its rows make a table of ratios; above their target they are marked ✗, and – is a map too large to measure."""
_LEFT = ("contender", "time in")
_MOST_KINDS = 3
WIDE = 120
"""Columns of a terminal that has room for where the time goes."""


def tables(rows: Sequence[dict[str, Any]], *, wide: bool = True) -> list[Table]:
    """One table per group and phase, or grid and phase, for the terminal; ``wide`` with where the time goes."""
    made = [_grid_table(*grid) for grid in _grids(rows)]
    columns = COLUMNS if wide else COLUMNS[:-1]
    for title, members in _parts(rows).items():
        table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
        for name in columns:
            words = name in _LEFT
            table.add_column(name, justify="left" if words else "right", no_wrap=not words, min_width=18 * words)
        for row in members:
            table.add_row(*_cells(row)[: len(columns)])
        made.append(table)
    return made


def reading(rows: Sequence[dict[str, Any]]) -> str:
    """How to read the tables, and where which suites were measured."""
    places: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        places.setdefault(tuple(row[name] for name in _PLACE), []).append(row)
    parts = [READING]
    for (device, threads, dtype, compiled, *versions), members in places.items():
        suites = ", ".join(dict.fromkeys(row["suite"] for row in members))
        macs, copied = (max(row[f"{name}_per_second"] for row in members) for name in ("gmacs", "gbytes"))
        parts.append(
            f"{suites.capitalize()}: {device}, {threads} threads, {dtype}{', compiled' if compiled else ''};"
            f" {macs:.0f} GMAC/s, {copied:.0f} GB/s; torch {versions[0]}, timm {versions[1]}, python {versions[2]}."
        )
    return " ".join(parts)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The same tables as Markdown, with how to read them."""
    lines = []
    for title, names, cells in _grids(rows):
        lines += [f"**{title}**", "", f"| {' | '.join(names)} |", f"|---|{'---:|' * (len(names) - 1)}"]
        lines += [f"| {' | '.join(line)} |" for line in cells] + [""]
    for title, members in _parts(rows).items():
        rules = ["---" if name in _LEFT else "---:" for name in COLUMNS]
        lines += [f"**{title}**", "", f"| {' | '.join(COLUMNS)} |", f"|{'|'.join(rules)}|"]
        lines += [f"| {' | '.join(_cells(row))} |" for row in members] + [""]
    return "\n".join([*lines, reading(rows), ""])


def _parts(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["suite"] == GRID_SUITE:
            continue
        parts.setdefault(f"{row['group']}: {_PHASES[row['phase']]}", []).append(row)
    return parts


_Grid = tuple[str, list[str], list[list[str]]]


def _grids(rows: Sequence[dict[str, Any]]) -> list[_Grid]:
    """The ratios of the suite of shapes: a title, names of columns, and lines; one for each phase."""
    ratios: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:
        if row["suite"] == GRID_SUITE and row["ratio"] is not None:
            shape, batch = row["group"].rsplit(", ", 1)
            title = f"{row['contender']} : {row['against']}, {_PHASES[row['phase']]}"
            above = row["ratio_at_most"] is not None and row["ratio"] > row["ratio_at_most"]
            ratios.setdefault(title, {}).setdefault(shape, {})[batch] = f"{row['ratio']:.2f}{' ✗' * above}"
    grids = []
    for title, shapes in ratios.items():
        batches = list(dict.fromkeys(batch for cells in shapes.values() for batch in cells))
        lines = [[shape, *(cells.get(batch, "–") for batch in batches)] for shape, cells in shapes.items()]
        grids.append((title, ["ratio", *batches], lines))
    return grids


def _grid_table(title: str, names: list[str], lines: list[list[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in names:
        table.add_column(name, justify="left" if name == names[0] else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def _cells(row: dict[str, Any]) -> list[str]:
    against = "" if row["against"] is None else f" : {row['against']}"
    ratio, at_most = row["ratio"], row["ratio_at_most"]
    quartiles = "" if ratio is None else f"{row['ratio_q1']:.2f}–{row['ratio_q3']:.2f}"
    met = "" if at_most is None else f"≤ {at_most:.2f} {'✓' if ratio <= at_most else '✗'}"
    memory, peak = row["memory_ratio"], row["peak_megabytes"]
    spent = sorted(((kind, row[f"time_in_{kind}"]) for kind in KINDS), key=lambda pair: -pair[1])
    return [
        f"{row['contender']}{against}",
        f"{row['milliseconds']:.{1 if row['milliseconds'] < 1000 else 0}f}",
        "" if ratio is None else f"{ratio:.2f}",
        quartiles,
        met,
        "" if peak is None else f"{peak:.0f}",
        "" if memory is None else f"{memory:.2f}",
        f"{100 * row['share_of_limit']:.0f} %",
        ", ".join(f"{kind} {100 * share:.0f}" for kind, share in spent[:_MOST_KINDS] if share),
    ]
