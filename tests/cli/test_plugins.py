import json
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import yaml

from statickey import MIXERS, _plugins
from statickey._plugins import load_plugins, loaded_plugins
from statickey.bench.contender import LayerShape, layer
from statickey.bench.measure import Setting, peak_memory
from statickey.cli import main
from statickey.errors import StaticKeyError

PAGE = Path(__file__).parents[2] / "docs" / "plugins.md"
NET = ["--model-args", '{"embed_dim": 16, "depth": 1, "num_heads": 2}']
TINY = ["--limit", "60", "--epochs", "1", "--seeds", "0", "--accelerator", "cpu", *NET]


@pytest.fixture(autouse=True)
def forgotten(monkeypatch, tmp_path):
    """What a test registers and loads is gone after it."""
    monkeypatch.setattr(_plugins, "_LOADED", [])
    monkeypatch.chdir(tmp_path)
    before = dict(MIXERS)
    yield
    MIXERS.clear()
    MIXERS.update(before)


def example(folder):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    path = folder / "my_mixers.py"
    path.write_text(code)
    return path


def test_the_example_of_the_page_is_compared(tmp_path, capsys):
    path = example(tmp_path)
    assert main(["compare", *TINY, "--mixers", "ska", "mean", "--plugin", "my_mixers.py", "--out", "out"]) == 0
    found = json.loads((tmp_path / "out" / "summary.json").read_text())["mixers"]
    assert [row["mixer"] for row in found] == ["ska", "mean"]
    assert found[1]["params"] < found[0]["params"]
    assert loaded_plugins() == (str(path),)
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["plugin"] == [str(path)]
    capsys.readouterr()
    del MIXERS["mean"]
    _plugins._LOADED.clear()
    assert main(["compare", "--config", "out/config.yaml"]) == 0
    assert "2 of 2 runs are finished already" in capsys.readouterr().out


def test_a_configuration_names_its_plugins(tmp_path, capsys):
    path = example(tmp_path)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"plugin": str(path), "mixers": ["mean"], "epochs": 0}))
    assert main(["compare", "--config", "c.yaml"]) == 2
    assert capsys.readouterr().err == "statickey: epochs=0 must be a positive integer\n"
    with pytest.raises(SystemExit):
        main(["compare", "--config", "c.yaml", "--epochs", "1", "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["plugin"] == [str(path)]


def test_a_file_is_loaded_once_whatever_its_name_is(tmp_path):
    (tmp_path / "counting.py").write_text("import sys\nsys.counted = getattr(sys, 'counted', 0) + 1\n")
    load_plugins(["counting.py", "./counting.py", str(tmp_path / "counting.py")])
    load_plugins(["counting.py"])
    assert vars(sys).pop("counted") == 1
    assert loaded_plugins() == (str(tmp_path / "counting.py"),)


def test_a_module_is_loaded_by_name(tmp_path, monkeypatch):
    (tmp_path / "my_installed_mixers.py").write_text("from statickey import MIXERS\nMIXERS['mine'] = MIXERS['ska']\n")
    monkeypatch.syspath_prepend(tmp_path)
    load_plugins(["my_installed_mixers"])
    assert MIXERS["mine"] is MIXERS["ska"]
    assert loaded_plugins() == ("my_installed_mixers",)
    del sys.modules["my_installed_mixers"]


def test_other_processes_load_them_too(tmp_path, processes):
    load_plugins([str(example(tmp_path))])
    peaks = peak_memory(partial(layer, LayerShape((4, 4), 16, 2, batch=2), "mean"), ("forward",), Setting())
    assert peaks.keys() == {"forward"}


WRONG = {
    "missing": ("nowhere.py", "plugin 'nowhere.py' is no .py file; give one, or the name of a module"),
    "folder": ("./folder.py", "plugin './folder.py' is no .py file; give one"),
    "suffix": ("./mixers", "plugin './mixers' is no .py file; give one"),
    "no module": ("nowhere", "plugin 'nowhere' is no module that Python finds; give the path of a .py file"),
    "syntax": ("syntax.py", r"plugin syntax.py, line 2: SyntaxError: '\(' was never closed"),
    "exception": ("fails.py", "plugin fails.py, line 4: KeyError: 'two lines'"),
    "import": ("imports.py", "plugin imports.py, line 1: ModuleNotFoundError: No module named 'absent_altogether'"),
    "exit": ("exits.py", "plugin exits.py, line 2: SystemExit: 3"),
}
FILES = {
    "mixers": "",
    "syntax.py": "x = 1\nx = (\n",
    "fails.py": "def f():\n    import json\n    json.dumps(1)\n    raise KeyError('two lines')\nf()\n",
    "imports.py": "import absent_altogether\n",
    "exits.py": "import sys\nsys.exit(3)\n",
}


@pytest.mark.parametrize("case", WRONG)
def test_a_plugin_that_fails_is_one_line(case, tmp_path, capsys):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "folder.py").mkdir()
    source, message = WRONG[case]
    before = set(sys.modules)
    with pytest.raises(StaticKeyError, match=message):
        load_plugins([source])
    assert not [name for name in set(sys.modules) - before if name.startswith("statickey_plugin")]
    assert loaded_plugins() == ()
    assert main(["summary", "--plugin", source]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("statickey: plugin ")


def test_an_unknown_mixer_hints_at_plugins(capsys):
    assert main(["compare", *TINY, "--mixers", "mean"]) == 2
    assert "unknown mixer 'mean'; did you mean " in (err := capsys.readouterr().err)
    assert err.endswith("; --plugin FILE brings one of your own\n")
