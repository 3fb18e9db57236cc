"""Rows as tables for the terminal."""

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

READING = (
    "ms: median of the rounds; ratio: median of the ratios round by round, with quartiles, of the first name to the"
    " second; MB: peak memory beyond weights and input; limit: the least time by this machine's measured matrix"
    " product ({gmacs_per_second:.0f} GMAC/s) and copy ({gbytes_per_second:.0f} GB/s), as a share of the time taken"
)
_PHASES = {"forward": "forward", "training": "forward and backward", "step": "training step with AdamW"}


def tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """One table per group and phase."""
    keys = dict.fromkeys((row["group"], row["phase"]) for row in rows)
    return [
        _table(f"{group}: {_PHASES[phase]}", [r for r in rows if (r["group"], r["phase"]) == (group, phase)])
        for group, phase in keys
    ]


def _table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1))
    for name in ("contender", "ms", "ratio", "quartiles", "target", "MB", "ratio ", "limit"):
        table.add_column(name, justify="left" if name == "contender" else "right", no_wrap=name != "contender")
    for row in rows:
        table.add_row(*cells(row))
    return table


def cells(row: dict[str, Any]) -> list[str]:
    """The cells of a row, as text."""
    against = "" if row["against"] is None else f" : {row['against']}"
    ratio, at_most = row["ratio"], row["ratio_at_most"]
    quartiles = "" if ratio is None else f"{row['ratio_q1']:.2f}–{row['ratio_q3']:.2f}"
    met = "" if at_most is None else f"≤ {at_most:.2f} {'✓' if ratio <= at_most else '✗'}"
    memory, peak = row["memory_ratio"], row["peak_megabytes"]
    return [
        f"{row['contender']}{against}",
        f"{row['milliseconds']:.{1 if row['milliseconds'] < 1000 else 0}f}",
        "" if ratio is None else f"{ratio:.2f}",
        quartiles,
        met,
        "" if peak is None else f"{peak:.0f}",
        "" if memory is None else f"{memory:.2f}",
        f"{100 * row['share_of_limit']:.0f} %",
    ]
