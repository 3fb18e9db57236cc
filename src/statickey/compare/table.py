"""The comparison as a table, for terminal and page alike."""

from typing import Any

from rich.table import Table

from ..tasks.task import Metric

_DROPPED_FIRST = ("EMA", "95 % images", "95 % seeds (t)", "MACs", "params", "runs", "train img/s")
"""On a terminal that is too narrow; the page has them."""
_FRAME = 3
"""A column's border and padding."""


def results_table(summary: dict[str, Any], width: int) -> Table:
    """The comparison as a table for a terminal of so many columns."""
    table = Table(title=summary["title"], title_justify="left", caption_justify="left", title_style="bold")
    heads = column_heads(summary)
    rows = [row_cells(row, summary) for row in summary["mixers"]]
    widths = [_FRAME + max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    shown = list(range(len(heads)))
    for name in _DROPPED_FIRST:
        if 1 + sum(widths[i] for i in shown) <= width:
            break
        shown = [i for i in shown if not heads[i].startswith(name)]
    for i in shown:
        justify: Any = "left" if i == 0 else "center" if heads[i].startswith("95 %") else "right"
        table.add_column(heads[i], justify=justify, no_wrap=True)
    for cells in rows:
        table.add_row(*(cells[i] for i in shown))
    table.caption = summary["reading"]
    return table


def column_heads(summary: dict[str, Any]) -> list[str]:
    """The heads of ``row_cells``: what was found first, what it costs last."""
    metric = Metric(**summary["metric"])
    return [
        "mixer",
        f"{metric.label} {metric.unit}".rstrip(),
        f"minus {summary['baseline']}",
        "95 % joint",
        "p (Holm)",
        "95 % seeds (t)",
        "95 % images",
        f"EMA {metric.unit}".rstrip(),
        "runs",
        "params",
        "MACs",
        "train img/s",
    ]


def row_cells(row: dict[str, Any], summary: dict[str, Any]) -> list[str]:
    """The cells of one mixer's row, as text, for terminal and page alike."""
    difference, name = row["difference"], summary["metric"]["name"]
    if row["mixer"] == summary["baseline"]:
        found = ["baseline", "", "", "", ""]
    elif difference is None:
        found = ["no common seed", "", "", "", ""]
    else:
        joint, seeds, images = (interval(difference[key]) for key in ("interval", "seed_interval", "image_interval"))
        found = [f"{difference['mean']:+.2f}", joint, p_text(difference["adjusted_p"]), seeds, images]
    return [
        row["mixer"],
        spread(row[f"{name}_mean"], row[f"{name}_std"]),
        *found,
        spread(row[f"ema_{name}_mean"], row[f"ema_{name}_std"]),
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


def p_text(p_value: float | None) -> str:
    """A p value, or a dash."""
    return "–" if p_value is None else "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"


def difference_unit(metric: Metric) -> str:
    """What a difference of the metric is counted in."""
    return "points" if metric.unit == "%" else metric.unit or metric.label
