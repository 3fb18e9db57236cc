import subprocess
import sys

import pytest

import statickey
from statickey._checks import check_name
from statickey.cli import main
from statickey.cli.parser import new_parser
from statickey.errors import UnknownNameError
from statickey_cli import COMMANDS, EVERYWHERE, answer, option_name, options


@pytest.mark.parametrize("command", COMMANDS)
def test_option_names_read_from_the_sources_are_those_of_the_parser(command):
    assert options(command) | EVERYWHERE == {action.dest for action in new_parser(command)._actions}


def test_answers_come_without_torch():
    """One process answers everything that can be answered from the sources, and counts its modules."""
    code = (
        "import sys; from statickey_cli import COMMANDS, answer, main\n"
        "assert (answer(['--help']), answer([]), answer(['--version']), answer(['trian'])) == (0, 0, 0, 2)\n"
        "for command in COMMANDS: assert answer([command, '--zzzzz']) == 2\n"
        "sys.argv = ['statickey', 'train', '--epohcs', '3']\n"
        "assert main() == 2\n"
        "assert 'torch' not in sys.modules and 'statickey' not in sys.modules\n"
        "sys.exit(len(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 30 < run.returncode < 120, run.stderr  # a bare interpreter has about 35, one with torch over 1000
    first, *rest, last = run.stderr.splitlines()
    assert first == "statickey: unknown command 'trian'; did you mean train?"
    assert len(rest) == len(COMMANDS)
    assert last.startswith("statickey: unknown option 'epohcs'; did you mean epochs, ")


def test_help_lists_every_command_with_its_line(capsys):
    assert main([]) == main(["-h"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out and line in out for name, line in COMMANDS.items())
    assert "--debug" in out
    with pytest.raises(SystemExit):
        main(["summary", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert COMMANDS["summary"] in out
    assert "--debug Show where a refusal arose." in out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"statickey {statickey.__version__}\n"


@pytest.mark.parametrize("name", ["epohcs", "zzzzz", "lr", "limt", "--"])
def test_suggestions_are_worded_as_elsewhere(name, capsys):
    if name in options("train"):
        assert answer(["train", f"--{name}"]) is None
        return
    with pytest.raises(UnknownNameError) as refused:
        check_name("option", name.replace("-", "_"), options("train"))
    assert answer(["train", f"--{name}"]) == 2
    assert capsys.readouterr().err == f"statickey: {refused.value}\n"


FORMS = {
    "--epochs": "epochs",
    "--batch-size=3": "batch_size",
    "--model-args.depth": "model_args",
    "--model_args.depth=a-b.c": "model_args",
    "--mean+": "mean",
    "--mean+=1": "mean",
    "-h": None,
    "run": None,
    "-1": None,
}


@pytest.mark.parametrize("word", FORMS)
def test_forms_of_an_option(word):
    assert option_name(word) == FORMS[word]


def test_what_can_be_right_is_left_to_the_command():
    assert answer(["predict", "run", "--top-k", "3", "--", "--strange.png"]) is None
    assert answer(["train", "--config=x.yaml", "--plugin", "y.py", "--print_config", "--debug"]) is None
    assert answer(["--debug", "train"]) is None


def test_options_that_another_task_or_a_plugin_may_bring_are_left_to_the_command(tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text("epochs: 3\ntask: other\n")
    (tmp_path / "plain.yaml").write_text("epochs: 3\n")
    monkeypatch.setattr("statickey_cli.RECIPES", tmp_path)
    for words in (["--task", "other"], ["--plugin=x.py"], ["--config", str(tmp_path / "c.yaml")], ["--config=c"]):
        assert answer(["train", *words, "--brought", "1"]) is None
    for words in ([], ["--config", str(tmp_path / "plain.yaml")], ["--config=plain"], ["--config=nowhere"]):
        assert answer(["train", *words, "--brought", "1"]) == 2


def test_an_option_before_the_command(capsys):
    assert main(["--epochs", "3", "train"]) == 2
    assert (
        capsys.readouterr().err
        == "statickey: --epochs comes before the command; statickey --help lists the commands\n"
    )
