import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from statickey.cli import main

TINY = [
    "compare",
    "--limit",
    "120",
    "--epochs",
    "2",
    "--seeds",
    "0",
    "--mixers",
    "mhsa",
    "ska",
    "--accelerator",
    "cpu",
]
TINY += ["--model-args", '{"embed_dim": 16, "depth": 1, "num_heads": 2}']


def test_compare_runs_and_its_config_reruns_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, "--out", "a"]) == 0
    assert "small_vit on digits" in capsys.readouterr().out
    config = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert config["mixers"] == ["mhsa", "ska"]
    assert main(["compare", "--config", "a/config.yaml", "--out", "b"]) == 0
    first, second = (json.loads((tmp_path / name / "summary.json").read_text()) for name in "ab")
    assert [r["accuracy_mean"] for r in first["mixers"]] == [r["accuracy_mean"] for r in second["mixers"]]
    assert "reused" not in capsys.readouterr().out
    assert main(["compare", "--config", "a/config.yaml"]) == 0
    assert "2 of 2 runs are finished already" in capsys.readouterr().out


def test_print_config(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--epochs", "3", "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["epochs"] == 3
    assert printed["mixers"] is printed["seeds"] is None  # by the data


WRONG = {
    "mixer": (["--mixers", "skaa"], "unknown mixer 'skaa'; did you mean"),
    "type": (["--epochs", "many"], "epochs"),
    "option": (["--epohcs", "3"], "epohcs"),
    "data": (["--data", "nowhere"], "data 'nowhere' is neither a folder"),
    "choice": (["--on-bad-image", "warn"], "on_bad_image"),
    "config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_exit_2(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, message = WRONG[case]
    assert main([*TINY, *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


def _lacks_memory_of_a_device():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total of 9.00 GiB.")


TOO_MUCH = {
    "torch": (lambda: torch.empty(2**50), ", 4503599627370496 bytes were asked for"),
    "numpy": (lambda: np.empty(2**50), ", 8.00 PiB were asked for"),
    "Python": (lambda: bytes(2**62), ""),
    "device": (_lacks_memory_of_a_device, ", 20.00 GiB were asked for"),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_memory_that_is_not_there_is_one_line(case, capsys, monkeypatch):
    allocate, amount = TOO_MUCH[case]
    monkeypatch.setattr("statickey.cli.parser.run", lambda command, words: allocate())
    assert main(["predict", "run", "image.png"]) == 2
    expected = f"statickey: out of memory{amount}; choose a smaller model, image size or batch\n"
    assert capsys.readouterr().err == expected
    with pytest.raises((MemoryError, RuntimeError)):
        main(["predict", "run", "image.png", "--debug"])


def test_other_faults_show_their_traceback(monkeypatch):
    monkeypatch.setattr("statickey.cli.parser.run", lambda command, words: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        main(["predict", "run", "image.png"])


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="skaa"):
        main([*TINY, "--mixers", "skaa", "--debug"])


def _command_in_child(folder, command):
    os.chdir(folder)
    # a test run started in the background ignores the signal, and its children inherit that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with Path("stderr").open("w") as sys.stderr:
        code = main(command)
    sys.exit(code)


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill sends no SIGINT there")
def test_ctrl_c_is_resumable(processes, tmp_path, monkeypatch, capsys):
    command = [*TINY, "--mixers", "mhsa", "--epochs", "30", "--out", "out"]
    child = processes.Process(target=_command_in_child, args=(tmp_path, command))
    child.start()
    folder = tmp_path / "out" / "runs" / "mhsa-seed0"
    deadline = time.monotonic() + 120
    while not list(folder.glob("*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert list(folder.glob("*.ckpt"))
    os.kill(child.pid, signal.SIGINT)
    child.join(60)
    assert child.exitcode == 130
    error = (tmp_path / "stderr").read_text()
    assert "interrupted; the same command continues" in error
    assert "Traceback" not in error
    assert list(folder.glob("*.ckpt"))
    monkeypatch.chdir(tmp_path)
    assert main(command) == 0
    assert "mhsa" in capsys.readouterr().out
    curve = json.loads((folder / "run.json").read_text())["curve"]
    assert [row["epoch"] for row in curve] == list(range(1, 31))


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill sends no SIGINT there")
def test_ctrl_c_while_scoring_leaves_the_signal_as_it_was(tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("statickey.tasks.engine.score", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert main([*TINY, "--out", str(tmp_path / "out")]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert "interrupted" in capsys.readouterr().err


def test_runs_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["statickey", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("statickey", run_name="__main__")
    assert stopped.value.code == 0
    assert "compare" in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="children are forked")
def test_commands_import_only_what_they_run(tmp_path):
    """One process imports the package, and forks another for each command."""
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", IMPORTS], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert run.stderr == ""
    found = json.loads(run.stdout.splitlines()[-1])
    assert found == {
        "import statickey": [],
        "summary skaformer_nano": [],
        "bench layers": [],
        "compare --help": [
            "lightning",
            "matplotlib",
            "torchmetrics",
            "transformers",
        ],  # Lightning loads torchmetrics, that the others
        "statickey.viz": ["matplotlib"],
    }


IMPORTS = """
import json, os, sys, statickey, timm
HEAVY = {"lightning", "matplotlib", "onnx", "torchmetrics", "datasets", "sklearn", "transformers"}
timm.create_model("skaformer_nano")
found = {"import statickey": sorted(HEAVY & set(sys.modules))}
if "statickey.tasks" in sys.modules or not {"bench", "compare", "data", "tasks", "viz"} <= set(dir(statickey)):
    sys.exit(1)
def run(what):
    import warnings; warnings.simplefilter("default")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    if what.startswith("statickey."):
        statickey.viz.scaling
        return
    from statickey.cli import main
    if what.startswith("bench"):
        from statickey.bench import main as timing, measure, suites
        suites.LAYERS = (suites.LayerShape((3, 3), 8, 2, batch=1),)
        timing.roofline = lambda setting: measure.Roofline(1e9, 1e9)
        what += " --rounds 1 --memory false"
    try:
        main(what.split())
    except SystemExit:
        pass
readers = {}
for what in ("summary skaformer_nano", "bench layers", "compare --help", "statickey.viz"):
    readers[what], writer = os.pipe()
    if not os.fork():
        run(what)
        os.write(writer, json.dumps(sorted(HEAVY & set(sys.modules))).encode())
        os._exit(0)
    os.close(writer)
for what, reader in readers.items():
    found[what] = json.loads(os.read(reader, 1000))
print(json.dumps(found))
"""
