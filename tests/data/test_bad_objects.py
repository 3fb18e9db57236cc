import json
import math
import shutil

import pytest

from dense_folders import SQUARE, coco_json, coco_mark, make_coco, make_voc, make_yolo, save, write
from image_folders import picture
from statickey.data import open_detection
from statickey.errors import DataError

SQUARE_RUNS = [17, 4, 4, 4, 4, 4, 4, 4, 51]


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
