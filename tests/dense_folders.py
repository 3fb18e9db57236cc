"""Tiny data sets with objects or masks, of every layout that a folder can have."""

import json

import numpy as np
from PIL import Image

from image_folders import picture

SIZE = (12, 8)  # width, height
SQUARE = [2, 1, 6, 1, 6, 5, 2, 5]  # corners (2, 1) and (6, 5)
VOC_OBJECT = "<object><name>{}</name><difficult>{}</difficult><bndbox>{}</bndbox></object>"


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return path


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def mask_image(square=1, background=0, size=SIZE, mode="L"):
    pixels = np.full((size[1], size[0]), background, np.uint8)
    pixels[1:5, 2:6] = square
    image = Image.fromarray(pixels)
    if mode == "P":
        image.putpalette(list(range(256)) * 3)
    return image if mode == "P" else image.convert(mode)


def make_masks(root, splits=("train", "val"), masks="masks", count=2, classes=("sky", "sea"), **kind):
    for split in splits:
        for i in range(count):
            save(root / "images" / split / f"{i}.jpg", picture(10 * i, SIZE))
            save(root / masks / split / f"{i}.png", mask_image(**kind))
    if classes is not None:
        write(root / "classes.json", classes)
    return root


def coco_mark(number, image=1, category=3, bbox=(2, 1, 4, 4), **more):
    mark = {"id": number, "image_id": image, "category_id": category, "bbox": list(bbox), "iscrowd": 0}
    return {**mark, **more}


def coco_json(marks, images=2, **more):
    width, height = SIZE
    listed = [{"id": i, "file_name": f"{i}.png", "width": width, "height": height} for i in range(1, images + 1)]
    categories = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
    return {"images": listed, "annotations": marks, "categories": categories, **more}


def make_coco(root, marks=None, test=None, images="{}", jsons="instances_{}.json", splits=("train", "val"), **more):
    """Two images a split; the first has a cat, or these marks."""
    for split, own in zip(splits, (marks, test), strict=True):
        for i in (1, 2):
            save(root / images.format(split) / f"{i}.png", picture(10 * i, SIZE))
        write(root / jsons.format(split), coco_json([coco_mark(5)] if own is None else own, **more))
    return root


def make_yolo(root, labels="1 0.5 0.25 0.5 0.25\n", test="0 0.5 0.5 1 1\n", **described):
    for split, text in (("train", labels), ("val", test)):
        for i in (1, 2):
            save(root / "images" / split / f"{i}.png", picture(10 * i, SIZE))
        write(root / "labels" / split / "1.txt", text)
    described = {"train": "images/train", "val": "images/val", "names": ["cat", "dog"], **described}
    write(root / "data.yaml", described)  # JSON is YAML
    return root


def voc_xml(*objects, size=SIZE):
    corners = ("xmin", "ymin", "xmax", "ymax")
    texts = [
        VOC_OBJECT.format(name, int(difficult), "".join(f"<{c}>{x}</{c}>" for c, x in zip(corners, box, strict=True)))
        for name, difficult, box in objects
    ]
    return f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{''.join(texts)}</annotation>"


def make_voc(root, train=(("dog", False, (3, 2, 6, 5)), ("cat", True, (1, 1, 12, 8))), test="cat"):
    """Two images a split; the second of train has a cat, that of the test part nothing."""
    cat, other = ("cat", False, (1, 1, 2, 2)), (test, False, (1, 1, 2, 2))
    for split, objects in (("train", (train, [cat])), ("val", ([other], []))):
        for name, own in zip((f"{split}_1", f"{split}_2"), objects, strict=True):
            save(root / "JPEGImages" / f"{name}.jpg", picture(10, SIZE))
            write(root / "Annotations" / f"{name}.xml", voc_xml(*own))
        write(root / "ImageSets" / "Main" / f"{split}.txt", f"{split}_1\n{split}_2\n")
    return root


def make_voc_masks(root):
    for split in ("train", "val"):
        save(root / "JPEGImages" / f"{split}_1.jpg", picture(10, SIZE))
        save(root / "SegmentationClass" / f"{split}_1.png", mask_image(square=20, background=255, mode="P"))
        write(root / "ImageSets" / "Segmentation" / f"{split}.txt", f"{split}_1\n")
    return root
