"""Standard output that takes nothing more, or that nobody reads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = Path("/dev/full")
pytestmark = pytest.mark.skipif(not FULL.exists(), reason="needs a full device")
COMMANDS = {
    "help": ["--help"],
    "configuration": ["train", "--print_config"],
    "summary": ["summary", "skaformer_nano"],
    "training": ["train", "--limit", "40", "--epochs", "1", "--accelerator", "cpu"],
}


def _run_all(processes, folder, redirect):
    """Each command in a child of its own, forked where everything is imported; exit codes and standard errors."""
    found = {}
    for name, words in COMMANDS.items():
        (folder / name).mkdir()
        child = processes.Process(target=_run, args=(folder / name, words, redirect))
        child.start()
        child.join(60)
        found[name] = child.exitcode, (folder / name / "stderr").read_text()
    return found


def _run(folder, words, redirect):
    from statickey.cli import main

    os.chdir(folder)
    os.dup2(os.open("stderr", os.O_WRONLY | os.O_CREAT), 2)
    if redirect == "full":
        os.dup2(os.open(FULL, os.O_WRONLY), 1)
    else:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # noqa: SIM115
    sys.exit(main(words))


def test_a_full_device_is_one_line(processes, tmp_path):
    line = "statickey: cannot write to standard output: No space left on device; free some space or write elsewhere\n"
    assert _run_all(processes, tmp_path, "full") == dict.fromkeys(COMMANDS, (2, line))


def test_a_reader_that_has_left_is_no_fault(processes, tmp_path):
    found = _run_all(processes, tmp_path, "closed")
    training = found.pop("training")
    assert found == dict.fromkeys(found, (1, ""))
    assert training == (130, "statickey: interrupted; the same command continues where it stopped\n")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nothing_is_said_when_the_interpreter_ends(unbuffered):
    """The console script alone, which loads no torch."""
    code = "import sys; from statickey_cli import main; sys.argv = ['statickey', '--help']; sys.exit(main())"
    with FULL.open("w") as full:
        run = subprocess.run(
            [sys.executable, "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert run.stderr.startswith("statickey: cannot write to standard output")
