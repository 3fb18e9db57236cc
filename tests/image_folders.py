"""Tiny data sets of every kind that a folder can hold."""

import io
import tarfile

import datasets
import numpy as np
from PIL import Image


def picture(value, size=(8, 8)):
    return Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8))


def make_folder(root, train=("a", "b"), val=("a", "b"), per_class=3, size=(8, 8)):
    for split, names in (("train", train), ("val", val)):
        for number, name in enumerate(names):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                picture(40 * number + i, size).save(folder / f"{i}.png")
    return root


def make_parquet(root, labels=(0, 1, 2, 1), broken=()):
    def cell(i):
        file = io.BytesIO()
        picture(10 * i).save(file, "PNG")
        return {"bytes": b"not an image" if i in broken else file.getvalue(), "path": f"{i}.png"}

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "eel"])}
    )
    part = datasets.Dataset.from_dict(
        {"image": [cell(i) for i in range(len(labels))], "label": list(labels)}, features=features
    )
    root.mkdir(exist_ok=True)
    part.to_parquet(root / "train-00000-of-00001.parquet")
    part.to_parquet(root / "test.parquet")
    return root


def png(value, size=(8, 8)):
    file = io.BytesIO()
    picture(value, size).save(file, "PNG")
    return file.getvalue()


def make_shard(path, files):
    with tarfile.open(path, "w") as shard:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    return path


def make_shards(root, labels=(0, 1, 2, 1), size=(8, 8), test="val"):
    for split in ("train", test):
        for number, part in enumerate((labels[:2], labels[2:])):
            files = {}
            for i, label in enumerate(part, 2 * number):
                files |= {f"{i:03}.cls": str(label).encode(), f"{i:03}.json": b"{}", f"{i:03}.png": png(10 * i, size)}
            make_shard(root / f"{split}-{number}.tar", files)
    return root
