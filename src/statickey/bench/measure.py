"""Clocks and scales: interleaved times, peak memory, and what the machine can do at most."""

import gc
import math
import multiprocessing
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._plugins import load_plugins, loaded_plugins
from ..errors import StaticKeyError

Phase = Literal["forward", "training", "step"]
"""``forward`` without gradients; ``training``, forward and backward; ``step``, an optimizer's step too."""
_SAMPLE_SECONDS = 0.02
"""A sample takes at least this long, over as many calls as that needs."""
_SHORT_SECONDS = 0.2
"""A call shorter than this is made once more before each sample: what ran before it has emptied the caches."""

_FEW_ROUNDS = 3
"""Rounds that are made however long they take."""


@dataclass(frozen=True)
class Setting:
    """Where and in what type contenders run.

    Args:
        device: cpu or cuda.
        dtype: Of weights and inputs.
        compile: Compile every contender.
    """

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    compile: bool = False

    def place(self, made: tuple[nn.Module, Tensor]) -> tuple[nn.Module, Tensor]:
        """Network and input, on the device and in the type."""
        return made[0].to(self.device, self.dtype), made[1].to(self.device, self.dtype)

    def prepare(self, made: tuple[nn.Module, Tensor], phase: Phase) -> Callable[[], Any]:
        """A function that runs one pass."""
        network, x = self.place(made)
        network.train(phase != "forward")
        call: Any = torch.compile(network) if self.compile else network
        if phase == "forward":

            def run() -> None:
                with torch.inference_mode():
                    call(x)

            return run
        x.requires_grad_(x.ndim == 3)  # tokens come from a layer before, images do not
        optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, fused=True) if phase == "step" else None
        cotangent: Tensor | None = None

        def train() -> None:
            nonlocal cotangent
            network.zero_grad(set_to_none=True)
            x.grad = None
            out = call(x)
            if cotangent is None:
                cotangent = torch.ones_like(out)
            out.backward(cotangent)
            if optimizer is not None:
                optimizer.step()

        return train

    def wait(self) -> None:
        """Let the device finish."""
        if self.device != "cpu":
            torch.cuda.synchronize()


def interleaved(
    calls: Mapping[str, Callable[[], Any]], rounds: int, setting: Setting, most_seconds: float = math.inf
) -> Iterator[dict[str, float]]:
    """Time functions in turns, each turn starting with another one; after so many seconds, three turns are enough.

    Yields:
        For each round, seconds per call by name.
    """
    numbers, short = {}, {}
    for name, call in calls.items():
        for _ in range(2):  # warm up: caches, libraries, compilation
            seconds = _timed(call, 1, setting)
        numbers[name] = max(1, round(_SAMPLE_SECONDS / seconds))
        short[name] = seconds < _SHORT_SECONDS
    names = list(calls)
    start = time.perf_counter()
    for turn in range(rounds):
        if turn >= _FEW_ROUNDS and time.perf_counter() - start > most_seconds:
            return
        times = {}
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if short[name]:
                calls[name]()
            times[name] = _timed(calls[name], numbers[name], setting)
        yield times


def _timed(call: Callable[[], Any], number: int, setting: Setting) -> float:
    setting.wait()
    start = time.perf_counter()
    for _ in range(number):
        call()
    setting.wait()
    return (time.perf_counter() - start) / number


KINDS = {
    "products": r"mm_?$|linear",
    "attention": r"scaled_dot_product|_attention_|_FusedAttention",
    "convolution": r"convolution",
    "softmax": r"softmax",
    "copies": r"copy|clone|cat$|fill_|zero_",
    "other": r"",
}
"""Kinds of operations by their names in torch; the first that fits. Attention is the fused one."""


def time_in(call: Callable[[], Any], setting: Setting) -> dict[str, float]:
    """Share of a pass's time by kind of operation, by torch's profiler: what stands between it and the limit."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it logs its own start and end
    with torch.autograd.profiler.profile(use_device=None if setting.device == "cpu" else setting.device) as profiled:
        call()
        setting.wait()
    spent = dict.fromkeys(KINDS, 0.0)
    for event in profiled.key_averages():
        if event.device_type.name != "CPU":
            continue  # a kernel, whose time is its operation's device time already
        kind = next(kind for kind, names in KINDS.items() if re.search(names, event.key))
        spent[kind] += event.self_cpu_time_total if setting.device == "cpu" else event.self_device_time_total
    total = sum(spent.values())
    return {kind: time / total if total else 0.0 for kind, time in spent.items()}  # some GPUs tell nothing


@dataclass(frozen=True)
class Roofline:
    """What the machine reached in a matrix product and in a copy: multiply-accumulates and bytes per second."""

    macs: float
    bandwidth: float

    def best(self, other: "Roofline") -> "Roofline":
        """The higher of two measurements: other work on the machine only lowers them."""
        return Roofline(max(self.macs, other.macs), max(self.bandwidth, other.bandwidth))

    def seconds(self, macs: float, least_bytes: float) -> float:
        """The least time that a piece of work takes."""
        return max(macs / self.macs, least_bytes / self.bandwidth)


def roofline(setting: Setting) -> Roofline:
    """Measure the machine: the best of several matrix products, and a copy far beyond the caches."""
    macs = 0.0
    for rows, inner, columns in ((1024, 1024, 1024), (2048, 512, 512), (784, 144, 784)):
        left = torch.randn(rows, inner, device=setting.device, dtype=setting.dtype)
        right = torch.randn(columns, inner, device=setting.device, dtype=setting.dtype)
        product = {"product": lambda left=left, right=right: torch.nn.functional.linear(left, right)}
        fastest = min(times["product"] for times in interleaved(product, 10, setting))
        macs = max(macs, rows * inner * columns / fastest)
    source = torch.zeros(1 << 26, device=setting.device)
    target = torch.zeros_like(source)
    fastest = min(times["copy"] for times in interleaved({"copy": lambda: target.copy_(source)}, 10, setting))
    return Roofline(macs, 2 * source.numel() * source.element_size() / fastest)


def peak_memory(
    make: Callable[[], tuple[nn.Module, Tensor]], phases: tuple[Phase, ...], setting: Setting
) -> dict[Phase, int | None]:
    """Peak memory of one pass beyond weights and input, in bytes, by phase.

    On the CPU that of a whole fresh process, as the operating system counts it, which only Linux does well
    enough: elsewhere None.
    """
    if setting.device != "cpu":
        return {phase: _allocator_peak(make, phase, setting) for phase in phases}
    if platform.system() != "Linux":
        return dict.fromkeys(phases)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, f"{__package__}.contender"])
    environment = os.environ.get("MALLOC_MMAP_THRESHOLD_")
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # what is freed goes back at once: no peak is hidden
    try:
        with context.Pool(1) as pool:
            return pool.apply(_process_peaks, (make, phases, setting, torch.get_num_threads(), loaded_plugins()))
    finally:
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
        if environment is not None:
            os.environ["MALLOC_MMAP_THRESHOLD_"] = environment


def _allocator_peak(make: Callable[[], tuple[nn.Module, Tensor]], phase: Phase, setting: Setting) -> int:
    run = setting.prepare(make(), phase)
    run()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return int(torch.cuda.max_memory_allocated() - before)


def _process_peaks(
    make: Callable[[], tuple[nn.Module, Tensor]],
    phases: tuple[Phase, ...],
    setting: Setting,
    threads: int,
    plugins: tuple[str, ...],
) -> dict[Phase, int | None]:
    load_plugins(plugins)
    torch.set_num_threads(threads)
    made = make()
    peaks: dict[Phase, int | None] = {}
    for phase in phases:
        run = setting.prepare(made, phase)
        run()  # libraries and gradients are there before
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        run()
        peaks[phase] = _resident("VmHWM") - before
    return peaks


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise StaticKeyError(f"/proc/self/status has no {field}; measure with memory=False")
    return 1024 * int(found[1])


def differences(
    first: tuple[nn.Module, Tensor], second: tuple[nn.Module, Tensor], phases: tuple[Phase, ...]
) -> dict[str, float]:
    """How far two computations of one function lie apart, outputs and gradients, each by its largest entry.

    Args:
        first: A network and its input.
        second: Another with the same weights and input.
        phases: Gradients are compared unless these are ``forward`` alone.
    """
    results = []
    for network, x in (first, second):
        network.eval()
        if phases == ("forward",):
            with torch.inference_mode():
                results.append({"output": network(x).float()})
            continue
        x.requires_grad_()
        out = network(x)
        cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
        (grad,) = torch.autograd.grad(out, [x], cotangent)
        results.append({"output": out.detach().float(), "gradient": grad.float()})
    return {
        name: float((value - results[1][name]).abs().max() / value.abs().max().clamp(min=1e-12))
        for name, value in results[0].items()
    }
