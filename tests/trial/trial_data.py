"""Cases of data folders and image files that are damaged."""

import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from trial_options import Case, Verdict
from trial_stock import MODEL, Stock

from image_folders import make_shard, picture, png

RUN = ("--epochs", "1", "--batch-size", "4", "--holdout", "0.3", "--model-args", MODEL, "--accelerator", "cpu")
Damage = Callable[[Path], object]


def _encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _of_mode(mode: str) -> Image.Image:
    return picture(90).convert(mode)


GRADIENT = np.arange(64).reshape(8, 8)
IMAGES: dict[str, tuple[Verdict, bytes]] = {
    "empty": ("refused", b""),
    "text": ("refused", b"not an image"),
    "half a png": ("refused", png(9)[: len(png(9)) // 2]),
    "png header": ("refused", png(9)[:12]),
    "zeros": ("refused", bytes(2000)),
    "html": ("refused", b"<!doctype html><title>404</title>"),
    "half a jpeg": ("refused", _encoded(picture(9, (64, 64)), "JPEG")[:200]),
    "other size": ("refused", png(9, (9, 9))),
    "oblong": ("refused", png(9, (8, 9))),
    "very oblong": ("refused", _encoded(picture(0, (1, 3000)))),
    "bmp of strange header": ("refused", b"BM" + bytes(60)),
    "tiff of strange header": ("refused", b"II*\0" + bytes(60)),
    "gif of strange header": ("refused", b"GIF89a" + bytes(60)),
    "webp of strange header": ("refused", b"RIFF\x20\0\0\0WEBPVP8 " + bytes(60)),
    "ppm without pixels": ("refused", b"P6 8 8 255\n"),
    "ppm of words": ("refused", b"P6 eight 8 255\n"),
    "bomb": ("refused", b"P5 100000 100000 255\n" + bytes(100)),
    "16 bits": ("ran", _encoded(Image.fromarray((GRADIENT * 1000).astype(np.uint16)))),
    "32 bits": ("ran", _encoded(Image.fromarray(GRADIENT.astype(np.int32)), "TIFF")),
    "32 bits out of range": ("refused", _encoded(Image.fromarray(GRADIENT.astype(np.int32) - 10**6), "TIFF")),
    "floats": ("ran", _encoded(Image.fromarray((GRADIENT / 64).astype(np.float32)), "TIFF")),
    "floats out of range": ("refused", _encoded(Image.fromarray((GRADIENT * 1e9).astype(np.float32)), "TIFF")),
    "nan": ("refused", _encoded(Image.fromarray(np.full((8, 8), np.nan, np.float32)), "TIFF")),
    "cmyk": ("ran", _encoded(_of_mode("CMYK"), "JPEG")),
    "palette": ("ran", _encoded(_of_mode("P"))),
    "palette with transparency": ("ran", _encoded(_of_mode("P"), transparency=0)),
    "transparent": ("ran", _encoded(_of_mode("RGBA"))),
    "grey and alpha": ("ran", _encoded(_of_mode("LA"))),
    "one bit": ("ran", _encoded(_of_mode("1"))),
    "lab": ("either", _encoded(Image.new("LAB", (8, 8)), "TIFF")),
    "hsv": ("ran", _encoded(_of_mode("YCbCr"), "JPEG")),
    "animated": ("ran", _encoded(_of_mode("P"), "GIF", save_all=True, append_images=[_of_mode("P")])),
    "strange exif": ("either", _encoded(picture(5), "JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 40)),
}
"""Bytes in place of an image of 8 x 8 pixels."""


def _image(content: bytes) -> Damage:
    return lambda root: (root / "train/a/1.png").write_bytes(content)


def _empty(path: str) -> Damage:
    def empty(root: Path) -> None:
        shutil.rmtree(root / path)
        (root / path).mkdir()

    return empty


def _without(path: str) -> Damage:
    return lambda root: shutil.rmtree(root / path)


def _only(*names: str) -> Damage:
    """Only these classes, in both parts."""

    def keep(root: Path) -> None:
        for folder in [*root.glob("*/*")]:
            if folder.name not in names:
                shutil.rmtree(folder)

    return keep


def _renamed(before: str, after: str) -> Damage:
    return lambda root: (root / before).rename(root / after)


def _pipe(path: str) -> Damage:
    return lambda root: os.mkfifo(root / path)


def _link(path: str, to: str) -> Damage:
    return lambda root: (root / path).symlink_to(to)


def _file(path: str, content: bytes = b"") -> Damage:
    return lambda root: (root / path).write_bytes(content)


FOLDERS: dict[str, tuple[Verdict, Damage]] = {
    "whole": ("ran", lambda root: None),
    "no train": ("refused", _without("train")),
    "no val": ("refused", _without("val")),
    "train empty": ("refused", _empty("train")),
    "val empty": ("refused", _empty("val")),
    "class empty": ("refused", _empty("train/a")),
    "class empty in val": ("refused", _empty("val/a")),
    "class only in val": ("refused", _without("train/a")),
    "class missing in val": ("ran", _without("val/a")),
    "one class": ("refused", _only("a")),
    "hidden file": ("ran", _file("train/a/.hidden.png", b"x")),
    "hidden class": ("ran", lambda root: (root / "train/.cache").mkdir()),
    "apple double": ("ran", _file("train/a/._1.png", b"x")),
    "text beside": ("ran", _file("train/a/readme.txt", b"x")),
    "pipe": ("refused", _pipe("train/a/p.png")),
    "pipe in val": ("refused", _pipe("val/a/p.png")),
    "pipe as class": ("ran", _pipe("train/p")),
    "pipe as parquet": ("refused", _pipe("train.parquet")),
    "pipe as train": ("refused", lambda root: (_without("train")(root), os.mkfifo(root / "train"))),
    "dangling link": ("refused", _link("train/a/l.png", "nowhere")),
    "link to itself": ("refused", _link("train/a/l.png", "l.png")),
    "link to a device": ("refused", _link("train/a/l.png", "/dev/zero")),
    "folder named as an image": ("ran", lambda root: (root / "train/a/f.png").mkdir()),
    "file in place of train": ("refused", lambda root: (_without("train")(root), _file("train")(root))),
    "file in place of a class": ("refused", lambda root: (_without("train/a")(root), _file("train/a")(root))),
    "images without classes": ("refused", lambda root: (_empty("train")(root), _file("train/1.png", png(1))(root))),
    "a stray parquet": ("refused", _file("x.parquet", b"PAR1")),
    "test instead of val": ("ran", _renamed("val", "test")),
    "unicode class": (
        "ran",
        lambda root: (_renamed("train/a", "train/ü [b]")(root), _renamed("val/a", "val/ü [b]")(root)),
    ),
    "class with a line break": (
        "ran",
        lambda root: (_renamed("train/a", "train/a\nb")(root), _renamed("val/a", "val/a\nb")(root)),
    ),
    "class not in utf-8": (
        "either",
        lambda root: (_renamed("train/a", "train/\udcff")(root), _renamed("val/a", "val/\udcff")(root)),
    ),
    "single image": ("ran", lambda root: [path.unlink() for path in root.glob("train/*/[12].png")]),
    **{f"image {kind}": (verdict, _image(content)) for kind, (verdict, content) in IMAGES.items()},
}
SKIPPING = {
    kind: "ran" if verdict == "refused" and "other size" not in kind and kind != "oblong" else verdict
    for kind, (verdict, _) in IMAGES.items()
}


def _table(columns: dict[str, object], metadata: bytes | None = None) -> bytes:
    table = pa.table(columns)
    table = table.replace_schema_metadata(None if metadata is None else {b"huggingface": metadata})
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


CELLS = [{"bytes": png(10 * i), "path": f"{i}.png"} for i in range(8)]
BYTES = [png(10 * i) for i in range(8)]
LABELS = [0, 1, 0, 1, 0, 1, 0, 1]


def _metadata(names: object = ("a", "b"), **features: object) -> bytes:
    label = {"_type": "ClassLabel", "names": names if not isinstance(names, tuple) else list(names)}
    return json.dumps({"info": {"features": {"image": {"_type": "Image"}, "label": label} | features}}).encode()


def _both(content: bytes) -> Damage:
    def write(root: Path) -> None:
        root.mkdir()
        (root / "train.parquet").write_bytes(content)
        (root / "test.parquet").write_bytes(content)

    return write


def _labelled(labels: object) -> bytes:
    return _table({"image": BYTES, "label": labels})


TABLES: dict[str, tuple[Verdict, bytes]] = {
    "whole": ("ran", _table({"image": CELLS, "label": LABELS}, _metadata())),
    "no metadata": ("ran", _table({"image": CELLS, "label": LABELS})),
    "bytes": ("ran", _labelled(LABELS)),
    "torn": ("refused", _labelled(LABELS)[:-30]),
    "beginning alone": ("refused", _labelled(LABELS)[:20]),
    "text": ("refused", b"not parquet"),
    "empty file": ("refused", b""),
    "no rows": ("refused", _table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())})),
    "no columns": ("refused", _table({})),
    "no image column": ("refused", _table({"label": LABELS})),
    "no label column": ("refused", _table({"image": BYTES})),
    "two label columns": ("refused", _table({"image": BYTES, "x": LABELS, "y": LABELS})),
    "metadata not json": ("refused", _table({"image": CELLS, "label": LABELS}, b"{broken")),
    "metadata a list": ("refused", _table({"image": CELLS, "label": LABELS}, b"[1, 2]")),
    "metadata a number": ("refused", _table({"image": CELLS, "label": LABELS}, b"3")),
    "metadata null": ("either", _table({"image": CELLS, "label": LABELS}, b"null")),
    "metadata empty": ("either", _table({"image": CELLS, "label": LABELS}, b"{}")),
    "metadata not utf-8": ("refused", _table({"image": CELLS, "label": LABELS}, b"\xff\xfe")),
    "info a list": ("refused", _table({"image": CELLS, "label": LABELS}, b'{"info": []}')),
    "info null": ("either", _table({"image": CELLS, "label": LABELS}, b'{"info": null}')),
    "features a list": ("refused", _table({"image": CELLS, "label": LABELS}, b'{"info": {"features": [1]}}')),
    "features null": ("either", _table({"image": CELLS, "label": LABELS}, b'{"info": {"features": null}}')),
    "unknown feature": ("refused", _table({"image": CELLS, "label": LABELS}, _metadata(image={"_type": "Pic"}))),
    "feature a number": ("refused", _table({"image": CELLS, "label": LABELS}, _metadata(image=3))),
    "feature of another column": (
        "ran",
        _table({"image": CELLS, "label": LABELS}, _metadata(more={"_type": "Image"})),
    ),
    "image said to be text": (
        "either",
        _table({"image": CELLS, "label": LABELS}, _metadata(image={"_type": "Value", "dtype": "string"})),
    ),
    "duplicate class names": ("refused", _table({"image": CELLS, "label": LABELS}, _metadata(("a", "a")))),
    "no class names": ("refused", _table({"image": CELLS, "label": LABELS}, _metadata(()))),
    "class names null": ("refused", _table({"image": CELLS, "label": LABELS}, _metadata(None))),
    "class names a text": ("refused", _table({"image": CELLS, "label": LABELS}, _metadata("ab"))),
    "class names numbers": ("refused", _table({"image": CELLS, "label": LABELS}, _metadata((1, 2)))),
    "class names of null": ("refused", _table({"image": CELLS, "label": LABELS}, _metadata((None, "b")))),
    "class names a dict": ("refused", _table({"image": CELLS, "label": LABELS}, _metadata({"a": 1}))),
    "one class name": ("refused", _table({"image": CELLS, "label": LABELS}, _metadata(("a",)))),
    "more class names": ("ran", _table({"image": CELLS, "label": LABELS}, _metadata(("a", "b", "c")))),
    "labels too high": ("refused", _table({"image": CELLS, "label": [7] * 8}, _metadata())),
    "labels held back": ("refused", _table({"image": CELLS, "label": [-1] * 8}, _metadata())),
    "label null": ("refused", _labelled([None, *LABELS[1:]])),
    "label null in classes": ("refused", _table({"image": CELLS, "label": [None, *LABELS[1:]]}, _metadata())),
    "labels all null": ("refused", _labelled([None] * 8)),
    "labels one value": ("refused", _labelled([4] * 8)),
    "labels fractions": ("refused", _labelled([float(label) for label in LABELS])),
    "labels text": ("ran", _labelled(["cat", "dog"] * 4)),
    "labels digits as text": ("refused", _labelled(["0", "1"] * 4)),
    "labels empty text": ("either", _labelled(["", "dog"] * 4)),
    "labels bool": ("ran", _labelled([True, False] * 4)),
    "labels lists": ("refused", _labelled([[0], [1]] * 4)),
    "labels structs": ("refused", _labelled([{"a": 1}] * 8)),
    "labels bytes": ("refused", _labelled([b"a", b"b"] * 4)),
    "labels dates": ("refused", _labelled(pa.array([0, 1] * 4, pa.date32()))),
    "labels large": ("ran", _labelled(pa.array([0, 2**63] * 4, pa.uint64()))),
    "labels below zero": ("either", _labelled([-2, -1] * 4)),
    "labels in a dictionary": ("either", _labelled(pa.array(["cat", "dog"] * 4).dictionary_encode())),
    "image null": ("refused", _table({"image": [None, *BYTES[1:]], "label": LABELS})),
    "images all null": ("refused", _table({"image": pa.array([None] * 8, pa.binary()), "label": LABELS})),
    "image bytes null": (
        "refused",
        _table({"image": [{"bytes": None, "path": None}, *CELLS[1:]], "label": LABELS}, _metadata()),
    ),
    "image path missing": (
        "refused",
        _table({"image": [{"bytes": None, "path": "nowhere.png"}, *CELLS[1:]], "label": LABELS}, _metadata()),
    ),
    "image broken": ("refused", _table({"image": [b"no", *BYTES[1:]], "label": LABELS})),
    "images numbers": ("refused", _table({"image": LABELS, "label": LABELS})),
    "images lists": ("refused", _table({"image": [[1, 2]] * 8, "label": LABELS})),
    "images of several sizes": ("refused", _table({"image": [png(1, (9, 9)), *BYTES[1:]], "label": LABELS})),
}


def _replaced(name: str, content: Callable[[bytes], bytes]) -> Damage:
    return lambda root: (root / name).write_bytes(content((root / name).read_bytes()))


def _shard(files: dict[str, bytes]) -> Damage:
    return lambda root: make_shard(root / "train-0.tar", files)


SHARDS: dict[str, tuple[Verdict, Damage]] = {
    "whole": ("ran", lambda root: None),
    "hole": ("refused", lambda root: (root / "train-1.tar").rename(root / "train-2.tar")),
    "torn": ("refused", _replaced("train-0.tar", lambda old: old[: len(old) // 2])),
    "torn in a header": ("refused", _replaced("train-0.tar", lambda old: old[:700])),
    "torn at the end": ("refused", _replaced("train-0.tar", lambda old: old.rstrip(b"\0"))),
    "empty file": ("refused", _replaced("train-0.tar", lambda old: b"")),
    "zeros": ("either", _replaced("train-0.tar", lambda old: bytes(10240))),
    "text": ("refused", _replaced("train-0.tar", lambda old: b"not a tar file" * 100)),
    "gzip": ("refused", _replaced("train-0.tar", lambda old: b"\x1f\x8b" + old)),
    "flipped header": ("refused", _replaced("train-0.tar", lambda old: b"\xff" * 100 + old[100:])),
    "size of nonsense": ("refused", _replaced("train-0.tar", lambda old: old[:124] + b"zzzzzzzzzzz\0" + old[136:])),
    "no train": ("refused", lambda root: [path.unlink() for path in root.glob("train*")]),
    "no val": ("refused", lambda root: [path.unlink() for path in root.glob("val*")]),
    "no class file": ("refused", _shard({"a.png": png(1)})),
    "no image": ("refused", _shard({"a.cls": b"1"})),
    "two images": ("refused", _shard({"a.png": png(1), "a.jpg": png(1), "a.cls": b"0"})),
    "two images of one kind": ("refused", _shard({"a.png": png(1), "A.PNG": png(1), "a.cls": b"0"})),
    "class a word": ("refused", _shard({"a.png": png(1), "a.cls": b"cat"})),
    "class empty": ("refused", _shard({"a.png": png(1), "a.cls": b""})),
    "class not utf-8": ("refused", _shard({"a.png": png(1), "a.cls": b"\xff"})),
    "class negative": ("refused", _shard({"a.png": png(1), "a.cls": b"-1"})),
    "class huge": ("refused", _shard({"a.png": png(1), "a.cls": b"9" * 23})),
    "class of billions": ("refused", _shard({"a.png": png(1), "a.cls": b"999999999999"})),
    "class of many digits": ("refused", _shard({"a.png": png(1), "a.cls": b"9" * 5000})),
    "class a fraction": ("refused", _shard({"a.png": png(1), "a.cls": b"1.5"})),
    "image broken": ("refused", _shard({"a.png": b"no", "a.cls": b"0"})),
    "image empty": ("refused", _shard({"a.png": b"", "a.cls": b"0"})),
    "other size": ("refused", _shard({"a.png": png(1, (9, 9)), "a.cls": b"0"})),
    "other files": ("ran", _shard({"a.png": png(1), "a.cls": b"0", "notes.txt": b"x", "folder/.x": b"x"})),
    "class names too few": ("refused", _file("classes.txt", b"cat\n")),
    "class names right": ("ran", _file("classes.txt", b"cat\ndog\neel\n")),
    "class names twice": ("refused", _file("classes.txt", b"cat\ncat\neel\n")),
    "class names not utf-8": ("refused", _file("classes.txt", b"\xff\xfe\ndog\neel")),
    "class names empty": ("refused", _file("classes.txt", b"")),
    "class names a folder": ("either", lambda root: (root / "classes.txt").mkdir()),
    "a pipe": ("refused", _pipe("train-2.tar")),
    "a folder": ("refused", lambda root: (root / "train-2.tar").mkdir()),
    "dangling": ("refused", _link("train-2.tar", "nowhere")),
    "hidden": ("ran", _file(".train-9.tar", b"x")),
}


def data_cases() -> Iterator[Case]:
    """Every damage, read into memory and as a stream, in training, comparing and evaluating."""
    rng = random.Random(1)
    for kind, (verdict, damage) in FOLDERS.items():
        yield _data_case(f"folder {kind}", "folder", damage, verdict, RUN)
        if kind.startswith("image "):
            name = kind.removeprefix("image ")
            words = (*RUN, "--on-bad-image", "skip")
            yield _data_case(f"folder {kind}, skipping", "folder", damage, SKIPPING[name], words)
            yield _data_case(f"folder {kind}, resized", "folder", damage, _resized(name), (*RUN, "--img-size", "8"))
            stream = (*RUN, "--stream", "true", "--img-size", "8")
            yield _data_case(f"folder {kind}, streamed", "folder", damage, _resized(name), stream, begins=True)
    for kind, (verdict, content) in TABLES.items():
        yield _data_case(f"parquet {kind}", None, _both(content), verdict, RUN)
    for kind, (verdict, damage) in SHARDS.items():
        yield _data_case(f"shards {kind}", "shards", damage, verdict, RUN)
    streamed = [("folder", k, v, d) for k, (v, d) in FOLDERS.items() if not k.startswith("image ")]
    streamed += [("parquet", k, v, _both(c)) for k, (v, c) in TABLES.items()]
    streamed += [("shards", k, v, d) for k, (v, d) in SHARDS.items()]
    for stock, kind, verdict, damage in streamed:
        allowed: Verdict = "either" if "size" in kind else verdict
        words = (*RUN, "--stream", "true", "--img-size", "8")
        yield _data_case(
            f"{stock} {kind}, streamed", None if stock == "parquet" else stock, damage, allowed, words, begins=True
        )
    for stock, kind, verdict, damage in rng.sample(streamed, 60):
        place = None if stock == "parquet" else stock
        words = ("compare", "--data", "data", *RUN, "--mixers", "ska", "--seeds", "0")
        yield Case(f"compare {stock} {kind}", words, verdict, ("data",), _laid(place, damage))
        # the stored run knows digits, so no other data can be right
        yield Case(
            f"evaluate {stock} {kind}",
            ("evaluate", "{run}", "--data", "data"),
            "refused",
            ("data",),
            _laid(place, damage),
        )
    for kind, (_, content) in IMAGES.items():
        says = ("picture.png",)
        single: Verdict = _resized(kind)
        prepare = _writes("picture.png", content)
        yield Case(
            f"predict {kind}", ("predict", "{run}", "picture.png", "--accelerator", "cpu"), single, says, prepare
        )
        words = ("predict", "{run}", "picture.png", "image.png", "--out", "p.csv", "--accelerator", "cpu")
        yield Case(f"predict {kind} among others", words, "ran", says, prepare)
    for word in ("folder", "*.nope", "nowhere.png", "p", "/dev/zero", "/dev/null", "", "[", "**", "~", "binary.bin"):
        yield Case(
            f"predict file {word!r}",
            ("predict", "{run}", word, "--accelerator", "cpu"),
            "either",
            (word, "image"),
            _with_pipe,
        )
    for data in (
        "hf:",
        "hf: ",
        "hf:/",
        "hf:a/b/c/d",
        "hf:nowhere-at-all",
        "hf:folder",
        "cifar10x",
        "CIFAR10",
        "image.png",
        ".",
        "..",
        "/",
        "/dev/null",
    ):
        words = ("train", "--data", data, *RUN)
        yield Case(f"data {data!r}", words, "refused", (data, repr(data), "."), quick=data.startswith("hf:"))


def _resized(kind: str) -> Verdict:
    return "ran" if kind in ("other size", "oblong") else IMAGES[kind][0]


def _data_case(
    name: str, stock: str | None, damage: Damage, verdict: Verdict, words: tuple[str, ...], begins: bool = False
) -> Case:
    return Case(name, ("train", "--data", "data", *words), verdict, ("data",), _laid(stock, damage), begins)


def _laid(name: str | None, damage: Damage) -> Callable[[Path, Stock], None]:
    def lay(folder: Path, stock: Stock) -> None:
        if name is not None:
            stock.copy(name, folder / "data")
        damage(folder / "data")

    return lay


def _with_pipe(folder: Path, stock: Stock) -> None:
    os.mkfifo(folder / "p")


def _writes(name: str, content: bytes) -> Callable[[Path, Stock], None]:
    return lambda folder, stock: (folder / name).write_bytes(content)  # type: ignore[return-value]
