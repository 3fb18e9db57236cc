"""What README and the documentation show: code runs, commands parse, and files that they name are there."""

import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import timm
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

import statickey_cli
from statickey import MIXERS
from statickey.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SYBIL = Sybil([PythonCodeBlockParser(), SkipParser()])
FENCED = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
SLOW = {"docs/convert.md"}
"""Pages whose code takes minutes at the sizes that it shows."""
COMMAND = re.compile(rf"\bstatickey ((?:{'|'.join(statickey_cli.COMMANDS)})\b[^#&|]*)")


def ids(page):
    return str(page.relative_to(ROOT))


def parsed(page):
    return list(SYBIL.parse(page))


def commands(page):
    blocks = "\n".join(FENCED.findall(page.read_text())).replace("\\\n", " ")
    return [found[1].strip() for line in blocks.splitlines() if (found := COMMAND.search(line))]


def with_code():
    marks = dict.fromkeys(SLOW, pytest.mark.slow)
    return [pytest.param(page, marks=marks.get(ids(page), ())) for page in PAGES if parsed(page)]


@pytest.mark.parametrize("page", with_code(), ids=ids)
def test_code_runs(page, tmp_path, monkeypatch):
    """Without weights, for which code asks that the reader runs; ``loader`` and ``images`` are the reader's."""
    monkeypatch.chdir(tmp_path)
    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *args, pretrained=False, **kwargs: make(*args, **kwargs))
    document = SYBIL.parse(page)
    document.namespace |= {"images": torch.randn(2, 3, 224, 224), "loader": [torch.randn(8, 3, 224, 224)]}
    mixers = dict(MIXERS)
    try:
        for example in document:
            example.evaluate()
    finally:  # a page registers one
        MIXERS.clear()
        MIXERS.update(mixers)


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads((ROOT / "examples" / "start.ipynb").read_text())["cells"]
    namespace = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []  # what is kept is what anybody gets
            exec("".join(cell["source"]), namespace)
    assert (tmp_path / "runs" / "looks" / "attention.html").is_file()
    assert {"mhsa", "ska"} == namespace["results"].keys()


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=ids)
def test_commands_parse(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_mixers.py").write_text("")
    ran = []
    for name in statickey_cli.COMMANDS:
        monkeypatch.setattr(import_module(f"statickey.cli.{name}"), "run", ran.append)
    for command in commands(page):
        assert main(shlex.split(command)) == 0, (command, capsys.readouterr().err)
    assert len(ran) == len(commands(page))


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_files_are_there(page):
    named = re.findall(r"\bbenchmarks/\w+\.py\b|\btests/[\w/]+\.py\b", page.read_text())
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_a_wrong_block_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nassert 1 == 2\n```\n")
    with pytest.raises(AssertionError):
        for example in SYBIL.parse(page):
            example.evaluate()
