import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from dense_folders import SIZE, make_masks, make_voc_masks, mask_image, save, write
from image_folders import picture
from statickey.data import open_segmentation
from statickey.errors import DataError


def test_masks(tmp_path):
    data = open_segmentation(str(make_masks(tmp_path)))
    assert data.class_names == ("sky", "sea")
    assert data.palette is None
    assert (len(data.train), len(data.test)) == (2, 2)
    assert np.array_equal(data.train.class_map(1), np.asarray(mask_image()))
    assert data.train.class_map(1).dtype == np.uint8
    image = data.train.open(1)
    assert (image.mode, image.size) == ("RGB", SIZE)
    assert data.train.describe(1) == str(tmp_path / "images" / "train" / "1.jpg")
    assert data.flip


@pytest.mark.parametrize("mode", ["P", "1"])
def test_masks_of_other_modes(tmp_path, mode):
    data = open_segmentation(str(make_masks(tmp_path, mode=mode) if mode == "P" else make_masks(tmp_path)))
    if mode == "1":
        save(tmp_path / "masks" / "train" / "0.png", Image.fromarray(np.asarray(mask_image()) > 0))
    assert np.array_equal(data.train.class_map(0), np.asarray(mask_image()))


def test_layout_of_ade20k(tmp_path):
    """Index 0 is of no class there, and the first class has index 1."""
    classes = {"classes": ["wall", "floor"], "ignore": [0], "colors": [[1, 2, 3], [4, 5, 6]]}
    root = make_masks(tmp_path, ("training", "validation"), "annotations", classes=classes, square=2, background=1)
    save(root / "annotations" / "validation" / "0.png", mask_image(square=0, background=2))
    data = open_segmentation(str(root))
    assert data.class_names == ("wall", "floor")
    assert data.palette == ((1, 2, 3), (4, 5, 6))
    assert np.array_equal(data.train.class_map(0), np.asarray(mask_image()))
    assert np.array_equal(data.test.class_map(0), np.asarray(mask_image(square=255, background=1)))


def test_ignored_indices_between_classes(tmp_path):
    """As in Cityscapes: names are those of the indices left, in order."""
    root = make_masks(tmp_path, classes={"classes": ["road", "car"], "ignore": [0, 2]}, square=3, background=1)
    assert np.array_equal(open_segmentation(str(root)).train.class_map(0), np.asarray(mask_image()))


def test_classes_of_masks_without_names(tmp_path):
    root = make_masks(tmp_path, classes=None, square=3, background=255)
    assert open_segmentation(str(root)).class_names == ("0", "1", "2", "3")


def test_validation_is_scored_before_test_as_with_folders_of_classes(tmp_path):
    make_masks(tmp_path, ("train", "val", "test"))
    (tmp_path / "images" / "test" / "0.jpg").unlink()
    assert len(open_segmentation(str(tmp_path)).test) == 2
    shutil.rmtree(tmp_path / "images" / "val")
    assert len(open_segmentation(str(tmp_path)).test) == 1


def test_layout_of_voc(tmp_path):
    data = open_segmentation(str(make_voc_masks(tmp_path)))
    assert len(data.class_names) == 21
    assert data.class_names[20] == "tvmonitor"
    assert np.array_equal(data.train.class_map(0), np.asarray(mask_image(square=20, background=255)))
    write(tmp_path / "ImageSets" / "Segmentation" / "train.txt", "train_1\n../train_1\n")
    with pytest.raises(DataError, match=r"train\.txt names the file '\.\./train_1\.jpg', which is outside"):
        open_segmentation(str(tmp_path))
    write(tmp_path / "ImageSets" / "Segmentation" / "train.txt", "train_1\ntrain_1\n")
    with pytest.raises(DataError, match=r"train\.txt lists 'train_1' twice"):
        open_segmentation(str(tmp_path))
    (tmp_path / "ImageSets" / "Segmentation" / "train.txt").unlink()
    with pytest.raises(DataError, match=r"cannot read .*train\.txt"):
        open_segmentation(str(tmp_path))


def test_limit_and_pickling(tmp_path):
    data = open_segmentation(str(make_masks(tmp_path, count=5)), limit=2)
    again = open_segmentation(str(tmp_path), limit=2)
    assert (len(data.train), len(data.test)) == (2, 5)
    assert data.fingerprint() == again.fingerprint() != open_segmentation(str(tmp_path)).fingerprint()
    copy = pickle.loads(pickle.dumps(data))
    assert copy.fingerprint() == data.fingerprint()
    assert np.array_equal(copy.train.class_map(1), data.train.class_map(1))
    assert copy.train.open(1).tobytes() == data.train.open(1).tobytes()
    assert copy.train.describe(1) == data.train.describe(1)


def test_fingerprint(tmp_path):
    first = open_segmentation(str(make_masks(tmp_path / "a"))).fingerprint()
    assert open_segmentation(str(shutil.copytree(tmp_path / "a", tmp_path / "b"))).fingerprint() == first
    pixels = np.asarray(mask_image()).copy()
    pixels[0, 0] = 1
    save(tmp_path / "b" / "masks" / "train" / "0.png", Image.fromarray(pixels))
    assert open_segmentation(str(tmp_path / "b")).fingerprint() != first


def truncate(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 2, SIZE[::-1]).astype(np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-40])


MASK = "masks/train/0.png"
ON_OPENING = {
    "no mask": (lambda root: (root / MASK).unlink(), r"0\.png, the mask of .*0\.jpg, is missing"),
    "size": (lambda root: save(root / MASK, mask_image(size=(9, 8))), r"0\.jpg is 12x8 pixels, its mask .* 9x8"),
    "colours": (
        lambda root: save(root / MASK, picture(1, SIZE)),
        r"0\.png is of mode RGB, which holds no indices of classes; save the index .* palette PNG",
    ),
    "no image": (lambda root: write(root / "images/train/0.jpg", "text"), r"cannot read image .*0\.jpg"),
    "shared": (
        lambda root: save(root / "images/train/0.png", picture(1, SIZE)),
        r"0\.png and 0\.jpg share the mask",
    ),
}
ON_READING = {
    "index": (
        lambda root: save(root / MASK, mask_image(square=2)),
        r"mask .*0\.png holds index 2, which none of the 2 classes has; mend it, or name its class",
    ),
    "torn mask": (lambda root: truncate(root / MASK), r"cannot read mask .*0\.png: .*truncated"),
}


@pytest.mark.parametrize("case", ON_OPENING)
def test_bad_samples_are_refused_or_left_out(tmp_path, case):
    spoil, message = ON_OPENING[case]
    spoil(make_masks(tmp_path))
    with pytest.raises(DataError, match=message + ".*; mend or remove it, or pass --on-bad-sample skip"):
        open_segmentation(str(tmp_path))
    data = open_segmentation(str(tmp_path), on_bad_sample="skip")
    assert len(data.skipped) == 1
    assert len(data.train) == (2 if case == "shared" else 1)
    with pytest.raises(DataError, match=message):
        raise DataError(data.skipped[0])


@pytest.mark.parametrize("case", ON_READING)
def test_masks_are_checked_when_read(tmp_path, case):
    spoil, message = ON_READING[case]
    spoil(make_masks(tmp_path))
    data = open_segmentation(str(tmp_path))
    with pytest.raises(DataError, match=message):
        data.train.class_map(0)
    assert data.train.class_map(1).max() == 1


def test_torn_image_is_refused_when_read(tmp_path):
    truncate(make_masks(tmp_path) / "images/train/0.jpg")
    with pytest.raises(DataError, match=r"cannot read image .*0\.jpg: Truncated.*; mend or remove it, or pass --on"):
        open_segmentation(str(tmp_path)).train.open(0)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["a", "a"], "2 classes 'a'; give each a name of its own"),
        ([], "'classes' must be a list of names"),
        (["a", 1], "'classes' must be a list of names"),
        ({"names": ["a"]}, "must be a list of names, or have 'classes' and, at most, classes, colors, ignore"),
        ({"classes": ["a"], "ignore": [256]}, r"'ignore' is \[256\]; it must list indices from 0 to 255"),
        ({"classes": ["a", "b"], "colors": [[0, 0, 0]]}, r"'colors' must list \[r, g, b\]"),
        ({"classes": ["a"], "colors": [[0, 0, 300]]}, r"'colors' must list \[r, g, b\]"),
        ([str(i) for i in range(256)], "names 256 classes; 8-bit masks tell 255 apart"),
        ('["a", ', r"cannot read .*classes\.json: Expecting value"),
    ],
)
def test_bad_classes(tmp_path, classes, message):
    with pytest.raises(DataError, match=message):
        open_segmentation(str(make_masks(tmp_path, classes=classes)))


def test_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match="'' is neither scenes nor a folder"):
        open_segmentation("")
    with pytest.raises(
        DataError, match=r"neither images/train beside masks/train .* nor SegmentationClass of Pascal"
    ):
        open_segmentation(str(tmp_path))
    make_masks(tmp_path, ("train",))
    with pytest.raises(DataError, match=r"images/val is missing; a folder of masks has images/train and images/val"):
        open_segmentation(str(tmp_path))
    (tmp_path / "images" / "val").mkdir()
    with pytest.raises(DataError, match=r"the test part of .* has no image; add some"):
        open_segmentation(str(tmp_path))
    for path in (tmp_path / "masks" / "train").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"the train part of .* has no image; the first of 2 left out: .* is missing"):
        open_segmentation(str(tmp_path), on_bad_sample="skip")


def test_camvid(dense_folder):
    data = open_segmentation(str(dense_folder("camvid")))
    assert (len(data.train), len(data.test), len(data.class_names)) == (367, 101, 11)
    assert data.class_names[0] == "sky"
    assert set(np.unique(data.train.class_map(0))) <= {*range(11), 255}
    assert data.train.open(0).size == (480, 360)
    assert not data.skipped
