"""Verdicts of published tables, read again with one interval over seeds and images and Holm over the mixers.

    python benchmarks/joint_intervals.py docs/results/*.md README.md

The scores of single images are gone, so the errors come from the tables: over seeds from the interval by Student's t,
over images from that of the bootstrap, taken as normal. How much of both is residual is not known, between nothing
and all of the error over images; the widest interval of that range is printed. It is conservative: the scores
themselves would give one as wide or narrower. Prints, for each table that has runs, a difference and both intervals,
the joint interval and p by Holm.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from scipy import stats

from statickey.compare import holm
from statickey.compare.statistics import joint_half_width, joint_p_value
from statickey.compare.table import interval, p_text

Row = dict[str, str]
SEEDS, IMAGES = "95 % seeds (t)", "95 % images"


def tables(text: str) -> Iterator[list[Row]]:
    """The tables of a page in Markdown, rows by the names of their columns."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines())
        yield [dict(zip(head, row, strict=False)) for row in rows]


def errors(row: Row, seeds: int) -> tuple[float, float]:
    """Standard errors over seeds and over images, from both intervals."""
    widths = []
    for name in (SEEDS, IMAGES):
        low, high = (float(bound) for bound in row[name].split("…"))
        widths.append((high - low) / 2)
    return widths[0] / stats.t.isf(0.025, seeds - 1), widths[1] / stats.norm.isf(0.025)


def read_again(rows: list[Row]) -> Iterator[tuple[str, str, str]]:
    """Name, joint interval and p by Holm of each row that has several seeds."""
    minus = next(name for name in rows[0] if name.startswith("minus "))
    first = next(iter(rows[0]))
    found = []
    for row in rows:
        if "…" not in row[SEEDS]:
            continue
        mean, seeds = float(row[minus]), int(row["runs"])
        of_seeds, of_images = errors(row, seeds)
        half = max(joint_half_width(of_seeds, of_images, residual, seeds) for residual in (0.0, of_images))
        p_value = max(joint_p_value(mean, of_seeds, of_images, residual, seeds) for residual in (0.0, of_images))
        found.append((row[first], (mean - half, mean + half), p_value))
    for (name, bounds, _), adjusted in zip(found, holm([p for _, _, p in found]), strict=True):
        yield name, interval(bounds), p_text(adjusted)


if __name__ == "__main__":
    for page in sys.argv[1:]:
        for rows in tables(Path(page).read_text(encoding="utf-8")):
            if {"runs", SEEDS, IMAGES} <= rows[0].keys():
                print(f"{page}: {', '.join(next(iter(row.values())) for row in rows)}")
                for name, bounds, adjusted in read_again(rows):
                    print(f"  {name:8}{bounds:>18}   p {adjusted}")
