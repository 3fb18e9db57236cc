"""The comparison as a table, for terminal and page alike."""

from typing import Any

from rich.table import Table

_LAST = ("EMA %", "runs", "params", "MACs", "train img/s")
"""Left out on a narrow terminal; the page has them."""
_WIDTH = 112


def results_table(summary: dict[str, Any], width: int = _WIDTH) -> Table:
    """The comparison as a table for a terminal of so many columns."""
    baseline = summary["baseline"]
    table = Table(title=summary["title"], title_justify="left", caption_justify="left", title_style="bold")
    heads = column_heads(baseline)
    shown = [i for i, name in enumerate(heads) if width >= _WIDTH or name not in _LAST]
    for i in shown:
        justify: Any = "left" if i == 0 else "center" if heads[i].startswith("95 %") else "right"
        table.add_column(heads[i], justify=justify, no_wrap=True)
    for row in summary["mixers"]:
        cells = row_cells(row, baseline)
        table.add_row(*(cells[i] for i in shown))
    table.caption = summary["reading"]
    return table


def column_heads(baseline: str) -> tuple[str, ...]:
    """The heads of ``row_cells``: what was found first, what it costs last."""
    return ("mixer", "accuracy %", f"minus {baseline}", "95 % seeds (t)", "95 % images", *_LAST)


def row_cells(row: dict[str, Any], baseline: str) -> list[str]:
    """The cells of one mixer's row, as text, for terminal and page alike."""
    difference = row["difference"]
    if row["mixer"] == baseline:
        found = ["baseline", "", ""]
    elif difference is None:
        found = ["no common seed", "", ""]
    else:
        intervals = [interval(difference[name]) for name in ("seed_interval", "image_interval")]
        found = [f"{difference['mean']:+.2f}", *intervals]
    return [
        row["mixer"],
        spread(row["accuracy_mean"], row["accuracy_std"]),
        *found,
        spread(row["ema_accuracy_mean"], row["ema_accuracy_std"]),
        str(len(row["seeds"])),
        f"{row['params'] / 1e6:.3f} M",
        f"{row['macs'] / 1e6:.1f} M",
        f"{row['images_per_second']:,.0f}",
    ]


def spread(mean: float, std: float | None) -> str:
    """Mean and standard deviation."""
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def interval(bounds: Any) -> str:
    """An interval, or a dash."""
    return "–" if bounds is None else f"{bounds[0]:+.2f} … {bounds[1]:+.2f}"
