"""``statickey checks``: what this machine has, which kernels run here, and whether they compute what they should."""

import copy
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any, Literal

import timm
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ._checks import check_arguments
from ._environment import cpu_name
from ._typing import Backend
from .convert import convert
from .errors import StaticKeyError
from .layers import MIXERS, AttentionMixer
from .ops import kernel, reference, static_key_attention

PACKAGES = (
    *("statickey", "torch", "timm", "torchvision", "triton", "lightning", "torchmetrics", "jsonargparse"),
    *("segmentation-models-pytorch", "faster-coco-eval", "transformers", "onnx", "onnxruntime"),
)
VARIABLES = (
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "TIMM_FUSED_ATTN", "TRITON_INTERPRET"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
)
"""Of the environment: what changes which kernels run, or how fast."""
AT_MOST = {torch.float32: 2e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""The largest relative difference from float64 that still counts as the same function."""
_KERNELS = {
    "flash_attention": "flash",
    "efficient_attention": "efficient",
    "cudnn_attention": "cuDNN",
    "convolution": "convolution",
    "bmm": "products",
}
READING = (
    "from float64: largest relative difference of output and gradients. kernel: flash, efficient and cuDNN are"
    " torch's fused attention, taken where the key is as wide as the value; on the CPU wider static keys, as CSKA's,"
    " are a convolution on few tokens and products of tiles on many; math stores the map; triton is the package's own"
    " kernel, where asked for."
)
_HEADS = 3


@dataclass(frozen=True)
class Check:
    """One function on one device, against the same in float64.

    Args:
        name: What was computed.
        backend: The backend asked for; of an op.
        dtype: In which type.
        device: Where.
        difference: The largest relative difference of output and gradients from float64; None where it raised.
        at_most: What it may be.
        kernels: What computed it.
        error: Why there is no difference.
    """

    name: str
    backend: str
    dtype: str
    device: str
    difference: float | None
    at_most: float
    kernels: str = ""
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether it computes what it should."""
        return self.difference is not None and self.difference <= self.at_most


def checks(*, device: Literal["auto", "cpu", "cuda"] = "auto", console: Console | None = None) -> list[Check]:
    """Show versions, devices, threads and kernels, and test that every op and layer computes what it should here.

    Paste what it prints into a report of a fault.

    Args:
        device: What to test, beside the CPU; default a GPU where torch sees one.
        console: Where to print; default the terminal.

    Returns:
        What was tested.

    Raises:
        StaticKeyError: There is no such device.
    """
    check_arguments(checks, locals())
    if device == "cuda" and not torch.cuda.is_available():
        raise StaticKeyError("device='cuda' is not available: torch sees no GPU")
    console = Console() if console is None else console
    console.print(_machine())
    devices = ["cpu", "cuda"] if device != "cpu" and torch.cuda.is_available() else ["cpu"]
    start = time.perf_counter()
    table = Table(title="Self-test", box=SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for column in ("computed", "backend", "type", "on", "kernel", "from float64", ""):
        table.add_column(column, no_wrap=column == "computed")
    found = []
    with console.status("testing"):
        for each in (check for name in devices for check in _all(name)):
            found.append(each)
            said = escape(each.error) if each.difference is None else f"{each.difference:.1e}"
            mark = "ok" if each.passed else f"[red]wrong[/red], at most {each.at_most:.0e}"
            table.add_row(each.name, each.backend, each.dtype, each.device, each.kernels, said, mark)
    console.print(table)
    console.print(READING, style="dim")
    wrong = [
        f"{each.name} ({each.backend or 'default'}, {each.dtype}, {each.device})" for each in found if not each.passed
    ]
    verdict = f"{len(wrong)} wrong: {', '.join(wrong)}" if wrong else "all as they should be"
    console.print(f"{len(found)} tests in {time.perf_counter() - start:.0f} s: {verdict}", highlight=False)
    return found


def _machine() -> Table:
    table = Table(show_header=False, title="This machine")
    for name in PACKAGES:
        try:
            table.add_row(name, metadata.version(name))
        except metadata.PackageNotFoundError:
            table.add_row(name, "[dim]not installed[/dim]")
    table.add_row("python", platform.python_version())
    table.add_row("platform", platform.platform())
    table.add_row("CPU", f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        table.add_row(
            f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, capability {gpu.major}.{gpu.minor}"
        )
    if not torch.cuda.device_count():
        table.add_row("GPU", "none that torch sees")
    for name in VARIABLES:
        if name in os.environ:
            table.add_row(name, os.environ[name])
    return table


def _all(device: str) -> Iterator[Check]:
    dtypes = [torch.float32] if device == "cpu" else [torch.float32, torch.bfloat16, torch.float16]
    for dtype in dtypes:
        backends: list[Backend] = ["sdpa", "math"]
        if kernel.INSTALLED and (device == "cuda" or (kernel.INTERPRETED and dtype == torch.float32)):
            backends.append("triton")
        for backend in backends:
            for name, (function, oracle, inputs) in _ops().items():
                if backend == "triton" and name in _NOT_TRITON:
                    continue
                yield _check(name, backend, device, dtype, partial(function, backend=backend), oracle, inputs)
    for name in MIXERS:
        made, x = _layer(name)
        yield _check(f"layer {name}", "", device, torch.float32, made, _plain(made), [x])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        host = timm.create_model("vit_tiny_patch16_224", img_size=48, embed_dim=48, depth=2, num_classes=5).eval()
    swapped = copy.deepcopy(host)
    convert(swapped, "mhsa")
    images = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    name = "a timm ViT, attention swapped"
    yield _check(name, "", device, torch.float32, swapped, host, [images], weights=False)


_NOT_TRITON = {"static key, masked", "self-attention"}


def _ops() -> dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]]:
    """Cases of the op: it, a naive twin of it, and inputs in float64."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    query, key, value = random(2, _HEADS, 35, 16), random(_HEADS, 35, 16), random(2, _HEADS, 35, 16)
    bias = random(_HEADS, 35)
    mask = torch.ones(35, 35, dtype=torch.bool).tril()

    def biased(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, **options: Any) -> Tensor:
            return attend(query, key, value, key_bias=bias, mask_diagonal=True, **options)

        return call

    def masked(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*inputs: Tensor, **options: Any) -> Tensor:
            return attend(*inputs, attn_mask=mask.to(inputs[0].device), **options)

        return call

    def dynamic(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = (query @ key.mT * 0.25).softmax(-1)
        return weights @ value

    cases: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]] = {
        "static key": (static_key_attention, reference.static_key_attention, [query, key, value]),
        "static key, biased, no diagonal": (
            biased(static_key_attention),
            biased(reference.static_key_attention),
            [query, key, value, bias],
        ),
        "static key, masked": (
            masked(static_key_attention),
            masked(reference.static_key_attention),
            [query, key, value],
        ),
        "self-attention": (static_key_attention, dynamic, [query, random(2, _HEADS, 35, 16), value]),
    }
    for grid in ((5, 7), (16, 17)):  # on the CPU the first is a convolution, the second are tiles
        cases[f"convolutional key, {grid[0]}x{grid[1]}"] = (
            *_convolutional(grid),
            [
                random(2, _HEADS, grid[0] * grid[1], 8),
                random(_HEADS, grid[0] * grid[1], 8, 3, 3) * 72**-0.5,
                random(2, _HEADS, grid[0] * grid[1], 8),
            ],
        )
    return cases


def _convolutional(grid: tuple[int, int]) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def call(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        rows = key.permute(0, 1, 3, 4, 2).flatten(2)
        return static_key_attention(query, rows, value, scale=0.5, unfold=(grid, 3), **options)

    def oracle(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return reference.conv_static_key_attention(query, key, None, value, feat_size=grid, scale=0.5)

    return call, oracle


def _layer(name: str) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MIXERS[name](24, _HEADS, feat_size=(5, 6)), torch.randn(2, 30, 24)


def _plain(module: nn.Module) -> nn.Module:
    """The same, with every map stored."""
    module = copy.deepcopy(module)
    for each in module.modules():
        if isinstance(each, AttentionMixer):
            each.backend = "math"
    return module


def _check(
    name: str,
    backend: str,
    device: str,
    dtype: torch.dtype,
    function: Callable[..., Tensor],
    oracle: Callable[..., Tensor],
    inputs: list[Tensor],
    weights: bool = True,
) -> Check:
    at_most, place = AT_MOST[dtype], (name, backend, str(dtype).removeprefix("torch."), device)
    given = [x.to(dtype) for x in inputs]
    try:
        with _Recorder() as recorder:
            said = _with_gradients(function, [x.to(device) for x in given], dtype, weights)
    except (RuntimeError, ValueError) as error:  # the rest is tested all the same, and this is told
        return Check(*place, None, at_most, error=f"{type(error).__name__}: {str(error).splitlines()[0]}")
    wanted = _with_gradients(oracle, given, torch.float64, weights)
    apart = [
        float((a.double().cpu() - b).abs().max() / b.abs().max().clamp_min(1e-9))
        for a, b in zip(said, wanted, strict=True)
    ]
    worst = max(apart) if all(x == x for x in apart) else float("nan")
    return Check(*place, worst, at_most, "Triton" if backend == "triton" else recorder.kernels())


def _with_gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype, weights: bool
) -> list[Tensor]:
    """The output, and the gradients of its sum of squares by inputs and, if asked for, by a module's weights."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
    wanted = list(leaves)
    if isinstance(function, nn.Module):
        function = copy.deepcopy(function).to(leaves[0].device, dtype)
        wanted += [p for p in function.parameters() if p.requires_grad and weights]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), wanted)]


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which kernels torch ran."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run it, and remember its name."""
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))

    def kernels(self) -> str:
        """Those that matter, in words."""
        found = dict.fromkeys(text for part, text in _KERNELS.items() if any(part in name for name in self.names))
        return ", ".join(found)
