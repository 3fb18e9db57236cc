"""What ``statickey checks`` shows, and that it finds a fault."""

import io

import pytest
import torch
from rich.console import Console

from statickey import MIXERS
from statickey import checks as module
from statickey.checks import AT_MOST, checks
from statickey.cli import main
from statickey.errors import StaticKeyError


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.setattr(module.kernel, "INTERPRETED", False)  # it takes half a minute


def run(**options):
    text = io.StringIO()
    return checks(console=Console(file=text, width=100), **options), text.getvalue()


def test_all_is_well_here():
    found, text = run(device="cpu")
    assert all(each.passed for each in found)
    assert {each.backend for each in found} >= {"sdpa", "math", ""}
    assert {each.name for each in found} >= {f"layer {name}" for name in MIXERS} | {"convolutional key, 16x17"}
    kernels = {(each.name, each.backend): each.kernels for each in found}
    assert kernels["static key", "sdpa"] == "flash"
    assert kernels["static key", "math"] == "products"
    assert kernels["convolutional key, 5x7", "sdpa"].startswith("convolution")
    assert kernels["convolutional key, 16x17", "sdpa"] == "products"
    for word in (
        "torch ",
        torch.__version__.partition("+")[0],
        "timm",
        "threads",
        "all as they should",
    ):
        assert word in text


@pytest.mark.parametrize("fault", ["scale", "nan", "raises"])
def test_a_fault_is_found_and_told(fault, monkeypatch, capsys):
    right = module.static_key_attention

    def wrong(*args, backend="sdpa", **options):
        out = right(*args, backend=backend, **options)
        if backend == "sdpa" and fault == "raises":
            raise RuntimeError("no kernel [here]\nmore")
        return out * {"scale": 1.01, "nan": float("nan"), "raises": 1.0}[fault] if backend == "sdpa" else out

    monkeypatch.setattr(module, "static_key_attention", wrong)
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["checks", "--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "6 wrong: static key (sdpa, float32, cpu), " in " ".join(out.split())
    assert {"scale": "2.0e-02", "nan": "nan", "raises": "RuntimeError: no kernel [here]"}[fault] in out


def test_refusals(monkeypatch):
    with pytest.raises(StaticKeyError, match="device='gpu' must be 'auto' or 'cpu' or 'cuda'"):
        run(device="gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StaticKeyError, match="device='cuda' is not available: torch sees no GPU"):
        run(device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_all_is_well_on_the_gpu():
    found, text = run(device="cuda")
    assert [each for each in found if not each.passed] == []
    assert {each.dtype for each in found if each.device == "cuda"} == {str(d).removeprefix("torch.") for d in AT_MOST}
    assert torch.cuda.get_device_name() in text
