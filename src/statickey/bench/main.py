"""``bench``: contenders in one run, checked first, then timed in turns."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from .._checks import check_arguments, check_folder, check_name, check_positive
from .._environment import environment
from .._files import check_writable, explained_read, read_json, write_csv, write_json, write_text
from ..errors import StaticKeyError
from ..models import Swap
from ..ops.kernel import INSTALLED
from .contender import Contender, Targets, least_bytes, macs, twin
from .measure import KINDS, Phase, Setting, differences, interleaved, peak_memory, roofline, time_in
from .suites import BATCHED, KERNEL, SUITES
from .table import WIDE, markdown, reading, tables

PHASES: dict[str, tuple[Phase, ...]] = {
    "layers": ("forward", "training"),
    "models": ("forward", "training"),
    "resolution": ("forward",),
    "detector": ("forward", "training"),
    "detectors": ("forward", "training"),
    "training": ("forward", "step"),
    "shapes": ("forward", "training"),
}
ROUNDS = {"layers": 25, "models": 9, "resolution": 5, "detector": 3, "detectors": 3, "training": 15, "shapes": 11}
QUICK = {"shapes": 3.0}
"""Suites of many groups, and the seconds after which a group of theirs gets no more than three rounds; their memory
is not measured, and the machine but once."""
PARITY = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""The largest relative difference between a contender and its twin that still counts as the same function."""
ROWS_FILE = "bench.json"
PASSES = {"forward": 1, "training": 3, "step": 3}
"""Multiply-accumulates in terms of those of a forward pass."""


def bench(
    suites: Sequence[str] = ("layers",),
    *,
    mixers: Sequence[str] = ("ska", "cska", "fcska", "ska:key=continuous", "ska:key_size=[7,7]"),
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    compile: bool = False,
    kernel: bool = False,
    rounds: int | None = None,
    memory: bool = True,
    batch: int | None = None,
    compared: Path | None = None,
    out: str = "statickey-bench",
    console: Console | None = None,
) -> list[dict[str, Any]]:
    """Measure mixers, and the models made of them, against timm's and against the limits of the machine.

    The contenders of a group run in turns, so that their ratios hold whatever else the machine does; each is first
    checked against another computation of the same function, and nothing is timed if one differs.

    Args:
        suites: ``layers``, ``models``, ``resolution`` (224 to 1536 pixels), ``detector`` (keys with a ``key_size`` at
            800 x 1088 pixels), ``detectors`` (Mask R-CNN, up to 1000 x 1333 pixels), ``training``, or ``shapes``
            (CSKA's op over a hundred shapes, without memory).
        mixers: Token mixers, with their arguments if need be, as ``ska:key=continuous``.
        device: What to run on.
        dtype: Type of weights and inputs.
        compile: Compile every contender with torch.compile.
        kernel: Layers of static keys run with the Triton kernel too, against themselves without; on CUDA, and not
            compiled, which would leave the kernel out.
        rounds: Samples of each contender and phase; default 5 to 25, by the suite's cost.
        memory: Measure peak memory too, each contender in a process of its own on the CPU.
        batch: Images of a contender of ``layers``, ``models`` (default 8) or ``training`` (64, or as compared);
            a GPU needs more to be busy.
        compared: A folder of ``compare``: the training suite measures its network, and a figure sets the measured
            cost against the accuracy found there.
        out: Folder of the results: ``bench.json``, ``.csv`` and ``.md``, and figures. They are written as soon
            as a group is measured; a suite's rows replace its earlier ones, group by group.
        console: Where to print; default the terminal.

    Returns:
        One row per contender and phase.

    Raises:
        StaticKeyError: An argument is not usable, or a contender differs from its twin.
        OutputError: A file cannot be read or written.
    """
    check_arguments(bench, locals())
    console = Console() if console is None else console
    check_folder(out=str(out))
    if not suites:
        raise StaticKeyError(f"no suite to measure; name any of {', '.join(SUITES)}")
    for name in suites:
        check_name("suite", name, SUITES)
    for name in mixers:
        if Swap.parse(name).layers != "all":
            raise StaticKeyError(f"mixer {name!r} names layers, all are measured; leave out what follows the @")
    if rounds is not None:
        check_positive(rounds=rounds)
    check_name("device", device, ("cpu", "cuda"))
    check_name("dtype", dtype, ("float32", "bfloat16", "float16"))
    if device == "cuda" and not torch.cuda.is_available():
        raise StaticKeyError("device='cuda' is not available: torch sees no GPU")
    if kernel and (device != "cuda" or compile or not INSTALLED or "layers" not in suites):
        raise StaticKeyError(
            "kernel=True is for the suite layers with device='cuda' and compile=False, where triton is installed; "
            f"here suites={list(suites)}, {device=}, {compile=}, triton is {'' if INSTALLED else 'not '}installed"
        )
    setting = Setting(device, getattr(torch, dtype), compile)
    accuracy = {} if compared is None else _accuracy(Path(compared))
    options: dict[str, dict[str, Any]] = {"layers": {"kernel": kernel}, "training": {"compared": compared}}
    if batch is not None:
        check_positive(batch=batch)
        if not BATCHED & set(suites):
            raise StaticKeyError(f"batch={batch} is for {', '.join(sorted(BATCHED))}; the other suites fix their own")
        for suite in BATCHED:
            options.setdefault(suite, {})["batch"] = batch
    plans = {suite: SUITES[suite](mixers, **options.get(suite, {})) for suite in dict.fromkeys(suites)}
    if kernel and not any(each.name.endswith(KERNEL) for each in plans["layers"]):
        raise StaticKeyError(f"kernel=True is for static keys, mixers={list(mixers)} has none; name ska or cska")
    if setting != Setting():  # the targets are for float32 on the CPU
        plans = {suite: [replace(each, targets=Targets()) for each in plan] for suite, plan in plans.items()}
    root = Path(out)
    earlier = _earlier(root / ROWS_FILE)
    check_writable(out=root / ROWS_FILE)
    where = environment(device) | {"dtype": dtype, "compiled": compile}
    rows: list[dict[str, Any]] = []
    with Progress(console=console, transient=True) as progress:
        for suite, contenders in plans.items():
            _check(contenders, PHASES[suite], setting, progress)
            number = ROUNDS[suite] if rounds is None else rounds
            for found in _measure(suite, contenders, setting, number, memory, progress):
                rows += [row | {"suite": suite} | where for row in found]
                groups = {row["group"] for row in found}
                earlier = [row for row in earlier if row["suite"] != suite or row["group"] not in groups]
                _write(root, earlier + rows, accuracy)
            earlier = [row for row in earlier if row["suite"] != suite]
            _write(root, earlier + rows, accuracy)
    for table in tables(rows, wide=console.width >= WIDE):
        console.print(table)
    console.print(reading(rows), style="dim")
    console.print(f"results: {escape(str(out))}", highlight=False)
    return rows


def _check(contenders: list[Contender], phases: tuple[Phase, ...], setting: Setting, progress: Progress) -> None:
    """Compare every contender with its twin.

    Raises:
        StaticKeyError: One differs: the speed of another function would mean nothing.
    """
    checked = [contender for contender in contenders if contender.checked]
    task = progress.add_task("checking parity", total=len(checked))
    for contender in checked:
        pair = [setting.place(made) for made in (contender.make(), twin(contender))]
        for what, apart in differences(pair[0], pair[1], phases).items():
            if not apart <= PARITY[setting.dtype]:
                raise StaticKeyError(
                    f"{contender.group}: the {what} of {contender.name} is {apart:.1e} from that of its plain twin "
                    f"(at most {PARITY[setting.dtype]:g}); nothing was timed"
                )
        progress.advance(task)
    progress.remove_task(task)


def _measure(
    suite: str,
    contenders: list[Contender],
    setting: Setting,
    rounds: int,
    memory: bool,
    progress: Progress,
) -> Iterator[list[dict[str, Any]]]:
    """Time one group after another; yields the rows of each."""
    limit = roofline(setting)
    memory = memory and suite not in QUICK
    groups = list(dict.fromkeys(contender.group for contender in contenders))
    task = progress.add_task(suite, total=len(groups) * len(PHASES[suite]) * rounds + len(contenders) * memory)
    for group in groups:
        rows: list[dict[str, Any]] = []
        members = [contender for contender in contenders if contender.group == group]
        peaks: dict[str, dict[Phase, int | None]] = {}
        for contender in members:
            peaks[contender.name] = (
                peak_memory(contender.make, PHASES[suite], setting) if memory else dict.fromkeys(PHASES[suite])
            )
            progress.advance(task, memory)
        if suite not in QUICK:
            limit = limit.best(roofline(setting))
        for phase in PHASES[suite]:
            made = {contender.name: setting.place(contender.make()) for contender in members}
            calls = {name: setting.prepare(each, phase) for name, each in made.items()}
            samples: dict[str, list[float]] = {name: [] for name in calls}
            for times in interleaved(calls, rounds, setting, QUICK.get(suite, math.inf)):
                for name, seconds in times.items():
                    samples[name].append(seconds)
                progress.advance(task)
            for contender in members:
                network, x = made[contender.name]
                work = PASSES[phase] * macs(network, x)
                least = limit.seconds(work, PASSES[phase] * least_bytes(network, x))
                peak = {name: values[phase] for name, values in peaks.items()}
                rows.append(_row(contender, members, phase, samples, peak, len(x), work, least))
                rows[-1] |= {"gmacs_per_second": limit.macs / 1e9, "gbytes_per_second": limit.bandwidth / 1e9}
                spent = time_in(calls[contender.name], setting)
                rows[-1] |= {f"time_in_{kind}": share for kind, share in spent.items()}
        yield rows
    progress.remove_task(task)


def _row(
    contender: Contender,
    members: list[Contender],
    phase: Phase,
    samples: dict[str, list[float]],
    peaks: dict[str, int | None],
    batch: int,
    work: int,
    least: float,
) -> dict[str, Any]:
    seconds = samples[contender.name]
    low, median, high = np.quantile(seconds, (0.25, 0.5, 0.75)).tolist()
    row: dict[str, Any] = {
        "group": contender.group,
        "contender": contender.name,
        "phase": phase,
        "milliseconds": 1e3 * median,
        "milliseconds_q1": 1e3 * low,
        "milliseconds_q3": 1e3 * high,
        "images_per_second": batch / median,
        "tokens": contender.units,
        "gmacs": work / 1e9,
        "share_of_limit": least / median,
        "peak_megabytes": None if peaks[contender.name] is None else (peaks[contender.name] or 0) / 1e6,
        "against": contender.against,
        **dict.fromkeys(("ratio", "ratio_q1", "ratio_q3", "ratio_at_most", "memory_ratio", "memory_ratio_at_most")),
    }
    if contender.against is None:
        return row
    other = next(member for member in members if member.name == contender.against)
    scale = other.units / contender.units
    ratios = [scale * mine / theirs for mine, theirs in zip(seconds, samples[other.name], strict=True)]
    row["ratio_q1"], row["ratio"], row["ratio_q3"] = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    row["ratio_at_most"] = contender.targets.forward if phase == "forward" else contender.targets.training
    row["memory_ratio_at_most"] = contender.targets.memory
    mine, theirs = peaks[contender.name], peaks[other.name]
    if mine is not None and theirs:
        row["memory_ratio"] = mine / theirs
    return row


def _accuracy(folder: Path) -> dict[str, tuple[float, float | None]]:
    """Mean and spread of the accuracy of each mixer in a folder of ``compare``.

    Raises:
        OutputError: It is no such folder, or has no finished run.
    """
    path, remedy = folder / "summary.json", "give --compared a folder that compare has filled"
    summary = read_json(path, remedy)
    with explained_read(path, remedy):
        return {row["mixer"]: (row["accuracy_mean"], row["accuracy_std"]) for row in summary["mixers"]}


def _earlier(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    remedy = "it was not written by this version of bench; choose another --out"
    rows: list[dict[str, Any]] = read_json(path, remedy, list)
    with explained_read(path, remedy):
        if not all({"suite", *(f"time_in_{kind}" for kind in KINDS)} <= row.keys() for row in rows):
            raise ValueError("columns are missing")
    return rows


def _write(out: Path, rows: list[dict[str, Any]], accuracy: dict[str, tuple[float, float | None]]) -> None:
    write_json(out / ROWS_FILE, rows)
    write_csv(out / "bench.csv", list(rows[0]), rows)
    write_text(out / "bench.md", markdown(rows))
    resolution = [row for row in rows if row["suite"] == "resolution"]
    steps = {row["contender"]: row for row in rows if row["suite"] == "training" and row["phase"] == "step"}
    points = {
        name: (1e3 / row["images_per_second"], *accuracy[name]) for name, row in steps.items() if name in accuracy
    }
    if resolution or points:
        from ..viz import accuracy_against_cost, save_png, scaling  # loads matplotlib, which most suites do not need

        if resolution:
            save_png(scaling(resolution), out / "resolution.png")
        if points:
            save_png(accuracy_against_cost(points), out / "accuracy.png")
