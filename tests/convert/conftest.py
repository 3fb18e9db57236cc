"""The table of convertible models: ``pytest -n 0 -m slow tests/convert --convertible FILE`` writes it."""

from pathlib import Path

import pytest

HEAD = """# What of timm converts

Made by `pytest -n 0 -m slow tests/convert/test_convertible.py -k names --convertible docs/convertible.md`, which
reads every name of `timm.list_models()`. Kinds are names that need the same of a rule; of each, a test runs the
smallest: with self-attention in place of its own it gives the outputs it gave, with static keys every parameter
trains, and at another size, where timm or the conversion offers `set_input_size`, it does so again.

"""


def pytest_addoption(parser):
    parser.addoption("--convertible", type=Path, help="write the table of convertible models there")


ROWS = pytest.StashKey()


def pytest_configure(config):
    config.stash[ROWS] = []


@pytest.fixture
def rows(request):
    return request.config.stash[ROWS]


def pytest_sessionfinish(session):
    path, rows = session.config.getoption("--convertible", None), session.config.stash[ROWS]
    if path is None or not rows:
        return
    names, converted, without = (sum(row[key] for row in rows) for key in ("names", "converted", "without"))
    lines = [
        f"Of {names:,} names {converted:,} convert, {names - converted - without:,} are refused for the reason given "
        f"and {without:,} have no attention.",
        "",
        "| timm's module | names | convert | kinds | follow another size | not converted, and why |",
        "| --- | ---: | ---: | ---: | --- | --- |",
    ]
    shown = [row for row in rows if row["converted"] or row["why"]]
    for row in sorted(shown, key=lambda row: (-row["converted"], row["module"])):
        cells = (row["module"], row["names"], row["converted"], row["kinds"], row["size"], "; ".join(row["why"]))
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    path.write_text(HEAD + "\n".join(lines) + "\n")
