import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from image_folders import make_parquet, png
from statickey.data import load_images
from statickey.data.sources import open_sources
from statickey.errors import DataError

FORMS = {
    "bytes": lambda: [png(10), png(20), png(30), png(40)],
    "struct": lambda: [{"bytes": png(10 * i), "path": f"{i}.png"} for i in range(1, 5)],
    "bytes alone": lambda: [{"bytes": png(10 * i)} for i in range(1, 5)],
}


def write(root, labels, test=None, images=None, name="label", **others):
    root.mkdir(exist_ok=True)
    cells = FORMS["bytes"]() if images is None else images
    for split, values in (("train", labels), ("test", labels if test is None else test)):
        columns = {"image": cells[: len(values)], name: values} | {k: v[: len(values)] for k, v in others.items()}
        pq.write_table(pa.table(columns), root / f"{split}.parquet")
    return root


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mapped", [False, True])
def test_parquet_of_no_library(tmp_path, monkeypatch, form, mapped):
    if mapped:
        monkeypatch.setattr("statickey.data.tables._IN_MEMORY_BYTES", 0)
    root = write(tmp_path / "data", ["dog", "cat", "eel", "cat"], ["eel", "dog", "cat"], FORMS[form]())
    sources = open_sources(str(root), tmp_path / "cache")
    assert sources.class_names == ("cat", "dog", "eel")
    assert list(sources.train.labels) == [1, 0, 2, 0]
    assert list(sources.test.labels) == [2, 1, 0]
    assert [np.asarray(sources.train.open(i))[0, 0, 0] for i in range(4)] == [10, 20, 30, 40]
    assert sources.train.describe(1) == f"{root} train row 1" + (" (2.png)" if form == "struct" else "")


def test_cells_that_name_files_of_the_folder(tmp_path):
    root = tmp_path / "data"
    (root / "pictures").mkdir(parents=True)
    (root / "pictures/0.png").write_bytes(png(70))
    cells = [{"bytes": None, "path": "pictures/0.png"}, *FORMS["struct"]()[1:]]
    sources = open_sources(str(write(root, [0, 1, 1, 0], images=cells)))
    assert np.asarray(sources.train.open(0))[0, 0, 0] == 70


@pytest.mark.parametrize("written", ["../secret.png", "{tmp}/secret.png"])
def test_cells_that_name_files_elsewhere_are_not_opened(tmp_path, written):
    root = tmp_path / "data"
    root.mkdir()
    (tmp_path / "secret.png").write_bytes(png(70))
    cells = [{"bytes": None, "path": written.format(tmp=tmp_path)}, *FORMS["struct"]()[1:]]
    with pytest.raises(DataError, match=r"train row 0 .*: the cell names the file .*secret.png', which is outside"):
        load_images(str(write(root, [0, 1, 1, 0], images=cells)))


INTEGERS = {
    "from 0": ([2, 0, 1, 1], ("0", "1", "2"), [2, 0, 1, 1]),
    "from 1 with a gap": ([1, 4, 2, 1], ("1", "2", "4"), [0, 2, 1, 0]),
    "past ten": ([10, 2, 1, 2], ("1", "2", "10"), [2, 1, 0, 1]),
    "yes or no": ([True, False, True, True], ("False", "True"), [1, 0, 1, 1]),
    "small type": (pa.array([3, 1, 1, 3], pa.uint8()), ("1", "3"), [1, 0, 0, 1]),
}


@pytest.mark.parametrize("case", INTEGERS)
def test_classes_are_the_sorted_values(tmp_path, case):
    labels, names, numbers = INTEGERS[case]
    data = load_images(str(write(tmp_path, labels)))
    assert data.class_names == names
    assert data.train.labels.tolist() == numbers


def test_the_columns_called_image_and_label_of_several(tmp_path):
    others = {"id": [7, 8, 9, 10], "thumbnail": FORMS["bytes"](), "note": ["x"] * 4}
    assert open_sources(str(write(tmp_path, [0, 1, 1, 0], **others))).class_names == ("0", "1")
    with pytest.raises(
        DataError, match=r"needs one column of images .* called image and label where there are several"
    ):
        open_sources(str(write(tmp_path, [0, 1, 1, 0], name="kind", **others)))


def test_a_folder_of_parts_under_the_name_of_a_file(tmp_path):
    write(tmp_path / "written", [0, 1, 1, 0])
    for split in ("train", "test"):
        (tmp_path / f"data/{split}.parquet").mkdir(parents=True)
        for i in range(2):
            part = tmp_path / f"data/{split}.parquet/part-{i}.snappy"
            part.write_bytes((tmp_path / f"written/{split}.parquet").read_bytes())
    assert len(open_sources(str(tmp_path / "data")).train) == 8


def with_metadata(root, metadata):
    for path in root.glob("*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata({"huggingface": metadata}), path)


def features(**label):
    kinds = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel"} | label}
    return json.dumps({"info": {"features": kinds}})


METADATA = {
    "broken": ("{nope", "the metadata of .*.parquet cannot be read .*; write the file anew, or without metadata"),
    "another form": ("[]", "the metadata of .*.parquet cannot be read"),
    "unknown type": (
        json.dumps({"info": {"features": {"image": {"_type": "No"}}}}),
        "the metadata of .*'No' not found",
    ),
    "duplicate names": (features(names=["a", "a"]), "the metadata of .* label names are duplicated"),
    "no names": (features(), "the metadata of .* names"),
    "empty names": (features(names=[]), "has a ClassLabel column 'label' without class names; write them"),
}


@pytest.mark.parametrize("case", METADATA)
def test_metadata_that_cannot_be_read_is_one_line(tmp_path, case):
    metadata, message = METADATA[case]
    with_metadata(write(tmp_path, [0, 1, 1, 0], images=FORMS["struct"]()), metadata)
    with pytest.raises(DataError, match=message) as refusal:
        open_sources(str(tmp_path))
    assert "\n" not in str(refusal.value)


def test_class_names_beside_plain_bytes(tmp_path):
    with_metadata(write(tmp_path, [0, 1, 1, 0]), features(names=["cat", "dog"]))
    assert load_images(str(tmp_path)).class_names == ("cat", "dog")


LABELS = {
    "numbers as text": (["0", "1", "1", "0"], None, "train has labels as text, such as '0'; write them as integers"),
    "nothing": ([None] * 4, None, "needs one column of images|train has no labels"),
    "a null": ([0, None, 1, 0], None, "train row 1 has label None, which is not among the 2 classes of train"),
    "a null in test": ([0, 1, 1, 0], [0, None], "test row 1 has label None"),
    "no label by number": ([0, -1, 1, 0], None, "train row 1 has label -1, which is not among the 2 classes"),
    "new in test": (["a", "b", "b", "a"], ["a", "c"], "test row 1 has label 'c', which is not among the 2 classes"),
    "fractions": ([0.0, 1.0, 1.0, 0.0], None, "needs one column of images .* and one of labels"),
    "other kind in test": ([0, 1, 1, 0], ["a", "b"], "test row 0 has label 'a'"),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels_that_name_no_class_are_one_line(tmp_path, case):
    labels, test, message = LABELS[case]
    with pytest.raises(DataError, match=message) as refusal:
        open_sources(str(write(tmp_path, labels, test)))
    assert "\n" not in str(refusal.value)


def test_numbers_as_text_for_named_classes(tmp_path):
    with_metadata(write(tmp_path, ["0", "1"], images=FORMS["struct"]()), features(names=["cat", "dog"]))
    with pytest.raises(DataError, match="labels as text, such as '0'; write them as integers"):
        open_sources(str(tmp_path))


def test_null_among_named_classes(tmp_path):
    with pytest.raises(DataError, match=r"row 1 \(1.png\) has label None, outside the 3 classes"):
        load_images(str(make_parquet(tmp_path, labels=(0, None, 1))))


def test_names_on_one_side_only(tmp_path):
    make_parquet(tmp_path)
    pq.write_table(pq.read_table(tmp_path / "test.parquet").replace_schema_metadata(None), tmp_path / "test.parquet")
    with pytest.raises(DataError, match=r"class names in .* differ: \['cat', 'dog', 'eel'\] in train, None in test"):
        open_sources(str(tmp_path))


def test_two_columns_of_one_name(tmp_path):
    table = pa.Table.from_arrays(
        [pa.array([png(1)]), pa.array([0]), pa.array([1])], names=["image", "label", "label"]
    )
    for split in ("train", "test"):
        pq.write_table(table, tmp_path / f"{split}.parquet")
    with pytest.raises(DataError, match=r"cannot read .*train.parquet: .*label") as refusal:
        open_sources(str(tmp_path))
    assert "\n" not in str(refusal.value)
