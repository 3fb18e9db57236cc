"""Files that others made run nothing, and reach nothing outside of their folder."""

import io
import os
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from image_folders import make_shards, png
from statickey._files import read_yaml
from statickey.cli import main
from statickey.compare.results import read_runs
from statickey.data import load_images
from statickey.data.shards import index_shard
from statickey.errors import OutputError
from statickey.models.weights import read_weights
from statickey.tasks import AtomicCheckpointIO, Classification
from statickey.tasks.checkpoint import check_whole

YAML = "data: !!python/object/apply:os.mkdir [unpickled]\n"


class Malicious:
    """Unpickling it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("unpickled",)


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "unpickled").exists()


def test_the_tests_would_notice(tmp_path):
    pickle.loads(pickle.dumps(Malicious()))
    (tmp_path / "unpickled").rmdir()


def test_a_checkpoint_with_the_right_checksum(tmp_path):
    AtomicCheckpointIO().save_checkpoint({"state_dict": {}, "run": Malicious()}, tmp_path / "x.ckpt")
    check_whole(tmp_path / "x.ckpt")
    for weights_only in (True, False, None):
        with pytest.raises(OutputError, match=r"x\.ckpt is not a checkpoint of this program"):
            AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt", weights_only=weights_only)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.pt", "x.bin"])
@pytest.mark.parametrize("kind", ["plain", "archive", "old archive"])
def test_weights(tmp_path, name, kind):
    content = io.BytesIO(pickle.dumps(Malicious(), protocol=2))
    if kind != "plain":
        content = io.BytesIO()
        torch.save({"state_dict": Malicious()}, content, _use_new_zipfile_serialization=kind == "archive")
    (tmp_path / name).write_bytes(content.getvalue())
    with pytest.raises(OutputError, match=f"cannot read weights from .*{name}"):
        read_weights(tmp_path / name)


def test_arrays_of_objects(tmp_path, monkeypatch):
    monkeypatch.setattr("statickey.compare.results.read_result", lambda path: {"mixer": None, "mixer_source": None})
    place = tmp_path / "runs" / "ska-seed0"
    place.mkdir(parents=True)
    (place / "run.json").touch()
    objects = np.array([Malicious()] * 2)
    np.savez(place / "predictions.npz", predicted=objects, truth=objects, ema_predicted=objects)
    with pytest.raises(OutputError, match=r"allow_pickle=False"):
        read_runs(Classification(), tmp_path, ["x"])


def test_yaml(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text(YAML)
    with pytest.raises(OutputError, match=r"could not determine a constructor"):
        read_yaml(tmp_path / "x.yaml", "mend it")
    assert main(["train", "--config", "x.yaml"]) == 2
    assert capsys.readouterr().err.startswith("statickey: ")


@pytest.mark.parametrize("kind", ["arrow.py_extension_type", "statickey.unknown"])
def test_parquet_with_a_pickled_type(tmp_path, kind):
    """Old pyarrow unpickled the first of these; the column is read as what it stores."""
    marks = {b"ARROW:extension:name": kind.encode(), b"ARROW:extension:metadata": pickle.dumps(Malicious())}
    schema = pa.schema([pa.field("image", pa.binary(), metadata=marks), pa.field("label", pa.int64())])
    for part in ("train", "test"):
        columns = [pa.array([png(10), png(20)], pa.binary()), pa.array([0, 1])]
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), tmp_path / f"{part}.parquet")
    assert load_images(str(tmp_path)).class_names == ("0", "1")


def _member(kind, name):
    """A tar member of 7 bytes, or a link to a file that is outside."""
    info = tarfile.TarInfo(name)
    if kind == "file":
        info.size = 7
    else:
        info.type, info.linkname = {"link": tarfile.SYMTYPE, "hard link": tarfile.LNKTYPE}[kind], "../secret.png"
    return info


@pytest.mark.parametrize("name", ["../../out.txt", "{tmp}/out.txt", "a/../../out.txt"])
def test_shards_are_read_where_they_lie(tmp_path, name):
    (root := tmp_path / "data").mkdir()
    make_shards(root)
    with tarfile.open(root / "train-0.tar", "a") as shard:
        shard.addfile(_member("file", name.format(tmp=tmp_path)), io.BytesIO(b"content"))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert len(load_images(str(root)).train.labels) == 4
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("kind", ["link", "hard link"])
def test_links_in_shards_are_not_followed(tmp_path, kind):
    (tmp_path / "secret.png").write_bytes(png(70))
    (root := tmp_path / "data").mkdir()
    make_shards(root)
    with tarfile.open(root / "train-0.tar", "a") as shard:
        shard.addfile(_member(kind, "009.png"))
    assert [image.key for image in index_shard(root / "train-0.tar")] == ["000", "001"]
