import json
import pickle
import shutil

import numpy as np
import pytest
import torch

from dense_folders import SIZE, SQUARE, coco_mark, make_coco, make_voc, make_yolo, voc_xml, write
from statickey.data import open_detection
from statickey.errors import DataError

MAKERS = {"coco": make_coco, "yolo": make_yolo, "voc": make_voc}
SQUARE_RUNS = [17, 4, 4, 4, 4, 4, 4, 4, 51]  # columns of 8 pixels, 4 high from row 1
SQUARE_PIXELS = [(row, column) for row in range(1, 5) for column in range(2, 6)]


def mask_pixels(objects):
    return [[tuple(pixel) for pixel in mask.nonzero().tolist()] for mask in objects.mask_tensor()]


def test_coco(tmp_path):
    data = open_detection(str(make_coco(tmp_path, [coco_mark(5), coco_mark(6, category=7, bbox=[0, 0, 12, 8])])))
    assert data.class_names == ("cat", "dog")
    assert data.category_ids == (3, 7)
    assert not data.has_masks
    objects, none = data.train.objects(0), data.train.objects(1)
    assert objects.boxes.tolist() == [[2, 1, 6, 5], [0, 0, 12, 8]]
    assert objects.labels.tolist() == [0, 1]
    assert objects.crowd.tolist() == [False, False]
    assert objects.masks is None
    assert [t.dtype for t in (objects.boxes, objects.labels, objects.crowd)] == [
        torch.float32,
        torch.int64,
        torch.bool,
    ]
    assert (none.boxes.shape, none.labels.shape, len(none)) == ((0, 4), (0,), 0)
    assert data.train.image_id(1) == 2
    assert data.train.describe(1) == f"{tmp_path / 'train' / '2.png'} (image 2)"
    assert data.train.open(1).size == SIZE
    assert data.train.open(1).getpixel((0, 0)) == (20, 20, 20)


@pytest.mark.parametrize("images", ["{}", "images/{}"])
def test_coco_as_published(tmp_path, images):
    splits = ("train2017", "val2017")
    make_coco(tmp_path, images=images, jsons="annotations/instances_{}.json", splits=splits)
    write(tmp_path / "annotations" / "person_keypoints_train2017.json", "{}")
    data = open_detection(str(tmp_path))
    assert (len(data.train), len(data.test)) == (2, 2)
    make_coco(tmp_path, images=images, jsons="annotations/instances_{}.json", splits=("train2014", "test"))
    with pytest.raises(DataError, match=r"instances_train2014\.json and instances_train2017\.json; keep one"):
        open_detection(str(tmp_path))


@pytest.mark.parametrize(
    "segmentation",
    [
        [SQUARE],
        [[2, 1, 4, 1, 4, 5, 2, 5], [4, 1, 6, 1, 6, 5, 4, 5]],
        {"size": [8, 12], "counts": SQUARE_RUNS},
        {"size": [8, 12], "counts": "COMPRESSED"},
    ],
    ids=["polygon", "polygons", "runs", "compressed"],
)
def test_masks_of_coco(tmp_path, segmentation):
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
        from faster_coco_eval.core import mask

        pixels = np.zeros((8, 12), np.uint8, order="F")
        pixels[1:5, 2:6] = 1
        segmentation["counts"] = mask.encode(pixels)["counts"].decode()
    crowd = coco_mark(6, bbox=[0, 0, 2, 1], iscrowd=1)
    data = open_detection(str(make_coco(tmp_path, [coco_mark(5, segmentation=segmentation), crowd], [])))
    assert data.has_masks
    objects = data.train.objects(0)
    assert objects.crowd.tolist() == [False, True]
    assert mask_pixels(objects) == [SQUARE_PIXELS, [(0, 0), (0, 1)]]
    assert [each["size"] for each in objects.masks] == [[8, 12]] * 2
    assert all(isinstance(each["counts"], bytes) for each in objects.masks)
    assert data.train.objects(1).masks == ()


def test_run_lengths_of_long_runs(tmp_path):
    """Numbers of several characters, and differences of both signs."""
    from faster_coco_eval.core import mask

    random = np.random.default_rng(0)
    pixels = np.asfortranarray(np.repeat(np.repeat(random.integers(0, 2, (6, 9)), 37, 0), 23, 1).astype(np.uint8))
    pixels[random.integers(0, 222, 50), random.integers(0, 207, 50)] ^= 1
    counts = mask.encode(pixels)["counts"].decode()
    make_coco(tmp_path, [coco_mark(5, segmentation={"size": [222, 207], "counts": counts})], [])
    content = json.loads((tmp_path / "instances_train.json").read_text())
    for image in content["images"]:
        image.update(width=207, height=222)
    write(tmp_path / "instances_train.json", content)
    decoded = open_detection(str(tmp_path)).train.objects(0).mask_tensor()[0].numpy()
    assert np.array_equal(decoded, pixels)


def test_masks_of_the_test_part_alone_are_not_used(tmp_path):
    data = open_detection(str(make_coco(tmp_path, None, [coco_mark(5, segmentation=[SQUARE])])))
    assert not data.has_masks
    assert data.test.objects(0).masks is None


def test_size_of_image_that_coco_does_not_state(tmp_path):
    make_coco(tmp_path)
    content = json.loads((tmp_path / "instances_train.json").read_text())
    for image in content["images"]:
        del image["width"], image["height"]
    write(tmp_path / "instances_train.json", content)
    assert open_detection(str(tmp_path)).train.open(0).size == SIZE


def test_yolo(tmp_path):
    data = open_detection(str(make_yolo(tmp_path)))
    assert data.class_names == ("cat", "dog")
    assert data.category_ids == (0, 1)
    assert not data.has_masks
    assert data.train.objects(0).boxes.tolist() == [[3, 1, 9, 3]]
    assert data.train.objects(0).labels.tolist() == [1]
    assert data.train.objects(1).boxes.shape == (0, 4)
    assert data.test.objects(0).boxes.tolist() == [[0, 0, 12, 8]]
    assert data.train.image_id(1) == "images/train/2.png"
    assert data.train.describe(1) == str(tmp_path / "images" / "train" / "2.png")


def test_polygons_of_yolo(tmp_path):
    polygon = " ".join(str(x / (12, 8)[k % 2]) for k, x in enumerate(SQUARE))
    data = open_detection(str(make_yolo(tmp_path, f"0 {polygon}\n", "")))
    objects = data.train.objects(0)
    assert data.has_masks
    assert objects.boxes.tolist() == [[2, 1, 6, 5]]
    assert mask_pixels(objects) == [SQUARE_PIXELS]


def test_yolo_with_numbered_names_lists_of_images_and_a_test_part(tmp_path):
    make_yolo(tmp_path, "4 0.5 0.25 0.5 0.25\n", "2 0.5 0.5 1 1\n")
    write(tmp_path / "train.txt", "./images/train/1.png\nimages/train/2.png\n")
    described = "path: .\ntrain: [train.txt]\ntest: images/val\nnc: 2\nnames:\n  4: dog\n  2: cat\n"
    write(tmp_path / "data.yaml", described)
    data = open_detection(str(tmp_path))
    assert data.category_ids == (2, 4)
    assert data.class_names == ("cat", "dog")
    assert data.train.objects(0).labels.tolist() == [1]
    assert (len(data.train), len(data.test)) == (2, 2)


def test_voc(tmp_path):
    data = open_detection(str(make_voc(tmp_path)))
    assert data.class_names == ("cat", "dog")
    assert not data.has_masks
    objects = data.train.objects(0)
    assert objects.boxes.tolist() == [[2, 1, 6, 5], [0, 0, 12, 8]]
    assert objects.labels.tolist() == [1, 0]
    assert objects.crowd.tolist() == [False, True]
    assert len(data.test.objects(1)) == 0
    assert data.train.image_id(0) == "train_1"
    write(tmp_path / "Annotations" / "train_1.xml", voc_xml(("dog", False, (3, 2, 6, 5)), size=(0, 0)))
    assert open_detection(str(tmp_path)).train.objects(0).boxes.tolist() == [[2, 1, 6, 5]]


@pytest.mark.parametrize("kind", MAKERS)
def test_pickling_limit_and_fingerprint(tmp_path, kind):
    root = MAKERS[kind](tmp_path / "a")
    data = open_detection(str(root))
    copy = pickle.loads(pickle.dumps(data))
    assert copy.fingerprint() == data.fingerprint()
    assert torch.equal(copy.train.objects(0).boxes, data.train.objects(0).boxes)
    assert copy.train.open(0).tobytes() == data.train.open(0).tobytes()
    few = open_detection(str(root), limit=1)
    assert (len(few.train), len(few.test)) == (1, 2)
    assert few.train.describe(0) in [data.train.describe(i) for i in range(2)]
    assert few.train.image_id(0) in [data.train.image_id(i) for i in range(2)]
    assert few.fingerprint() == open_detection(str(root), limit=1).fingerprint() != data.fingerprint()
    assert open_detection(str(shutil.copytree(root, tmp_path / "b"))).fingerprint() == data.fingerprint()


CHANGES = {
    "box": {"bbox": [2, 1, 4, 3]},
    "class": {"category_id": 7},
    "crowd": {"iscrowd": 1},
    "mask": {"segmentation": [[2, 1, 6, 1, 6, 5]]},
}


@pytest.mark.parametrize("change", CHANGES)
def test_fingerprint_changes_with_each_mark(tmp_path, change):
    mark, other = coco_mark(5, segmentation=[SQUARE]), coco_mark(6, segmentation=[SQUARE])
    first = open_detection(str(make_coco(tmp_path, [mark, other], []))).fingerprint()
    assert open_detection(str(make_coco(tmp_path, [mark, {**other, **CHANGES[change]}], []))).fingerprint() != first


def test_boxes_are_clipped_by_rounding_alone(tmp_path):
    data = open_detection(str(make_coco(tmp_path, [coco_mark(5, bbox=[-1.5, -2, 15, 12])])))
    assert data.train.objects(0).boxes.tolist() == [[0, 0, 12, 8]]


def test_penn_fudan(dense_folder):
    data = open_detection(str(dense_folder("pennfudan")))
    assert (len(data.train), len(data.test), data.class_names, data.has_masks) == (130, 40, ("person",), True)
    objects = data.train.objects(0)
    assert objects.boxes.tolist() == [[159, 181, 302, 431], [419, 170, 535, 486]]
    masks = objects.mask_tensor()
    assert masks.sum(dim=(1, 2)).tolist() == [11241, 17721]
    rows, columns = masks[0].nonzero().unbind(1)
    assert [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] == [159, 181, 302, 431]
    assert data.train.open(0).size == (559, 536)


def test_bccd(dense_folder):
    data = open_detection(str(dense_folder("bccd")))
    assert (len(data.train), len(data.test)) == (205, 87)
    assert data.class_names == ("RBC", "WBC", "Platelets")
    assert not data.has_masks
    assert sum(len(data.train.objects(i)) for i in range(205)) == 2804
