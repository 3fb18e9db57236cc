import hashlib
import pickle

import numpy as np
import pytest
import torch

from statickey.data import open_detection, open_segmentation
from statickey.data.images import read_digits
from statickey.data.scenes import Scenes, read_scenes
from statickey.errors import DataError


@pytest.fixture(scope="module")
def scenes():
    return read_scenes(None)


def test_pixels_are_the_same_everywhere(scenes):
    train, test = (
        hashlib.sha256(b"".join(part.scene(i).pixels.tobytes() + part.scene(i).places.tobytes() for i in range(20)))
        for part in scenes
    )
    assert train.hexdigest()[:16] == "9c46043cd2acb173"
    assert test.hexdigest()[:16] == "511cfad05c254a6e"


def test_order_of_drawing_does_not_matter(scenes):
    again, _ = read_scenes(None)
    assert again.key(7) == scenes[0].key(7)
    assert again.key(3) == scenes[0].key(3)
    assert len({again.key(i) for i in range(20)}) == 20


def test_boxes_masks_and_classes_agree(scenes):
    for i in range(30):
        objects, classes, image = scenes[0].objects(i), scenes[0].class_map(i), scenes[0].open(i)
        masks = objects.mask_tensor().numpy()
        assert image.size == classes.shape[::-1] == masks.shape[:0:-1]
        assert image.mode == "RGB"
        assert masks.sum(axis=0).max() == 1
        assert np.array_equal(masks.any(axis=0), classes > 0)
        for box, label, mask in zip(objects.boxes.tolist(), objects.labels.tolist(), masks, strict=True):
            assert set(classes[mask]) == {label + 1}
            rows, columns = np.nonzero(mask)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_digits_are_visible_and_sizes_vary(scenes):
    sides = {side for i in range(50) for side in scenes[0].open(i).size}
    assert min(sides) >= 80
    assert max(sides) <= 112
    assert len(sides) > 20
    for i in range(50):
        objects = scenes[0].objects(i)
        assert 1 <= len(objects) <= 6
        assert objects.mask_tensor().sum(dim=(1, 2)).min() >= 15


def test_classes_are_balanced(scenes):
    for part, low in zip(scenes, (100, 20), strict=True):
        counts = np.bincount(np.concatenate([part.scene(i).labels for i in range(len(part))]), minlength=10)
        assert counts.min() >= low
        assert counts.max() < 2.5 * counts.min()


def test_training_and_test_digits_differ(scenes):
    scans, labels, train, test = read_digits()
    assert not set(train) & set(test)
    for part, index in zip(scenes, (train, test), strict=True):
        assert np.array_equal(part.scans, scans[index])
        assert np.array_equal(part.labels, labels[index])


def test_tasks_see_one_drawing():
    detection, segmentation = open_detection("scenes", limit=3), open_segmentation("scenes", limit=3)
    assert detection.class_names == tuple("0123456789")
    assert segmentation.class_names == ("background", *"0123456789")
    assert detection.category_ids == tuple(range(10))
    assert detection.has_masks
    assert not detection.flip
    assert not segmentation.flip
    assert (len(detection.train), len(segmentation.train), len(detection.test)) == (3, 3, 100)
    assert detection.train.open(2).tobytes() == segmentation.train.open(2).tobytes()
    assert detection.train.describe(2) == "training scene 2"
    assert detection.train.image_id(2) == 2


def test_limit_draws_the_first():
    few, more = open_detection("scenes", limit=2), open_detection("scenes", limit=10**6)
    assert len(more.train) == 400
    assert few.train.key(1) == more.train.key(1)
    assert few.fingerprint() == open_detection("scenes", limit=2).fingerprint()
    with pytest.raises(DataError, match="limit=0 must be a positive number"):
        open_detection("scenes", limit=0)


def test_scenes_survive_pickling(scenes):
    copy = pickle.loads(pickle.dumps(scenes[1]))
    assert isinstance(copy, Scenes)
    assert copy.key(4) == scenes[1].key(4)
    assert torch.equal(copy.objects(4).boxes, scenes[1].objects(4).boxes)
    with pytest.raises(IndexError, match="scene 100 of 100"):
        copy.scene(100)
