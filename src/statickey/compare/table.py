"""The comparison as a table, for terminal and page alike."""

from typing import Any

from rich.table import Table


def results_table(summary: dict[str, Any]) -> Table:
    """The comparison as a table for the terminal."""
    baseline = summary["baseline"]
    table = Table(title=summary["title"], title_justify="left", caption_justify="left", title_style="bold")
    for name in ("mixer", "params", "MACs", "train img/s", "runs", "accuracy %", "EMA %"):
        table.add_column(name, justify="left" if name == "mixer" else "right", no_wrap=True)
    table.add_column(f"minus {baseline}", justify="right", no_wrap=True)
    table.add_column("95 % seeds (t)", justify="center", no_wrap=True)
    table.add_column("95 % images", justify="center", no_wrap=True)
    for row in summary["mixers"]:
        table.add_row(*row_cells(row, baseline))
    table.caption = summary["reading"]
    return table


def row_cells(row: dict[str, Any], baseline: str) -> list[str]:
    """The cells of one mixer's row, as text, for terminal and page alike."""
    difference = row["difference"]
    cells = [
        row["mixer"],
        f"{row['params'] / 1e6:.3f} M",
        f"{row['macs'] / 1e6:.1f} M",
        f"{row['images_per_second']:,.0f}",
        str(len(row["seeds"])),
        spread(row["accuracy_mean"], row["accuracy_std"]),
        spread(row["ema_accuracy_mean"], row["ema_accuracy_std"]),
    ]
    if row["mixer"] == baseline:
        return [*cells, "baseline", "", ""]
    if difference is None:
        return [*cells, "no common seed", "", ""]
    return [
        *cells,
        f"{difference['mean']:+.2f}",
        interval(difference["seed_interval"]),
        interval(difference["image_interval"]),
    ]


def spread(mean: float, std: float | None) -> str:
    """Mean and standard deviation."""
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def interval(bounds: Any) -> str:
    """An interval, or a dash."""
    return "–" if bounds is None else f"{bounds[0]:+.2f} … {bounds[1]:+.2f}"
