import os
import pickle
import shutil
import types

import datasets
import numpy as np
import pytest
import torch
import torchvision

from image_folders import make_folder, make_parquet, make_shard, make_shards, picture, png
from statickey.data import load_images, tables
from statickey.data.sources import TORCHVISION_SETS, open_sources
from statickey.errors import DataError

KINDS = {"folder": make_folder, "parquet": make_parquet, "shards": make_shards}


def pixels(source):
    return [np.asarray(source.open(i).convert("RGB")) for i in range(len(source))]


@pytest.mark.parametrize("kind", KINDS)
def test_sources_survive_pickling(tmp_path, kind):
    sources = open_sources(str(KINDS[kind](tmp_path)))
    copies = pickle.loads(pickle.dumps(sources))
    assert copies.class_names == sources.class_names
    for name in ("train", "test"):
        source, copy = getattr(sources, name), getattr(copies, name)
        assert list(copy.labels) == list(source.labels)
        assert [copy.describe(i) for i in range(len(copy))] == [source.describe(i) for i in range(len(source))]
        assert all(np.array_equal(a, b) for a, b in zip(pixels(copy), pixels(source), strict=True))


def test_shards(tmp_path):
    sources = open_sources(str(make_shards(tmp_path)))
    assert sources.class_names == ("0", "1", "2")
    assert list(sources.train.labels) == [0, 1, 2, 1]
    assert [x[0, 0, 0] for x in pixels(sources.test)] == [0, 10, 20, 30]
    assert sources.train.describe(2) == f"{tmp_path / 'train-1.tar'} sample 002"
    data = load_images(str(tmp_path))
    assert data.train.labels.tolist() == [0, 1, 2, 1]
    assert data.train.images[3, 0, 0, 0] == 30


def test_shards_with_class_names_and_names_of_their_own(tmp_path):
    make_shards(tmp_path, test="validation")
    for path in tmp_path.glob("*.tar"):
        path.rename(path.with_name(f"imagenet1k-{path.name}"))
    (tmp_path / "classes.txt").write_text("cat\ndog\neel\nfox\n")
    sources = open_sources(str(tmp_path))
    assert sources.class_names == ("cat", "dog", "eel", "fox")
    assert len(sources.test) == 4


def test_shard_test_part_is_not_mixed_with_validation(tmp_path):
    make_shards(tmp_path)
    shutil.copy(tmp_path / "val-0.tar", tmp_path / "test.tar")
    assert len(open_sources(str(tmp_path)).test) == 2


def test_keys_end_at_the_first_dot_and_keep_their_folder(tmp_path):
    files = {
        "b/x.seg.png": png(1),
        "b/x.PNG": png(2),
        "a/x.webp": b"later",
        "b/x.cls": b" 4\n",
        "a/x.cls": b"3",
        ".x.jpg": b"no key",
    }
    for split in ("train", "val"):
        make_shard(tmp_path / f"{split}.tar", files)
    train = open_sources(str(tmp_path)).train
    assert list(train.labels) == [4, 3]
    assert train.describe(0).endswith("sample b/x")
    assert train.open(0).getpixel((0, 0)) == (2, 2, 2)


def test_an_archive_beside_an_image_folder_is_not_read(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(b"")
    assert open_sources(str(tmp_path)).class_names == ("a", "b")


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


TORN = {
    "in a header": 700,
    "in an image": 1600,
    "between two files": 512 * 2,
    "at the start": 100,
    "to nothing": 0,
}


@pytest.mark.parametrize("case", TORN)
def test_torn_shard_is_named(tmp_path, case):
    make_shards(tmp_path)
    cut(tmp_path / "train-1.tar", TORN[case])
    with pytest.raises(DataError, match=r"cannot read .*train-1.tar: .*; replace it with a whole"):
        open_sources(str(tmp_path))


def test_shard_with_a_spoilt_header_is_named(tmp_path):
    make_shards(tmp_path)
    path = tmp_path / "val-0.tar"
    content = bytearray(path.read_bytes())
    content[1024:1034] = b"\xff" * 10
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read .*val-0.tar: no header and no end at byte 1024"):
        open_sources(str(tmp_path))


BAD_SHARDS = {
    "no class": ({"7.png": png(1)}, r"train.tar sample 7 has no .cls file; add one"),
    "no image": ({"7.cls": b"1"}, r"train.tar sample 7 has a .cls but no image \(.jpg, .jpeg, .png, .webp\)"),
    "a word": ({"7.png": png(1), "7.cls": b"cat"}, r"sample 7 has b'cat' in its .cls; write the number"),
    "not text": ({"7.png": png(1), "7.cls": b"\xff\x00"}, r"sample 7 has b'\\xff\\x00' in its .cls"),
    "two images": ({"7.png": png(1), "7.jpg": png(2), "7.cls": b"1"}, r"sample 7 has a second .jpg file"),
    "empty": ({}, r"the train part of .* has no image; add some"),
}


@pytest.mark.parametrize("case", BAD_SHARDS)
def test_bad_sample_is_named(tmp_path, case):
    files, message = BAD_SHARDS[case]
    make_shard(tmp_path / "val.tar", {"1.png": png(1), "1.cls": b"0"})
    make_shard(tmp_path / "train.tar", files)
    with pytest.raises(DataError, match=message):
        open_sources(str(tmp_path))


def test_shards_of_one_split_alone(tmp_path):
    make_shard(tmp_path / "train.tar", {})
    with pytest.raises(DataError, match=r"no test\*.tar or val\*.tar under .* \(found train.tar\)"):
        open_sources(str(tmp_path))


def test_label_outside_the_classes_is_named(tmp_path):
    make_shards(tmp_path)
    (tmp_path / "classes.txt").write_text("cat\ndog")
    with pytest.raises(DataError, match=r"train-1.tar sample 002 has label 2, outside the 2 classes"):
        load_images(str(tmp_path))


NUMBERED = {
    "of a total": (["train-00000-of-00003", "train-00002-of-00003"], r"lacks train-00001-of-00003.parquet \(1 of 3"),
    "the last": (["train-00000-of-00002"], "lacks train-00001-of-00002.parquet"),
    "with hashes": (["train-00001-of-00002-0123abcd"], "lacks train-00000-of-00002.parquet"),
    "two totals": (["train-00000-of-00001", "train-00001-of-00002"], "lacks train-00000-of-00002.parquet"),
    "a hole": (["train-0000", "train-0002", "train-0005"], r"lacks train-0001.parquet, .*0003.*0004.* \(3 of 6"),
    "many": (["train-0", "train-9"], r"lacks train-1.parquet, train-2.parquet, train-3.parquet, ... \(8 of 10"),
    "from one": (["train_1", "train_3"], r"lacks train_2.parquet \(1 of 3"),
    "the first": (["train-0003", "train-0004"], "lacks train-0001.parquet, train-0002.parquet"),
}


@pytest.mark.parametrize("case", NUMBERED)
def test_a_hole_in_a_numbered_set_is_named(tmp_path, case):
    names, message = NUMBERED[case]
    content = (make_parquet(tmp_path) / "test.parquet").read_bytes()
    (tmp_path / "train-00000-of-00001.parquet").unlink()
    for name in names:
        (tmp_path / f"{name}.parquet").write_bytes(content)
    with pytest.raises(DataError, match=message + ".*; add what is missing"):
        open_sources(str(tmp_path))


WHOLE = {
    "of a total": ["train-00000-of-00002", "train-00001-of-00002"],
    "with hashes": ["train-00000-of-00002-aa11", "train-00001-of-00002-bb22"],
    "numbers": ["train-0", "train-1", "train-2"],
    "from one": ["train-0001", "train-0002"],
    "past ten": [f"train-{i}" for i in range(11)],
    "a year": ["train2017"],
    "years": ["train-2012", "train-2017"],
    "no number": ["train", "train-more"],
    "by worker": ["train-05-0000", "train-05-0001", "train-07-0000"],
}


@pytest.mark.parametrize("case", WHOLE)
def test_whole_sets_and_numbers_in_names(tmp_path, case):
    content = (make_parquet(tmp_path) / "test.parquet").read_bytes()
    (tmp_path / "train-00000-of-00001.parquet").unlink()
    for name in WHOLE[case]:
        (tmp_path / f"{name}.parquet").write_bytes(content)
    assert len(open_sources(str(tmp_path)).train) == 4 * len(WHOLE[case])


def test_a_missing_shard_is_named(tmp_path):
    make_shards(tmp_path)
    shutil.copy(tmp_path / "train-1.tar", tmp_path / "train-3.tar")
    with pytest.raises(DataError, match=r"lacks train-2.tar \(1 of 4 files of this set\)"):
        open_sources(str(tmp_path))


@pytest.mark.parametrize("make", [make_parquet, make_shards])
def test_hidden_files_beside_the_data(tmp_path, make):
    make(tmp_path)
    suffix = "parquet" if make is make_parquet else "tar"
    for name in (f"._train-0.{suffix}", f".train-00000-of-00009.{suffix}", ".DS_Store", "._x.parquet"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    assert len(open_sources(str(tmp_path)).train) == 4


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes there")
@pytest.mark.parametrize("name", ["train.parquet", "train.tar"])
def test_a_pipe_among_the_data(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=f"{name} is not a regular file; remove or rename it"):
        open_sources(str(tmp_path))


def test_test_folders_in_their_order(tmp_path):
    make_folder(tmp_path)
    for name, count in (("test", 1), ("validation", 2)):
        shutil.copytree(tmp_path / "val", tmp_path / name)
        for path in sorted((tmp_path / name / "a").iterdir())[count:]:
            path.unlink()
    sizes = []
    for name in ("val", "validation", "test"):
        sizes.append(len(open_sources(str(tmp_path)).test))
        shutil.rmtree(tmp_path / name)
    assert sizes == [6, 5, 4]
    with pytest.raises(DataError, match="val is missing; an image folder has"):
        open_sources(str(tmp_path))


def test_hidden_files_and_folders_of_an_image_folder(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train/a/._0.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / "train/.DS_Store").write_bytes(b"")
    for hidden in ("train/.ipynb_checkpoints", "train/a/.ipynb_checkpoints", "val/.cache"):
        (tmp_path / hidden).mkdir()
        picture(200).save(tmp_path / hidden / "0-checkpoint.png")
    (tmp_path / "train/b/deeper.png").mkdir()
    picture(77).save(tmp_path / "train/b/deeper.png/0.PNG")
    data = load_images(str(tmp_path))
    assert data.class_names == ("a", "b")
    assert data.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 40, 41, 42, 77]


def test_a_class_without_a_test_image_is_told(tmp_path):
    make_folder(tmp_path, train=("a", "b", "c", "d"), val=("a", "c"))
    with pytest.warns(UserWarning, match=r"has no test image of class 'b' and 1 others; the score says nothing"):
        sources = open_sources(str(tmp_path))
    assert list(sources.test.labels) == [0, 0, 0, 2, 2, 2]


@pytest.mark.parametrize("name", ["", " ", "/", "a//b", "a/b/", "a/b/c/d"])
def test_hub_names_that_name_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"data 'hf:{name}' names no data set; write hf:NAME, hf:OWNER/NAME or"):
        open_sources(f"hf:{name}")


@pytest.mark.parametrize("name", ["..", ".", "a:b", "https://x.y"])
def test_hub_names_that_the_library_refuses(tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    with pytest.raises(DataError, match=r"hf:") as refusal:
        open_sources(f"hf:{name}", tmp_path / "cache")
    assert "\n" not in str(refusal.value)


def test_large_parquet_is_mapped_from_disk(tmp_path, monkeypatch):
    root = make_parquet(tmp_path / "data")
    small = open_sources(str(root))
    monkeypatch.setattr(tables, "_IN_MEMORY_BYTES", 0)
    large = open_sources(str(root), tmp_path / "cache")
    assert large.train.table.cache_files
    assert large.class_names == small.class_names
    assert large.train.labels == small.train.labels
    assert all(np.array_equal(a, b) for a, b in zip(pixels(large.train), pixels(small.train), strict=True))
    (root / "test.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"cannot read .*test.parquet"):
        open_sources(str(root), tmp_path / "cache")


def test_hub_name_of_a_local_folder(tmp_path):
    root = make_parquet(tmp_path / "data")
    sources = open_sources(f"hf:{root}", tmp_path / "cache")
    assert sources.class_names == ("cat", "dog", "eel")
    assert list(sources.train.labels) == [0, 1, 2, 1]
    assert sources.train.describe(2) == f"hf:{root} train row 2 (2.png)"
    assert len(pickle.loads(pickle.dumps(sources)).test) == 4


def table(labels, names=("cat", "dog")):
    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=list(names))})
    cells = [{"bytes": png(10 * i), "path": None} for i in range(len(labels))]
    return datasets.Dataset.from_dict({"img": cells, "fine": list(labels)}, features=features)


@pytest.fixture
def hub(monkeypatch):
    """Answer ``load_dataset`` with these splits and note how it was asked."""
    splits, asked = {}, []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return types.SimpleNamespace(splits=splits, asked=asked)


def test_hub_names_and_configurations(hub):
    hub.splits |= {"train": table([0, 1]), "test": table([1])}
    for name in ("hf:mnist", "hf:owner/name", "hf:owner/name/large"):
        assert open_sources(name).class_names == ("cat", "dog")
    assert [args for args, _ in hub.asked] == [("mnist", None), ("owner/name", None), ("owner/name", "large")]
    assert not any("trust_remote_code" in kwargs for _, kwargs in hub.asked)


@pytest.mark.parametrize("where", ["cache", "elsewhere"])
def test_hub_cells_name_files_of_the_cache_alone(hub, tmp_path, where):
    file = tmp_path / where / "0.png"
    file.parent.mkdir()
    file.write_bytes(png(70))
    features = datasets.Features({"img": datasets.Image(), "fine": datasets.ClassLabel(names=["cat", "dog"])})
    cells = {"img": [{"bytes": None, "path": str(file)}] * 2, "fine": [0, 1]}
    hub.splits |= {"train": datasets.Dataset.from_dict(cells, features=features), "test": table([1, 0])}
    train = open_sources("hf:owner/name", data_dir=tmp_path / "cache").train
    if where == "cache":
        assert np.asarray(train.open(0))[0, 0, 0] == 70
        return
    with pytest.raises(DataError, match=r"the cell names the file '.*elsewhere/0.png', which is outside .*cache"):
        train.open(0)


def test_hub_test_split_without_labels_gives_way_to_validation(hub):
    hub.splits |= {"train": table([0, 1]), "test": table([-1, -1]), "validation": table([1, 0, 1])}
    assert open_sources("hf:imagenet").test.labels == [1, 0, 1]
    del hub.splits["validation"]
    with pytest.raises(DataError, match=r"hf:imagenet needs labelled splits .*; it has train, test"):
        open_sources("hf:imagenet")


def test_hub_splits_must_agree_on_class_names(hub):
    hub.splits |= {"train": table([0]), "test": table([0], ("dog", "cat"))}
    with pytest.raises(DataError, match="class names in hf:x differ"):
        open_sources("hf:x")


def test_hub_data_without_labels(hub):
    hub.splits |= {"train": datasets.Dataset.from_dict({"text": ["a"]})}
    with pytest.raises(
        DataError, match=r"hf:imdb train needs one column of images .* and one of labels .*; its columns are.*text"
    ):
        open_sources("hf:imdb")


def test_hub_out_of_reach(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"cannot load hf:nobody/nothing \(.*\); check the name and the network"):
        open_sources("hf:nobody/nothing")


def test_unknown_name_lists_the_kinds():
    with pytest.raises(DataError, match=r"neither a folder nor one of digits, cifar10, .*food101.*, hf:NAME; give"):
        open_sources("cifar11")


class FakeSet:
    """A data set of torchvision's, with three images of a class each, and where it keeps them."""

    def __init__(self, known, root, **options):
        options.pop("download")
        self.options, count = options, 3
        if known.images == "_image_files":
            root.mkdir(exist_ok=True)
            images = [root / f"{i}.png" for i in range(count)]
            for i, path in enumerate(images):
                picture(i).save(path)
        else:
            gray = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1)
            shape = (count, 3, 8, 9) if known.channels_first else (count, 8, 9, 3)
            images = np.broadcast_to(np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1), shape)
            if "MNIST" in known.name:
                images = gray.expand(count, 8, 9)
        setattr(self, known.images, images)
        setattr(self, known.labels, torch.arange(count) if "MNIST" in known.name else list(range(count)))
        if known.name != "SVHN":
            self.classes = ["a", "b", "c"]


@pytest.mark.parametrize("name", TORCHVISION_SETS)
def test_torchvision_names(tmp_path, monkeypatch, name):
    known = TORCHVISION_SETS[name]
    made = []

    def make(root, **options):
        made.append(FakeSet(known, root, **options))
        return made[-1]

    monkeypatch.setattr(torchvision.datasets, known.name, make)
    sources = open_sources(name, tmp_path)
    assert sources.class_names == (("0", "1", "2") if name == "svhn" else ("a", "b", "c"))
    assert list(sources.train.labels) == [0, 1, 2]
    for i in range(3):
        image = sources.train.open(i).convert("RGB")
        assert image.size == ((8, 8) if known.images == "_image_files" else (9, 8))
        assert image.getpixel((8 - 1, 0)) == (i, i, i)
    assert [x.options for x in made] == [dict(x) for x in known.options]
    assert sources.flip is (name not in ("mnist", "svhn"))
    pickle.loads(pickle.dumps(sources))


@pytest.mark.parametrize("name", TORCHVISION_SETS)
def test_torchvision_has_these_classes_and_takes_these_options(name):
    known = TORCHVISION_SETS[name]
    cls = getattr(torchvision.datasets, known.name)
    for options in known.options:
        assert set(options) <= set(cls.__init__.__code__.co_varnames)
