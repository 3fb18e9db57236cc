"""Commands, configurations, data and runs that are wrong in every way: a result or one line, never anything else."""

import os
import random
import re
import signal
import threading
import warnings
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from PIL import Image
from trial_data import data_cases
from trial_dense import dense_cases
from trial_options import Case, option_cases, plugin_cases, yaml_cases
from trial_runs import run_cases
from trial_stock import Stock

from statickey.cli import main

CASES = {
    "options": list(option_cases()),
    "yaml": list(yaml_cases()),
    "plugins": list(plugin_cases()),
    "data": list(data_cases()),
    "runs": list(run_cases()),
    "dense": list(dense_cases()),
}
ALWAYS = {"options": 60, "yaml": 10, "plugins": 10, "data": 60, "runs": 60, "dense": 40}
"""How many of each kind are drawn for every run of the tests; the rest are slow."""
SECONDS = 60
"""Enough for a process that imports everything on a busy machine."""


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        slow = "not slow" not in metafunc.config.option.markexpr.split(" and ")  # else not even made: thousands
        metafunc.parametrize("case", list(_parameters(slow)))


def _parameters(slow):
    rng = random.Random(0)
    for kind, cases in CASES.items():
        drawn = set(rng.sample(range(len(cases)), ALWAYS[kind]))
        for i, case in enumerate(cases):
            if slow or i in drawn:
                marks = () if i in drawn else pytest.mark.slow
                yield pytest.param(case, id=re.sub(r"[^\x21-\x7e]+|\\", " ", f"{kind}: {case.name}"), marks=marks)


class Late(BaseException):
    """A case took too long."""


@contextmanager
def limit(seconds):
    def stop(*args):
        raise Late

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def few_scenes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("statickey.data.scenes.TEST_SCENES", 4)
        yield


@pytest.fixture(scope="module")
def stock(tmp_path_factory, few_scenes):
    return Stock.make(tmp_path_factory.mktemp("stock"))


@pytest.fixture(autouse=True)
def tiny(monkeypatch, tmp_path):
    from statickey.bench import suites

    monkeypatch.setattr("statickey.summary.OURS", ["skaformer_nano"])
    monkeypatch.setattr(suites, "LAYERS", (suites.LayerShape((3, 3), 8, 2, batch=1),))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))


def _tree(folder):
    return {Path(where, name) for where, folders, files in os.walk(folder) for name in (*folders, *files)}


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs pipes and alarms")
def test_a_result_or_one_line(case: Case, stock, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "here"
    (folder / "folder").mkdir(parents=True)
    (folder / "binary.bin").write_bytes(bytes(range(256)) * 4)
    Image.new("L", (8, 8), 100).save(folder / "image.png")
    monkeypatch.chdir(folder)
    if case.prepare is not None:
        case.prepare(folder, stock)
    places = {f"{{{name}}}": str(place) for name, place in vars(stock).items()}
    words = [re.sub("|".join(places), lambda found: places[found[0]], word) for word in case.words]
    before, threads = _tree(folder), torch.get_num_threads()
    capfd.readouterr()
    with limit(SECONDS), warnings.catch_warnings(record=True):
        code = main(words)
    torch.set_num_threads(threads)
    out, err = capfd.readouterr()
    assert not list(folder.rglob("unpickled")) and not list(folder.rglob("ran"))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("Thread-") and not thread.daemon]
    assert "Traceback" not in out + err
    allowed = {"refused": {2}, "ran": {0}, "either": {0, 2}}[case.verdict]
    if case.words[0] == "predict" and "skipped" in out:
        allowed = allowed | {1}
    assert code in allowed, (code, words, out, err)
    if code == 2:
        assert re.fullmatch(r"statickey: [^\n]+\n", err), err
        assert not case.says or any(word in err for word in case.says), err
        left = _tree(folder) - before
        assert case.begins or not left, (err, left)
    else:
        assert err == "", err
