"""The capability matrix, of what the contract tests found; CONTRIBUTING.md has the command."""

import re
from collections import defaultdict
from pathlib import Path

import pytest

HEAD = """# What the models can do

Made by `pytest -n 0 -m capability tests/models --capabilities docs/capabilities.md`: a cell is filled when the
contract test behind it passed for every size of the family, and says how where it is not simply yes.

"""
FAMILY = re.compile(r"^(.*?)(?:_(?:nano|s18|s36|m36|b36)|_(?:tiny|small|base)_patch16_224)$")


def pytest_addoption(parser):
    parser.addoption("--capabilities", type=Path, help="write the capability matrix there")


def pytest_configure(config):
    if config.option.capabilities and config.getoption("numprocesses", 0):
        raise pytest.UsageError("--capabilities collects in one process: add -n 0")
    config.addinivalue_line("markers", "capability(label): a column of the capability matrix")
    config.stash[CELLS] = defaultdict(lambda: defaultdict(list))


CELLS = pytest.StashKey()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    mark = item.get_closest_marker("capability")
    if mark is None or call.when != "call":
        return
    name = next(iter(item.callspec.params.values()))
    family = FAMILY.sub(r"\1", name)
    cell = dict(report.user_properties).get("cell", "yes") if report.passed else "**no**"
    item.config.stash[CELLS][mark.args[0]][family].append(cell)


def pytest_sessionfinish(session):
    path = session.config.getoption("--capabilities")
    if path is None:
        return
    columns = session.config.stash[CELLS]
    families = list(dict.fromkeys(family for column in columns.values() for family in column))
    rows = [["", *(f"`{family}`" for family in families)], ["---"] * (len(families) + 1)]
    for label, column in columns.items():
        cells = [column.get(family, []) for family in families]
        rows.append([label, *("**no**" if "**no**" in cell else ", ".join(dict.fromkeys(cell)) for cell in cells)])
    path.write_text(HEAD + "".join("| " + " | ".join(row) + " |\n" for row in rows))
