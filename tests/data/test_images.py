import datasets
import numpy as np
import pytest
import torch

from image_folders import make_folder, make_parquet, picture
from statickey.data import load_images
from statickey.errors import DataError, StaticKeyError


def test_digits_of_another_size():
    data = load_images("digits", img_size=16, limit=30)
    assert data.train.images.shape == (30, 1, 16, 16)
    assert data.test.images.shape == (360, 1, 16, 16)


def test_digits():
    data = load_images("digits")
    assert data.train.images.shape == (1437, 1, 8, 8)
    assert data.test.images.shape == (360, 1, 8, 8)
    assert data.train.images.dtype == torch.uint8
    assert int(data.train.images.max()) == 255
    assert (data.crop_padding, data.flip) == (0, False)
    flat = {x.numpy().tobytes() for x in data.train.images}
    assert sum(x.numpy().tobytes() in flat for x in data.test.images) <= 2


def test_folder(tmp_path):
    data = load_images(str(make_folder(tmp_path)))
    assert data.class_names == ("a", "b")
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.train.images[4, 0, 0, 0] == 41
    assert (data.crop_padding, data.flip) == (1, True)


def test_parquet(tmp_path):
    data = load_images(str(make_parquet(tmp_path)))
    assert data.class_names == ("cat", "dog", "eel")
    assert data.train.labels.tolist() == [0, 1, 2, 1]
    assert data.test.images[2, 0, 0, 0] == 20


def test_torchvision_name(tmp_path, monkeypatch):
    import torchvision

    class Fake:
        def __init__(self, root, train, download):
            assert root == tmp_path
            self.data = np.full((4, 32, 32, 3), 7 if train else 9, np.uint8)
            self.targets, self.classes = [0, 1, 0, 1], ["x", "y"]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    data = load_images("cifar10", data_dir=tmp_path)
    assert int(data.train.images[0, 0, 0, 0]) == 7
    assert int(data.test.images[0, 0, 0, 0]) == 9


def test_torchvision_data_absent_and_unreachable(tmp_path, monkeypatch):
    import torchvision

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.datasets.utils, "download_and_extract_archive", refuse)
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", refuse)
    with pytest.raises(DataError, match=r"cifar10 is not under data_dir=.* \(no network\)"):
        load_images("cifar10", data_dir=tmp_path)


def test_limit_draws_at_random_and_repeats(tmp_path):
    folder = make_folder(tmp_path, per_class=20)
    first, second = (load_images(str(folder), limit=10) for _ in range(2))
    assert torch.equal(first.train.images, second.train.images)
    assert first.fingerprint() == second.fingerprint()
    assert len(first.train.labels) == 10
    assert set(first.train.labels.tolist()) == {0, 1}
    assert len(first.test.labels) == 40
    assert first.fingerprint() != load_images(str(folder), limit=11).fingerprint()


def test_img_size_resizes_and_crops(tmp_path):
    data = load_images(str(make_folder(tmp_path, size=(20, 12))), img_size=6)
    assert data.train.images.shape == (6, 3, 6, 6)


def test_bad_image_is_named_or_skipped(tmp_path):
    folder = make_folder(tmp_path)
    (folder / "train" / "a" / "1.png").write_bytes(b"")
    whole = (folder / "train" / "b" / "2.png").read_bytes()
    (folder / "train" / "b" / "2.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cannot read image .*train/a/1.png: .*--on-bad-image skip"):
        load_images(str(folder))
    data = load_images(str(folder), on_bad_image="skip")
    assert len(data.train.labels) == 4
    assert [line.split(":")[0].rsplit("/", 2)[1:] for line in data.skipped] == [["a", "1.png"], ["b", "2.png"]]


def test_parquet_test_part_is_not_mixed_with_validation(tmp_path):
    make_parquet(tmp_path)
    (tmp_path / "validation.parquet").write_bytes((tmp_path / "test.parquet").read_bytes())
    assert len(load_images(str(tmp_path)).test.labels) == 4
    (tmp_path / "test.parquet").unlink()
    assert len(load_images(str(tmp_path)).test.labels) == 4


def test_parquet_splits_must_agree_on_class_names(tmp_path):
    make_parquet(tmp_path)
    part = datasets.Dataset.from_parquet(str(tmp_path / "test.parquet"), cache_dir=str(tmp_path / "cache"))
    names = datasets.ClassLabel(names=["dog", "cat", "eel"])
    part.cast_column("label", names).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(DataError, match=r"class names in .* differ: \['cat', 'dog', 'eel'\] in train"):
        load_images(str(tmp_path))


def test_class_without_a_training_image_left(tmp_path):
    with pytest.raises(DataError, match=r"has test images but no training image is left of .*limit=1"):
        load_images(str(make_folder(tmp_path)), limit=1)


def test_empty_parquet_cell_is_named(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    part = datasets.Dataset.from_dict({"image": [None], "label": [0]}, features=features)
    for name in ("train", "test"):
        part.to_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(DataError, match=r"row 0: the cell is empty"):
        load_images(str(tmp_path))


def test_bad_parquet_cell_is_named(tmp_path):
    with pytest.raises(DataError, match=r"row 2 \(2.png\)"):
        load_images(str(make_parquet(tmp_path, broken=(2,))))


REFUSED = {
    "missing": (lambda p: str(p / "nowhere"), {}, "neither a folder nor one of digits"),
    "empty": (lambda p: str(p), {}, "train is missing"),
    "no val": (lambda p: (make_folder(p, val=()), str(p))[1], {}, "val is missing"),
    "val only class": (lambda p: str(make_folder(p, val=("a", "c"))), {}, "class 'c' is in .*val but not in"),
    "mixed sizes": (
        lambda p: (make_folder(p), picture(1, (9, 9)).save(p / "train/b/0.png"), str(p))[2],
        {},
        "is 9x9 pixels, others are 8x8; pass --img-size",
    ),
    "not square": (lambda p: str(make_folder(p, size=(9, 8))), {}, "is 9x8 pixels, not square"),
    "no train parquet": (
        lambda p: (make_parquet(p), (p / "train-00000-of-00001.parquet").unlink(), str(p))[2],
        {},
        r"no train\*.parquet under .* \(found test.parquet\)",
    ),
    "torn parquet": (
        lambda p: (make_parquet(p), (p / "test.parquet").write_bytes(b"PAR1"), str(p))[2],
        {},
        "cannot read .*test.parquet",
    ),
    "limit": (lambda p: "digits", {"limit": 0}, "limit=0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(tmp_path, case):
    make, options, message = REFUSED[case]
    with pytest.raises(DataError, match=message):
        load_images(make(tmp_path), **options)


def test_refuses_an_unknown_choice():
    with pytest.raises(StaticKeyError, match="on_bad_image='warn' must be one of fail, skip"):
        load_images("digits", on_bad_image="warn")


def test_empty_class_folder(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train" / "c").mkdir()
    with pytest.raises(DataError, match="train/c holds no image"):
        load_images(str(tmp_path))


def test_real_cifar10(cifar10_folder):
    data = load_images(str(cifar10_folder), limit=50)
    assert data.class_names[0] == "airplane"
    assert data.train.images.shape == (50, 3, 32, 32)
    assert data.test.images.shape == (10000, 3, 32, 32)
