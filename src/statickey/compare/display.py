"""What the terminal shows while runs are under way, and the table at the end."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


class Display:
    """Progress bars on a terminal; one line per finished run elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        console = Console() if console is None else console
        if not console.is_terminal and console.width < 140:
            console = Console(file=console.file, width=140)
        self.console = console
        self._progress = Progress(
            SpinnerColumn(finished_text="[green]done"),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("[dim]elapsed"),
            TimeElapsedColumn(),
            TextColumn("[dim]left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[note]}", style="dim"),
            console=console,
            disable=not console.is_terminal,
            expand=True,
        )

    def say(self, text: str) -> None:
        """Print one line, in rich's markup: escape what is not ours."""
        self.console.print(text, highlight=False)

    def busy(self, text: str) -> AbstractContextManager[Any]:
        """Show a spinner while the context lasts."""
        return self.console.status(text) if self.console.is_terminal else nullcontext()

    @contextmanager
    def runs(self, num_runs: int) -> Iterator["RunsDisplay"]:
        """Show bars for ``num_runs`` runs while the context lasts."""
        with self._progress:
            yield RunsDisplay(self, self._progress, num_runs)


class RunsDisplay:
    """The bars of a series of runs: all together, and the one under way."""

    def __init__(self, display: Display, progress: Progress, num_runs: int) -> None:
        self._display, self._progress = display, progress
        self._done, self._num_runs = 0, num_runs
        self._all = progress.add_task("all runs", total=None, note="")

    def start(self, label: str, epochs: int) -> "RunProgress":
        """A Lightning callback that moves the bars through one run."""
        self._progress.update(self._all, description=f"all runs [dim]({self._done}/{self._num_runs} done)")
        return RunProgress(self._progress, self._all, label, epochs, self._num_runs)

    def finish(self, line: str) -> None:
        """Note a finished run."""
        self._done += 1
        self._progress.update(self._all, description=f"all runs [dim]({self._done}/{self._num_runs} done)")
        self._display.say(f"[dim]{self._done}/{self._num_runs}[/dim] {line}")


class RunProgress(L.Callback):
    """Moves the bar of one run, batch by batch."""

    def __init__(self, progress: Progress, everything: Any, label: str, epochs: int, num_runs: int) -> None:
        self._progress, self._everything, self._num_runs = progress, everything, num_runs
        self._epochs = epochs
        self._label = label
        self._task = progress.add_task(label, total=None, note="")
        self._batches = 1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the totals, and skip what an interrupted run had done."""
        self._batches = int(trainer.num_training_batches)
        total = self._batches * self._epochs
        done = self._batches * trainer.current_epoch
        self._progress.update(self._task, total=total, completed=done)
        self._progress.update(self._everything, total=total * self._num_runs, advance=done)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """One step on."""
        self._progress.advance(self._task)
        self._progress.advance(self._everything)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show how the epoch before went; the task adds to its curve after the callbacks' turn."""
        curve = getattr(pl_module, "curve", [])
        if curve:
            row = curve[-1]
            note = f"held-out {row['holdout_accuracy']:.1f} %  {row['images_per_second']:,.0f} img/s"
            self._progress.update(self._task, note=note)

    def close(self) -> None:
        """Take the bar away."""
        self._progress.remove_task(self._task)


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
