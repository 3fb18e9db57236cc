"""What is said of options and configurations that cannot be used, and which can."""

import shlex
from functools import wraps

import pytest
import yaml

from statickey.cli import main
from statickey.compare import compare
from statickey.compare.config import CompareConfig
from statickey.compare.report import command_line
from statickey.tasks import ClassificationRecipe, Machine

ON_THE_COMMAND_LINE = {
    "number": (["compare", "--lr", "many"], "lr=many must be a finite number"),
    "whole number": (["compare", "--epochs", "many"], "epochs=many must be a whole number"),
    "choice": (["compare", "--on-bad-image", "warn"], "on_bad_image=warn must be 'fail' or 'skip'"),
    "list": (["compare", "--mean", "0.5"], "mean=0.5 must be a list of finite numbers"),
    "item": (["compare", "--mean", "[a]"], "mean=['a'] must be a list of finite numbers"),
    "several": (["compare", "--seeds", "0", "a"], "seeds=a must be a whole number, or several"),
    "flag": (["train", "--flip", "3"], "flip=3 must be true or false"),
    "names": (["train", "--model-args", "3"], "model_args=3 must be names and their values"),
    "nested": (["train", "--model-args.depth", "many"], "depth='many' must be a positive integer"),
    "nothing": (["train", "--epochs"], "epochs is given nothing; it must be a whole number"),
    "none of several": (["compare", "--seeds"], "seeds is given nothing; it must be a whole number, or several"),
    "dashes": (["bench", "--mixers=--"], "mixers is given nothing; it must be text, or several"),
    "no file": (["train", "--config"], "--config is given nothing; it takes the name of a file"),
    "no task": (["train", "--task"], "--task is given nothing; it takes the name of a task"),
    "folder": (["train", "--config", "folder"], "'folder' is a folder; give a YAML file"),
    "word": (["compare", "x"], "unexpected: x; see statickey compare --help"),
    "no word": (["predict"], "missing: source, files; see statickey predict --help"),
    "named word": (["evaluate", "--source", "run"], "source is given as a word of its own, without --source"),
    "part of a name": (["train", "--epoch", "3"], "unknown option 'epoch'; did you mean epochs"),
    "summary": (["summary", "--img-size", "x"], "img_size=x must be a whole number"),
    "workers": (["evaluate", "run", "--num-workers", "-1"], "num_workers=-1 must not be negative"),
    "seed": (["train", "--seed", "1" * 23], f"seed={'1' * 23} must be a whole number from 0 to 2**63 - 1"),
    "seeds": (["compare", "--seeds", "1" * 23], f"seed={'1' * 23} must be a whole number from 0 to 2**63 - 1"),
}
IN_A_FILE = {
    "lr: many": "c.yaml: lr=many must be a finite number",
    "epochs: 3.0": "c.yaml: epochs=3.0 must be a whole number",
    "epochs: {a: 1}": "c.yaml: epochs={'a': 1} must be a whole number",
    "data: 5": "c.yaml: data=5 must be text",
    "model_args: [1]": "c.yaml: model_args=[1] must be names and their values",
    "mixers: [1]": "c.yaml: mixers=1 must be text, or several",
    "seeds: 1.5": "c.yaml: seeds=1.5 must be a whole number, or several",
    "data:": "c.yaml: data has no value; it must be text, or leave the line out",
    "clip_grad:": "c.yaml: clip_grad has no value; it must be a finite number",
    "ema_decay: null": "c.yaml: ema_decay has no value; it must be a finite number",
    "mixers: []": "c.yaml: mixers is given nothing; it must be text, or several",
    "mixers:": "c.yaml: mixers has no value; it must be text, or several",
    "batch-size: 3": "c.yaml: unknown option 'batch-size'; did you mean batch_size",
    "plugin: 3": "c.yaml: plugin=3 must be a file or a module's name, or a list of them",
    "lr: .inf": "lr=inf must be a finite number",
    "lr: .nan": "lr=nan must be a finite number",
}


def refusal(words, capsys):
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err.removeprefix("statickey: ")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()


@pytest.mark.parametrize("case", ON_THE_COMMAND_LINE)
def test_a_wrong_option_is_one_line(case, capsys):
    words, message = ON_THE_COMMAND_LINE[case]
    assert refusal(words, capsys).startswith(message)


@pytest.mark.parametrize("text", IN_A_FILE)
def test_a_wrong_line_of_a_file_is_one_line(text, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    assert refusal(["compare", "--config", "c.yaml"], capsys).startswith(IN_A_FILE[text])


def printed(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*words, "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


RIGHT = {
    "": {"mixers": None, "plugin": []},
    "mixers: ska": {"mixers": ["ska"]},
    "seeds: 4": {"seeds": [4]},
    "lr:": {"lr": None},
    "lr: 1e-3": {"lr": 0.001},
    "mean: [0.5]": {"mean": [0.5]},
    "plugin:": {"plugin": []},
}


@pytest.mark.parametrize("text", RIGHT)
def test_a_right_line_of_a_file_is_read(text, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    found = printed(["compare", "--config", "c.yaml"], capsys)
    assert {name: found[name] for name in RIGHT[text]} == RIGHT[text]


def test_the_command_of_a_report_makes_the_same_comparison(monkeypatch):
    called = {}

    @wraps(compare)  # the options come from its signature
    def record(recipe, **others):
        called.update(others, recipe=recipe)

    monkeypatch.setattr("statickey.cli.compare.compare", record)
    recipe = ClassificationRecipe(
        mean=(0.5,), std=(0.25,), model_args={"depth": 2}, flip=True, lr=0.01, precision="32-true"
    )
    mixers, seeds = ("mhsa", "cska:kernel_size=5", "ska@-2,-1"), (0, 3)
    config = CompareConfig.of(recipe, Machine(num_workers=2), mixers, seeds, "holdout", "out folder")
    program, *words = shlex.split(command_line(config))
    assert (program, main(words)) == ("statickey", 0)
    assert "--epochs" not in words
    assert CompareConfig.of(**called) == config


def test_the_command_line_counts_more_than_files_and_a_later_file_more_than_an_earlier(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("lr: many\nepochs: 3\nbatch_size: 7\nmodel_args: {depth: 1, embed_dim: 8}")
    (tmp_path / "b.yaml").write_text("epochs: 4")
    found = printed(
        ["train", "--lr", "0.5", "--config", "a.yaml", "--config=b.yaml", "--model-args.depth", "2"], capsys
    )
    assert (found["lr"], found["epochs"], found["batch_size"]) == (0.5, 4, 7)
    assert found["model_args"] == {"depth": 2, "embed_dim": 8}


def test_a_recipe_counts_more_than_a_folder_of_its_name_and_a_file_more_than_a_recipe(tmp_path, capsys):
    (tmp_path / "digits").mkdir()
    assert printed(["train", "--config", "digits"], capsys)["data"] == "digits"
    (tmp_path / "finetune").write_text("epochs: 77")
    assert printed(["train", "--config", "finetune"], capsys)["epochs"] == 77


def test_words_may_come_from_a_file(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("source: nowhere")
    assert refusal(["evaluate", "--config", "c.yaml"], capsys).startswith("there is no 'nowhere'; give the folder")
    (tmp_path / "c.yaml").write_text("models: [skaformer_nan]")
    assert refusal(["summary", "--config", "c.yaml"], capsys).startswith("unknown model 'skaformer_nan'")
    (tmp_path / "c.yaml").write_text("suites: layer")
    assert refusal(["bench", "--config", "c.yaml"], capsys).startswith("unknown suite 'layer'; did you mean layers")


def test_a_place_that_takes_no_file_is_refused_before_anything_is_computed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("statickey.summary.model_figures", lambda *args, **options: pytest.fail("counted"))
    monkeypatch.setattr("statickey.bench.main._check", lambda *args: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    cases = {
        ("summary", "--markdown", "."): "cannot write .: it is a folder; choose another --markdown",
        ("summary", "--csv", "folder"): "cannot write folder: it is a folder; choose another --csv",
        ("summary", "--csv", "file/t.csv"): "cannot write file/t.csv: Not a directory; a file is where a folder",
        ("bench", "--out", "file"): "cannot write file/bench.json: Not a directory; a file is where a folder",
        ("bench", "--out", "/proc/statickey"): "cannot write /proc/statickey/bench.json: ",
    }
    for words, message in cases.items():
        assert refusal(list(words), capsys).startswith(message)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
