import json
import math
import pickle
import shutil

import numpy as np
import pytest
import torch

from dense_folders import SIZE, SQUARE, coco_json, coco_mark, make_coco, make_voc, make_yolo, save, voc_xml, write
from image_folders import picture
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


def marks(*own, **more):
    return lambda root: make_coco(root, list(own), [], **more)


def changed(key, **change):
    def spoil(root):
        make_coco(root, [coco_mark(5)], [])
        content = json.loads((root / "instances_train.json").read_text())
        content[key][0].update(change)
        write(root / "instances_train.json", content)

    return spoil


def double_image(root):
    make_coco(root, [])
    content = coco_json([])
    write(root / "instances_train.json", {**content, "images": [content["images"][1]] * 2})


RUNS = "run lengths that do not add up to its image of 12x8 pixels"
WITH_MASK = coco_mark(9, image=2, segmentation=[SQUARE])
BAD_COCO = {
    "missing image": (changed("images", file_name="9.png"), r"9\.png, the image 1 of .*train\.json, is missing"),
    "absolute": (
        changed("images", file_name="/etc/9.png"),
        "image 1 of .* names the file '/etc/9.png', which is out",
    ),
    "climbing": (
        changed("images", file_name="a/../../9.png"),
        r"image 1 of .*, which is outside .*; name files below",
    ),
    "drive": (changed("images", file_name="C:\\9.png"), "image 1 of .*, which is outside"),
    "no name": (changed("images", file_name=None), "image 1 of .* names the file None, which is no name of a file"),
    "size": (changed("images", width="wide"), "image 1 of .* has width 'wide' and height 8; they must be numbers"),
    "no size": (changed("images", width=0), r"1\.png is said to have 0x8 pixels"),
    "too large": (changed("images", width=10**12), r"1\.png is said to have 1000000000000x8 pixels"),
    "outside": (
        marks(coco_mark(5, bbox=[2, 1, 13, 4])),
        r"annotation 5 of .*json has the box \[2, 1, 15, 5\], outside",
    ),
    "no area": (marks(coco_mark(5, bbox=[2, 1, 0, 4])), "annotation 5 of .* of no area"),
    "no area inside": (marks(coco_mark(5, bbox=[12, 1, 2, 4])), "annotation 5 of .* of no area"),
    "negative": (marks(coco_mark(5, bbox=[2, 1, -1, 4])), "annotation 5 of .* of no area"),
    "NaN": (marks(coco_mark(5, bbox=[2, math.nan, 4, 4])), "annotation 5 of .*, which is not finite"),
    "no box": (marks(coco_mark(5, bbox=[2, 1, 4])), r"annotation 5 of .* has the bbox \[2, 1, 4\]; it must be x, y"),
    "huge": (marks(coco_mark(5, bbox=[10**400, 1, 4, 4])), "annotation 5 of .* has the bbox"),
    "text": (marks(coco_mark(5, bbox=["a", 1, 4, 4])), "annotation 5 of .* has the bbox"),
    "category": (marks(coco_mark(5, category=4)), "annotation 5 of .* is of the category 4, which it does not list"),
    "twice": (marks(coco_mark(5), coco_mark(5)), "annotation 5 of .* is listed 2 times"),
    "image twice": (double_image, "image 2 of .* is listed 2 times"),
    "no mask": (
        marks(coco_mark(5), WITH_MASK),
        "annotation 5 of .* has no mask, but others have; mark a mask on all",
    ),
    "short": (
        marks(coco_mark(5, segmentation=[[1, 1, 2, 2]]), WITH_MASK),
        "annotation 5 of .* a polygon of 4 numbers",
    ),
    "odd": (marks(coco_mark(5, segmentation=[[*SQUARE, 1]]), WITH_MASK), "annotation 5 of .* a polygon of 9 numbers"),
    "far": (marks(coco_mark(5, segmentation=[[0, 0, 1e9, 0, 0, 8]]), WITH_MASK), "annotation 5 .* a polygon outside"),
    "NaN mask": (marks(coco_mark(5, segmentation=[[0, 0, 2, math.nan, 0, 8]]), WITH_MASK), "a polygon outside"),
    "mask of text": (marks(coco_mark(5, segmentation="mask"), WITH_MASK), "annotation 5 .* neither polygons nor run"),
    "mask of ids": (marks(coco_mark(5, segmentation=7), WITH_MASK), "annotation 5 of .* neither polygons nor run"),
    "no runs": (
        marks(coco_mark(5, segmentation={"size": [8, 12]}), WITH_MASK),
        "annotation 5 .* neither polygons nor",
    ),
    "runs": (marks(coco_mark(5, segmentation={"size": [8, 12], "counts": [3, 2]}), WITH_MASK), RUNS),
    "runs below 0": (marks(coco_mark(5, segmentation={"size": [8, 12], "counts": [97, -1]}), WITH_MASK), RUNS),
    "torn runs": (marks(coco_mark(5, segmentation={"size": [8, 12], "counts": "a1P"}), WITH_MASK), RUNS),
    "odd runs": (marks(coco_mark(5, segmentation={"size": [8, 12], "counts": "~~~"}), WITH_MASK), RUNS),
    "long runs": (marks(coco_mark(5, segmentation={"size": [8, 12], "counts": "o" * 20 + "0"}), WITH_MASK), RUNS),
    "size of mask": (
        marks(coco_mark(5, segmentation={"size": [12, 8], "counts": SQUARE_RUNS}), WITH_MASK),
        r"annotation 5 of .* has a mask of size \[12, 8\]; its image is 8 high and 12 wide",
    ),
}
BAD_YOLO = {
    "text": (lambda root: make_yolo(root, "cat 0.5 0.5 1 1"), r"1\.txt line 1 must be a class and numbers"),
    "columns": (lambda root: make_yolo(root, "\n0 0.5 0.5 1 1 0.9"), r"1\.txt line 1 has 6 columns; a class and 4"),
    "unknown": (
        lambda root: make_yolo(root, "2 0.5 0.5 1 1"),
        r"1\.txt line 1 is of class 2, which data\.yaml does no",
    ),
    "pixels": (lambda root: make_yolo(root, "1 6 4 12 8"), r"1\.txt line 1 has the box .*, outside its image"),
    "no area": (lambda root: make_yolo(root, "1 0.5 0.5 0 1"), r"1\.txt line 1 has the box .* of no area"),
    "NaN": (lambda root: make_yolo(root, "1 0.5 0.5 nan 1"), r"1\.txt line 1 has the box .* not finite"),
    "no image": (lambda root: write(make_yolo(root) / "images/train/1.png", "text"), r"cannot read image .*1\.png"),
    "mixed": (
        lambda root: make_yolo(root, "0 0 0 0.5 0 0.5 0.5\n1 0.5 0.5 1 1", ""),
        r"1\.txt line 2 has no mask, but others have",
    ),
}
BAD_VOC = {
    "torn": (lambda root: write(make_voc(root) / "Annotations/train_1.xml", "<annotation>"), r"cannot read .*1\.xml"),
    "no xml": (lambda root: (make_voc(root) / "Annotations/train_1.xml").unlink(), r"cannot read .*train_1\.xml"),
    "no image": (
        lambda root: (make_voc(root) / "JPEGImages/train_1.jpg").unlink(),
        r"train_1\.jpg, listed in .*train",
    ),
    "outside": (
        lambda root: make_voc(root, [("dog", False, (1, 1, 15, 8))]),
        r"object 1 of .*train_1\.xml .* outside",
    ),
    "no area": (
        lambda root: make_voc(root, [("dog", False, (3, 1, 2, 8))]),
        r"object 1 of .*train_1\.xml .* no area",
    ),
    "text": (lambda root: make_voc(root, [("dog", False, ("a", 1, 2, 8))]), r"cannot read .*train_1\.xml: .* 'a'"),
    "no name": (
        lambda root: make_voc(root, [("", False, (1, 1, 2, 8))]),
        r"object 1 of .*train_1\.xml has no name or",
    ),
}
BAD = {
    **{f"coco {name}": case for name, case in BAD_COCO.items()},
    **{f"yolo {name}": case for name, case in BAD_YOLO.items()},
    **{f"voc {name}": case for name, case in BAD_VOC.items()},
}


@pytest.mark.parametrize("case", BAD)
def test_bad_samples_are_refused_or_left_out(tmp_path, case):
    spoil, message = BAD[case]
    spoil(tmp_path)
    with pytest.raises(DataError, match=message) as refusal:
        open_detection(str(tmp_path))
    assert str(refusal.value).endswith("; mend or remove it, or pass --on-bad-sample skip")
    assert "\n" not in str(refusal.value)
    if case == "coco image twice":  # no image is left
        return
    data = open_detection(str(tmp_path), on_bad_sample="skip")
    assert len(data.train) == 1
    assert len(data.train.objects(0)) == (case.startswith("voc") or (case.startswith("coco") and data.has_masks))
    assert len(data.skipped) == 1
    assert data.skipped[0] in str(refusal.value)


def test_annotation_of_an_unknown_image(tmp_path):
    make_coco(tmp_path, [coco_mark(5), coco_mark(6, image=9)])
    with pytest.raises(DataError, match=r"annotation 6 of .*train\.json is of the image 9, which it does not list"):
        open_detection(str(tmp_path))
    data = open_detection(str(tmp_path), on_bad_sample="skip")
    assert len(data.train) == 2
    assert len(data.skipped) == 1


def test_class_without_training_object_in_voc(tmp_path):
    make_voc(tmp_path, test="eel")
    with pytest.raises(DataError, match=r"object 1 of .*val_1\.xml is of class 'eel', which no training image has"):
        open_detection(str(tmp_path))
    assert len(open_detection(str(tmp_path), on_bad_sample="skip").test) == 1


def test_image_of_another_size_than_stated_is_refused_when_read(tmp_path):
    save(make_coco(tmp_path) / "train" / "1.png", picture(1, (9, 9)))
    data = open_detection(str(tmp_path))
    with pytest.raises(DataError, match=r"1\.png \(image 1\) is 9x9 pixels, its marks are for 12x8"):
        data.train.open(0)
    path = tmp_path / "train" / "2.png"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"cannot read image .*2\.png: .*truncated"):
        data.train.open(1)


CAT = {"id": 3, "name": "cat"}
WHOLE_FILES = {
    "torn JSON": ("instances_train.json", '{"images": [', r"cannot read .*instances_train\.json: Expecting value"),
    "not UTF-8": ("instances_train.json", '"\udcff"', r"cannot read .*instances_train\.json"),
    "list": ("instances_train.json", [], r"instances_train\.json has no list 'images'; it must be COCO's JSON"),
    "no marks": ("instances_train.json", {"images": []}, r"instances_train\.json has no list 'annotations'"),
    "category twice": ("instances_train.json", coco_json([], categories=[CAT, CAT]), "has two categories 3"),
    "name twice": (
        "instances_train.json",
        coco_json([], categories=[CAT, {"id": 7, "name": "cat"}, {"id": 8, "name": "dog"}]),
        r"category 7 of .*val\.json is 'dog', but 'cat' in instances_train\.json; give both files the same",
    ),
    "no category": ("instances_train.json", coco_json([], categories=[{"name": "cat"}]), "must have a number 'id'"),
    "empty": ("instances_train.json", coco_json([], images=0), "the train part of .* has no image; add some"),
    "other names": (
        "instances_val.json",
        coco_json([], categories=[{"id": 3, "name": "eel"}]),
        r"category 3 of .*val\.json is 'eel', but 'cat' in instances_train\.json",
    ),
}


@pytest.mark.parametrize("case", WHOLE_FILES)
def test_bad_files_of_coco(tmp_path, case):
    name, content, message = WHOLE_FILES[case]
    make_coco(tmp_path)
    text = content if isinstance(content, str) else json.dumps(content)
    (tmp_path / name).write_bytes(text.encode(errors="surrogateescape"))
    for on_bad_sample in ("fail", "skip"):
        with pytest.raises(DataError, match=message):
            open_detection(str(tmp_path), on_bad_sample=on_bad_sample)


def test_duplicate_class_names(tmp_path):
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "cat"}]
    make_coco(tmp_path / "coco", categories=categories)
    make_yolo(tmp_path / "yolo", names=["cat", "cat"])
    for kind in ("coco", "yolo"):
        with pytest.raises(DataError, match="2 classes 'cat'; give each a name of its own"):
            open_detection(str(tmp_path / kind))


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ({"train": "/images/train"}, r"train of .*data\.yaml names the file '/images/train', which is outside"),
        ({"train": "../images/train"}, r"names the file '\.\./images/train', which is outside .*; name files below"),
        ({"path": "/home/someone/data"}, r"data\.yaml names the file '/home/someone/data', which is outside"),
        (
            {"train": "images/none"},
            r"images/none, train of .*data\.yaml, is neither a folder of images nor a text file",
        ),
        ({"val": None}, r"val of .*data\.yaml names the file None, which is no name of a file"),
        ({"names": None}, r"data\.yaml has no names; list the names of classes"),
        ({"names": [True, False]}, r"data\.yaml names class 0 True; write numbers and names, in quotes"),
        ({"nc": 3}, r"data\.yaml has nc=3 but 2 names; correct one of them"),
    ],
)
def test_bad_descriptions_of_yolo(tmp_path, described, message):
    with pytest.raises(DataError, match=message):
        open_detection(str(make_yolo(tmp_path, **described)))


def test_bad_files_of_yolo(tmp_path):
    make_yolo(tmp_path)
    write(tmp_path / "data.yaml", "names: [a\n")
    with pytest.raises(DataError, match=r"cannot read .*data\.yaml: while parsing"):
        open_detection(str(tmp_path))
    write(tmp_path / "data.yaml", "!!python/object/apply:os.getcwd []")
    with pytest.raises(DataError, match=r"cannot read .*data\.yaml: could not determine a constructor"):
        open_detection(str(tmp_path))
    write(tmp_path / "data.yaml", "text")
    with pytest.raises(DataError, match=r"data\.yaml must map 'names', 'train' and 'val'"):
        open_detection(str(tmp_path))
    shutil.rmtree(make_yolo(tmp_path) / "labels")
    with pytest.raises(
        DataError, match=r"no image has labels, the first none in .*labels/train/1\.txt; put them there"
    ):
        open_detection(str(tmp_path))


def test_nothing_to_read(tmp_path):
    with pytest.raises(DataError, match="'nowhere' is neither scenes nor a folder; give the path of one"):
        open_detection("nowhere")
    with pytest.raises(DataError, match=r"neither COCO's instances_train\.json.*YOLO's data\.yaml, nor Pascal VOC's"):
        open_detection(str(tmp_path))
    make_coco(tmp_path)
    with pytest.raises(ValueError, match="on_bad_sample='drop' must be one of fail, skip"):
        open_detection(str(tmp_path), on_bad_sample="drop")
    shutil.rmtree(tmp_path / "val")
    with pytest.raises(DataError, match=r"val, the folder of images of instances_val\.json, is missing"):
        open_detection(str(tmp_path))
    (tmp_path / "instances_val.json").unlink()
    with pytest.raises(DataError, match=r"instances_val\.json is missing in .* and its folder annotations; add it"):
        open_detection(str(tmp_path))


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
