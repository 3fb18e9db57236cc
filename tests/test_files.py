import csv
import os

import numpy as np
import pytest

from statickey._files import check_writable, explained_read, read_json, read_yaml, write_csv, write_text
from statickey.errors import OutputError


def test_csv_has_the_fields_in_their_order(tmp_path):
    write_csv(tmp_path / "a" / "x.csv", ("name", "n"), [{"n": 1, "other": 2, "name": "a,b"}, {"name": "c"}])
    assert (tmp_path / "a" / "x.csv").read_bytes() == b'name,n\n"a,b",1\nc,\n'
    rows = list(csv.DictReader((tmp_path / "a" / "x.csv").open()))
    assert rows == [{"name": "a,b", "n": "1"}, {"name": "c", "n": ""}]


def test_reads_what_is_there(tmp_path):
    (tmp_path / "x.json").write_text('{"a": [1]}')
    (tmp_path / "x.yaml").write_text("- a\n- 1.5\n")
    assert read_json(tmp_path / "x.json", "repeat it") == {"a": [1]}
    assert read_yaml(tmp_path / "x.yaml", "repeat it", list) == ["a", 1.5]


BROKEN = {
    "torn": (b'{"a": ', "is broken"),
    "empty": (b"", "is broken"),
    "not text": (b"\xff\xfe\x00\x01", "is broken"),
    "a list": (b"[1, 2]", r"is broken \(a dict is expected, not a list\)"),
    "deep": (b"[" * 100_000, "is broken"),
    "code": (b"!!python/object/apply:os.getcwd []", "is broken"),
}


@pytest.mark.parametrize("read", [read_json, read_yaml])
@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named_in_one_line(tmp_path, case, read):
    content, message = BROKEN[case]
    if case == "deep" and read is read_yaml:
        content = b"[" * 2000
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(OutputError, match=f"x {message}.*; repeat it$") as caught:
        read(tmp_path / "x", "repeat it")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_missing_files_and_keys_are_named(tmp_path):
    with pytest.raises(OutputError, match=r"cannot read .*x\.json: No such file or directory; repeat it"):
        read_json(tmp_path / "x.json", "repeat it")
    message = r"x\.json is broken \(it has no 'seed'\); repeat it"
    with pytest.raises(OutputError, match=message), explained_read(tmp_path / "x.json", "repeat it"):
        {}["seed"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 torn", b"\x93NUMPY"])
def test_broken_arrays_are_named(tmp_path, content):
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(OutputError, match=r"x\.npz is broken"), explained_read(tmp_path / "x.npz", "repeat it"):
        np.load(tmp_path / "x.npz", allow_pickle=False)["last"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes there")
@pytest.mark.parametrize("kind", ["pipe", "link to a pipe"])  # a device would be lost if this went wrong
def test_devices_and_pipes_are_not_replaced(tmp_path, kind):
    """Root may put a file in the place of /dev/null."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link to a pipe").symlink_to(tmp_path / "pipe")
    path = tmp_path / kind
    before = path.lstat()
    for refuse in (lambda: write_text(path, "x"), lambda: check_writable(out=path)):
        with pytest.raises(OutputError, match=r"cannot write .*: it is a device or a pipe; choose another --out$"):
            refuse()
    assert path.lstat() == before
    assert {p.name for p in tmp_path.iterdir()} == {"pipe", "link to a pipe"}
