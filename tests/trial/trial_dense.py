"""Cases of detection and segmentation: options, data and run folders that are wrong."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from trial_options import VALUES, WORD_VALUES, Case, Verdict, _called, _heard, _verdict, _word
from trial_stock import DENSE, Stock

from dense_folders import make_coco, make_masks, make_voc, make_yolo, mask_image, save, write
from image_folders import picture
from statickey.cli.parser import new_parser

NAMES = ("arch", "decoder", "on_bad_sample")
OPTIONS = {
    "detect": ("arch", "channels", "anchor_size", "max_size", "train_size"),
    "segment": ("decoder", "decoder_channels", "window", "crop_size", "loss"),
}
SHARED = ("img_size", "scale", "flip", "mean", "std", "frozen_stages", "on_bad_sample")
WRONG: dict[str, dict[str, str]] = {
    "detect": {
        "--arch": "yolo Faster_RCNN mask",
        "--channels": "0 -8 1000000000",
        "--anchor-size": "0 -1",
        "--max-size": "0 16 -1",
        "--train-size": "0 -1 99999999",
    },
    "segment": {
        "--decoder": "pspnet UNet unet++",
        "--decoder-channels": "0 -8 1000000000",
        "--window": "0 -1",
        "--crop-size": "0 -1 99999999",
        "--loss": "[] [ce] [dice,dice] [3] [[dice]] dice,focal",
    },
}
WRONG_SHARED = {
    "--img-size": "0 -1 99999999",
    "--scale": "[0,1] [2,1] [1] [1,2,3] [] [-1,1] [a,b] [.nan,1] [1,1e300] 1",
    "--mean": "[0.5] [] [a,b,c] [0.5,0.5,0.5,0.5]",
    "--std": "[0.5] [0,1,1] [-1,1,1] [1,1,.inf]",
    "--frozen-stages": "-1 99 1.5",
    "--on-bad-sample": "warn Skip",
    "--flip": "maybe",
    "--holdout": "0.999 1e-9",
    "--model": "levit_128s nowhere local-dir:nowhere",
    "--data": "digits cifar10 hf:nowhere nowhere folder binary.bin image.png /dev/null {folder} {parquet} {shards}",
}
"""Values, apart by blanks, that are refused."""


def dense_cases() -> Iterator[Case]:
    """All of them."""
    yield from _generic()
    for task, options in WRONG.items():
        for option, values in (options | WRONG_SHARED).items():
            for value in values.split():
                words = ("train", *DENSE[task], f"{option}={value}")
                yield Case(f"{task} {option} {value}", words, "refused", begins=value in _LATE)
    yield from _data()
    yield from _runs()


_LATE = {"1000000000", "99999999", "1e-9"}
"""Found to be too much when memory is asked for."""


def _generic() -> Iterator[Case]:
    rng = random.Random(3)
    for task, own in OPTIONS.items():
        hints = {action.dest: getattr(action, "_typehint", None) for action in new_parser("train", task)._actions}
        for option in (*own, *SHARED):
            for kind, value in (VALUES | WORD_VALUES).items():
                text, hint = _word(value), hints[option]
                verdict = _verdict("train", option, hint, kind, text)
                if option in NAMES:
                    verdict = "either" if kind == "null" and NoneType in get_args(hint) else "refused"
                command = "train" if rng.random() < 0.7 else "compare"
                words = (command, *DENSE[task], f"--{option.replace('_', '-')}={text}")
                if command == "compare":
                    words += ("--mixers", "ska", "--seeds", "0")
                says = (*_called(option), *_heard(text), "packages")
                yield Case(f"{task} {command} --{option} {kind}", words, verdict, says, begins=verdict == "either")


def _replaced(name: str, content: bytes | str) -> Callable[[Path], Any]:
    def replace(root: Path) -> None:
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return replace


def _coco(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def damage(root: Path) -> None:
        path = root / "instances_train.json"
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return damage


def _mark(**changes: Any) -> Callable[[Path], Any]:
    return _coco(lambda value: value["annotations"][0].update(changes))


FOLDERS: dict[str, tuple[str, Callable[[Path], Any], dict[str, tuple[Verdict, Callable[[Path], Any]]]]] = {
    "coco": (
        "detect",
        lambda root: make_coco(root),
        {
            "no json": ("refused", _replaced("instances_train.json", "no")),
            "list": ("refused", _replaced("instances_train.json", "[]")),
            "empty": ("refused", _replaced("instances_train.json", "")),
            "binary": ("refused", _replaced("instances_train.json", bytes(range(256)))),
            "no images": ("refused", _coco(lambda value: value.pop("images"))),
            "images null": ("refused", _coco(lambda value: value.update(images=None))),
            "no annotations": ("refused", _coco(lambda value: value.pop("annotations"))),
            "no categories": ("refused", _coco(lambda value: value.pop("categories"))),
            "category unknown": ("refused", _mark(category_id=99)),
            "category a word": ("refused", _mark(category_id="cat")),
            "image unknown": ("refused", _mark(image_id=99)),
            "box of three": ("refused", _mark(bbox=[1, 2, 3])),
            "box of words": ("refused", _mark(bbox=["a", 1, 2, 3])),
            "box null": ("refused", _mark(bbox=None)),
            "box negative": ("refused", _mark(bbox=[1, 1, -4, 4])),
            "box outside": ("refused", _mark(bbox=[900, 900, 4, 4])),
            "mask arch": ("refused", lambda root: None),
            "image broken": ("refused", _replaced("train/1.png", b"x")),
        },
    ),
    "yolo": (
        "detect",
        lambda root: make_yolo(root),
        {
            "no yaml": ("refused", _replaced("data.yaml", "{")),
            "list": ("refused", _replaced("data.yaml", "[1]")),
            "names a number": ("refused", _replaced("data.yaml", "train: images/train\nval: images/val\nnames: 3")),
            "torn label": ("refused", _replaced("labels/train/1.txt", "1 0.5 0.2")),
            "label a word": ("refused", _replaced("labels/train/1.txt", "cat 0.5 0.5 0.1 0.1")),
            "class unknown": ("refused", _replaced("labels/train/1.txt", "7 0.5 0.5 0.1 0.1")),
            "nan": ("refused", _replaced("labels/train/1.txt", "1 nan 0.5 0.1 0.1")),
            "label binary": ("refused", _replaced("labels/train/1.txt", bytes(range(256)))),
        },
    ),
    "voc": (
        "detect",
        lambda root: make_voc(root),
        {
            "torn xml": ("refused", _replaced("Annotations/train_1.xml", "<annotation><object>")),
            "empty xml": ("refused", _replaced("Annotations/train_1.xml", "")),
            "entities": (
                "either",
                _replaced(
                    "Annotations/train_1.xml",
                    '<!DOCTYPE a [<!ENTITY b "xxxxxxxxxx"><!ENTITY c "&b;&b;&b;&b;">]><annotation>&c;</annotation>',
                ),
            ),
            "list of nothing": ("refused", _replaced("ImageSets/Main/train.txt", "")),
            "list of what is not there": ("refused", _replaced("ImageSets/Main/train.txt", "nowhere\n")),
        },
    ),
    "masks": (
        "segment",
        lambda root: make_masks(root, count=4),
        {
            "class unknown": ("refused", lambda root: save(root / "masks/train/0.png", mask_image(square=9))),
            "other size": ("refused", lambda root: save(root / "masks/train/0.png", mask_image(size=(9, 9)))),
            "mask in colours": ("refused", lambda root: save(root / "masks/train/0.png", mask_image(mode="RGB"))),
            "mask broken": ("refused", _replaced("masks/train/0.png", b"x")),
            "image broken": ("refused", _replaced("images/train/0.jpg", b"x")),
            "mask missing": ("refused", lambda root: (root / "masks/train/0.png").unlink()),
            "no masks": ("refused", lambda root: (root / "masks").rename(root / "other")),
            "classes a dict": ("refused", lambda root: write(root / "classes.json", {"a": 1})),
            "classes no json": ("refused", lambda root: write(root / "classes.json", "{")),
            "one class": ("refused", lambda root: write(root / "classes.json", ["sky"])),
            "classes twice": ("refused", lambda root: write(root / "classes.json", ["sky", "sky"])),
            "classes numbers": ("refused", lambda root: write(root / "classes.json", [1, 2])),
        },
    ),
}


def _data() -> Iterator[Case]:
    for layout, (task, make, damages) in FOLDERS.items():
        other = {"detect": "segment", "segment": "detect"}[task]
        whole = {"whole": ("either", lambda root: None)}
        for kind, (verdict, damage) in (whole | damages).items():
            words = ("train", *DENSE[task], "--data", "here", "--limit", "4", "--holdout", "0.5", "--batch-size", "2")
            words += ("--arch", "mask_rcnn") if kind == "mask arch" else ()
            yield Case(f"{task} {layout} {kind}", words, verdict, (), _laid(make, damage), begins=True)
        words = ("train", *DENSE[other], "--data", "here")
        yield Case(f"{other} from {layout}", words, "refused", ("here",), _laid(make, lambda root: None))


def _laid(make: Callable[[Path], Any], damage: Callable[[Path], Any]) -> Callable[[Path, Stock], Any]:
    def lay(folder: Path, stock: Stock) -> None:
        make(folder / "here")
        damage(folder / "here")

    return lay


def _runs() -> Iterator[Case]:
    cpu = ("--accelerator", "cpu")
    for task in WRONG:
        run, other = f"{{{task}}}", {"detect": "segment", "segment": "detect"}[task]
        for kind, words in {
            "train in a run of another task": ("train", *DENSE[other], "--out", run),
            "train in a run of a classifier": ("train", *DENSE[task], "--out", "{run}"),
            "compare in a comparison of classifiers": (
                *("compare", *DENSE[task], "--mixers", "ska", "--seeds", "0", "--out", "{comparison}"),
            ),
            "evaluate on digits": ("evaluate", run, "--data", "digits", *cpu),
            "evaluate on a folder of classes": ("evaluate", run, "--data", "{folder}", *cpu),
            "evaluate a classifier on scenes": ("evaluate", "{run}", "--data", "scenes", *cpu),
            "evaluate at no size": ("evaluate", run, "--img-size", "0", *cpu),
            "evaluate at billions": ("evaluate", run, "--img-size", "99999999", *cpu),
            "evaluate another task": ("evaluate", run, "--task", other, *cpu),
            "predict of no file": ("predict", run, "nowhere.png", *cpu),
            "predict nothing": ("predict", run, "image.png", "--top-k", "0", *cpu),
            "predict at billions": ("predict", run, "image.png", "--img-size", "99999999", *cpu),
            "predict with masks of a classifier": ("predict", "{run}", "image.png", "--masks", "m", *cpu),
            "predict into a file": ("predict", run, "image.png", "--pictures", "binary.bin", *cpu),
        }.items():
            yield Case(f"{task}: {kind}", words, "refused")
        for kind, change in {
            "task": {"task": other},
            "classifier": {"task": "classify"},
            "no such task": {"task": "pose"},
            "task a number": {"task": 3},
            "settings": {"task_args": {}},
            "settings a list": {"task_args": []},
            "settings of none": {"task_args": None},
        }.items():
            for command in (("evaluate", "here"), ("predict", "here", "image.png")):
                words = (*command, *cpu)
                yield Case(
                    f"{task}: {command[0]} a card of another {kind}", words, "refused", (), _card(task, change)
                )
    yield Case(
        "a classifier's card of detect", ("evaluate", "here", *cpu), "refused", (), _card("run", {"task": "detect"})
    )


def _card(name: str, change: dict[str, Any]) -> Callable[[Path, Stock], Any]:
    def lay(folder: Path, stock: Stock) -> None:
        path = stock.copy(name, folder / "here") / "config.json"
        card = json.loads(path.read_text())
        card["statickey"] |= change
        path.write_text(json.dumps(card))
        save(folder / "image.png", picture(3, (20, 16)))

    return lay
