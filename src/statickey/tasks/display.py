"""What the terminal shows while runs are under way."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import lightning as L
from rich.console import Console
from rich.markup import escape
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

from .task import Metric

T = TypeVar("T")


def counted(number: int, noun: str) -> str:
    """A number of things, in words: 1 image, 1,000 images."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def facts_table(title: str, facts: Mapping[str, str]) -> Table:
    """Names and values, one a line."""
    table = Table(title=escape(title), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, value in facts.items():
        table.add_row(escape(name), escape(value))
    return table


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
            TextColumn("{task.fields[rate]}", style="dim"),
            TextColumn("{task.fields[note]}", style="dim"),
            console=console,
            disable=not console.is_terminal,
            expand=True,
        )

    def say(self, text: str) -> None:
        """Print one line, in rich's markup: escape what is not ours."""
        self.console.print(text, highlight=False)

    def skipped(self, reasons: Sequence[str]) -> None:
        """Name images that were left out."""
        for line in reasons[:5]:
            self.say(f"[yellow]skipped[/yellow] {escape(line)}")
        if len(reasons) > 5:
            self.say(f"[yellow]skipped[/yellow] {len(reasons)} unreadable images in all")

    def busy(self, text: str) -> AbstractContextManager[Any]:
        """Show a spinner while the context lasts."""
        return self.console.status(text) if self.console.is_terminal else nullcontext()

    def track(self, items: Iterable[T], total: int, text: str) -> Iterator[T]:
        """Go through some items under a bar."""
        with self._progress:
            task = self._progress.add_task(text, total=total, note="", rate="")
            for item in items:
                yield item
                self._progress.advance(task)

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
        self._waits = False
        self._all = progress.add_task("all runs", total=None, visible=num_runs > 1, note="", rate="")

    def start(self, label: str, epochs: int, metric: Metric) -> "RunProgress":
        """A Lightning callback that moves the bars through one run."""
        self._progress.update(self._all, description=f"all runs [dim]({self._done}/{self._num_runs} done)")
        return RunProgress(self._progress, self._all, label, epochs, self._num_runs, metric)

    def wait(self, reason: str) -> None:
        """Say, once, why nothing moves."""
        if not self._waits:
            self._display.say(f"[dim]{reason}[/dim]")
        self._waits = True

    def finish(self, line: str) -> None:
        """Note a finished run."""
        self._done += 1
        self._progress.update(self._all, description=f"all runs [dim]({self._done}/{self._num_runs} done)")
        self._display.say(f"[dim]{self._done}/{self._num_runs}[/dim] {line}")


class RunProgress(L.Callback):
    """Moves the bar of one run, batch by batch."""

    def __init__(
        self, progress: Progress, everything: Any, label: str, epochs: int, num_runs: int, metric: Metric
    ) -> None:
        self._progress, self._everything, self._num_runs = progress, everything, num_runs
        self._epochs, self._metric = epochs, metric
        self._task = progress.add_task(label, total=None, note="", rate="")
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
        speed = self._progress.tasks[self._progress.task_ids.index(self._task)].speed
        if speed:
            images = len(batch[0]) * trainer.world_size
            self._progress.update(self._task, rate=f"{speed * images:,.0f} img/s")
        self._progress.advance(self._everything)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show how the epoch before went; the task adds to its curve after the callbacks' turn."""
        curve = getattr(pl_module, "curve", [])
        if curve:
            value = curve[-1][f"holdout_{self._metric.name}"]
            self._progress.update(self._task, note=f"held-out {self._metric.text(value)}")

    def close(self) -> None:
        """Take the bar away."""
        self._progress.remove_task(self._task)
