"""Cases of folders of runs and comparisons that are damaged, and of weights that are none."""

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from trial_options import QUICK, Case, Verdict
from trial_stock import Stock

Damage = Callable[[Path], object]


class Malicious:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("unpickled",)


def _json(name: str, change: Callable[[Any], Any]) -> Damage:
    """Change what is in a file of JSON, in place or by what is returned."""

    def rewrite(root: Path) -> None:
        value = json.loads((root / name).read_text())
        changed = change(value)
        (root / name).write_text(json.dumps(value if changed is None else changed))

    return rewrite


def _sets(*keys: str, to: Any) -> Callable[[Any], None]:
    def change(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        value[keys[-1]] = to

    return change


def _lacks(*keys: str) -> Callable[[Any], None]:
    def change(value: Any) -> None:
        for key in keys[:-1]:
            value = value[key]
        del value[keys[-1]]

    return change


def _content(name: str, content: bytes) -> Damage:
    return lambda root: (root / name).write_bytes(content)


def _torn(name: str, part: float = 0.5) -> Damage:
    def tear(root: Path) -> None:
        content = (root / name).read_bytes()
        (root / name).write_bytes(content[: int(len(content) * part)])

    return tear


def _gone(name: str) -> Damage:
    return lambda root: (root / name).unlink()


def _folder(name: str) -> Damage:
    return lambda root: ((root / name).unlink(), (root / name).mkdir())


def _pipe(name: str) -> Damage:
    return lambda root: ((root / name).unlink(), os.mkfifo(root / name))


def _dangling(name: str) -> Damage:
    return lambda root: ((root / name).unlink(), (root / name).symlink_to("nowhere"))


def _state(change: Callable[[dict[str, torch.Tensor]], Any], name: str = "model.safetensors") -> Damage:
    """Change the tensors of a file of weights."""

    def rewrite(root: Path) -> None:
        state = safetensors.torch.load_file(root / name)
        changed = change(state)
        safetensors.torch.save_file(state if changed is None else changed, root / name)

    return rewrite


def _filled(value: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda state: state | {"head.weight": torch.full_like(state["head.weight"], value)}


def _first(state: dict[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    return state | {"head.weight": change(state["head.weight"])}


WEIGHTS: dict[str, Damage] = {
    "gone": _gone("model.safetensors"),
    "torn": _torn("model.safetensors"),
    "torn at the end": _torn("model.safetensors", 0.999),
    "empty": _content("model.safetensors", b""),
    "text": _content("model.safetensors", b"not weights at all"),
    "zeros": _content("model.safetensors", bytes(4000)),
    "header of nonsense": _content("model.safetensors", (10).to_bytes(8, "little") + b"{{{{{{{{{{"),
    "header too long": _content("model.safetensors", (2**62).to_bytes(8, "little") + b"{}"),
    "pickle": _content("model.safetensors", pickle.dumps(Malicious())),
    "folder": _folder("model.safetensors"),
    "pipe": _pipe("model.safetensors"),
    "dangling": _dangling("model.safetensors"),
}
"""Files that hold no weights."""
TENSORS: dict[str, Damage] = {
    "nan": _state(_filled(float("nan"))),
    "infinite": _state(_filled(float("inf"))),
    "integers": _state(lambda state: {name: tensor.to(torch.int32) for name, tensor in state.items()}),
    "one of integers": _state(lambda state: _first(state, lambda tensor: tensor.to(torch.int64))),
    "bool": _state(lambda state: _first(state, lambda tensor: tensor > 0)),
    "lacking one": _state(lambda state: {name: state[name] for name in list(state)[1:]}),
    "one more": _state(lambda state: state | {"more": torch.zeros(3)}),
    "none": _state(lambda state: {}),
    "other shape": _state(lambda state: _first(state, lambda tensor: tensor[:, :4].contiguous())),
    "other classes": _state(lambda state: _first(state, lambda tensor: tensor[:3].contiguous())),
    "other rank": _state(lambda state: _first(state, lambda tensor: tensor.flatten())),
    "no extent": _state(lambda state: _first(state, lambda tensor: torch.zeros(0))),
    "scalar": _state(lambda state: _first(state, lambda tensor: torch.zeros(()))),
}
"""Weights that are not those of the run."""
CARDS: dict[str, Damage] = {
    "gone": _gone("config.json"),
    "torn": _torn("config.json"),
    "empty": _content("config.json", b""),
    "binary": _content("config.json", bytes(range(256))),
    "list": _content("config.json", b"[]"),
    "number": _content("config.json", b"3"),
    "null": _content("config.json", b"null"),
    "deep": _content("config.json", b"[" * 100_000),
    "folder": _folder("config.json"),
    "pipe": _pipe("config.json"),
}
_WRONG_CARD: dict[tuple[str, ...], list[Any]] = {
    ("architecture",): [None, 3, [], "", "nowhere", "vit_tiny_patch16_224", "hf-hub:a/b", "local-dir:nowhere", {}],
    ("label_names",): [None, 3, [], "ab", [1, 2], ["a"], ["a", "b"], [None] * 10, {}, ["a"] * 10],
    ("model_args",): [None, 3, [], "x"],
    ("pretrained_cfg",): [None, 3, [], {}],
    ("pretrained_cfg", "input_size"): [
        None,
        3,
        [],
        [1, 8],
        [1, 8, 9],
        [3, 8, 8],
        [1, -8, -8],
        ["1", 8, 8],
        [1, 8.5, 8.5],
        [0, 8, 8],
        [1, 10**9, 10**9],
        [1, 10**23, 10**23],
    ],
    ("pretrained_cfg", "mean"): [None, 3, [], "x", ["x"], [0.5] * 3, [None], [1e999], [True]],
    ("pretrained_cfg", "std"): [None, 0, [], "x", ["x"], [0.5] * 3, [0], [-1], [1e999]],
    ("statickey",): [None, 3, [], {}, "x"],
    ("statickey", "mixer"): [3, [], "skaa", "ska", {}, "", "ska:", "ska:kernel_size=5"],
    ("statickey", "model_args"): [
        None,
        3,
        [],
        "x",
        {"depth": 2},
        {"depth": -1},
        {"depth": "x"},
        {"nonsense": 1},
        {"embed_dim": 10**12},
        {"drop_path_rate": 5},
        {"num_classes": 3},
        {"img_size": 4},
    ],
    ("statickey", "streamed"): [None, 3, "no", []],
    ("statickey", "fp32_logits"): [None, 3, "no"],
    ("statickey", "task"): [None, 3, "clasify", [], ""],
}
for _keys, _values in _WRONG_CARD.items():
    CARDS[f"without {'.'.join(_keys)}"] = _json("config.json", _lacks(*_keys))
    for _value in _values:
        CARDS[f"{'.'.join(_keys)} {str(_value)[:40]}"] = _json("config.json", _sets(*_keys, to=_value))
_CARDS_THAT_MAY_DO = {
    "label_names ['a', 'a', 'a', 'a', 'a', 'a', 'a', 'a",
    "without statickey.fp32_logits",
    "without statickey.task",
    "without model_args",
    "statickey.mixer None",
}
RESULTS: dict[str, Damage] = {
    "torn": _torn("run.json"),
    "empty": _content("run.json", b""),
    "binary": _content("run.json", bytes(range(256))),
    "list": _content("run.json", b"[]"),
    "number": _content("run.json", b"3"),
    "null": _content("run.json", b"null"),
    "empty dict": _content("run.json", b"{}"),
    "other": _content("run.json", b'{"name": "of another program"}'),
    "deep": _content("run.json", b"[" * 100_000),
    "unknown option": _json("run.json", _sets("config", "more", to=3)),
    "config a list": _json("run.json", _sets("config", to=[1])),
    "config null": _json("run.json", _sets("config", to=None)),
    "config a number": _json("run.json", _sets("config", to=3)),
    "curve null": _json("run.json", _sets("curve", to=None)),
    "data a number": _json("run.json", _sets("data", to=3)),
    "data null": _json("run.json", _sets("data", to=None)),
    "data_dir a list": _json("run.json", _sets("data_dir", to=[])),
    "seed a text": _json("run.json", _sets("seed", to="x")),
    "option of another type": _json("run.json", _sets("config", "epochs", to="many")),
    "option out of range": _json("run.json", _sets("config", "holdout", to=3)),
    "option null": _json("run.json", _sets("config", "batch_size", to=None)),
    "model of another": _json("run.json", _sets("config", "model", to=[3])),
    **{
        f"without {name}": _json("run.json", _lacks(name))
        for name in ("config_hash", "mixer", "seed", "config", "curve", "data", "data_dir")
    },
}
"""What ``evaluate`` needs of a run's result."""
_UNREAD = {"curve null", "seed a text", "model of another"}
CONFIGS: dict[str, Damage] = {
    "torn": _torn("config.yaml", 0.3),
    "binary": _content("config.yaml", bytes(range(256))),
    "list": _content("config.yaml", b"- 1"),
    "empty": _content("config.yaml", b""),
    "folder": _folder("config.yaml"),
    "number": _content("config.yaml", b"3"),
    "object": _content("config.yaml", b"!!python/object/apply:os.mkdir [unpickled]"),
    "lists": _content("config.yaml", b"mixers: 3\nseeds: {a: 1}"),
    "words as seeds": _content("config.yaml", b"mixers: [ska]\nseeds: [x]"),
}


def _checkpoints(change: Callable[[Path], object], both: bool = True) -> Damage:
    def damage(root: Path) -> None:
        found = sorted(root.glob("*.ckpt"), reverse=True)
        assert found
        for path in found if both else found[:1]:
            change(path)

    return damage


def _half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for i in range(len(content) // 3, len(content) // 3 + 200):
        content[i] ^= 0xFF
    path.write_bytes(content)


def _malicious_archive(path: Path) -> None:
    torch.save({"state_dict": {}, "run": Malicious()}, path)


def _entry_lost(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()[:-2]}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


CHECKPOINTS: dict[str, Damage] = {
    "torn": _checkpoints(_half),
    "empty": _checkpoints(lambda path: path.write_bytes(b"")),
    "text": _checkpoints(lambda path: path.write_bytes(b"not a checkpoint")),
    "flipped": _checkpoints(_flipped),
    "pickle": _checkpoints(lambda path: path.write_bytes(pickle.dumps(Malicious()))),
    "pickle in an archive": _checkpoints(_malicious_archive),
    "of weights": _checkpoints(lambda path: torch.save({"a": torch.zeros(3)}, path)),
    "entry lost": _checkpoints(_entry_lost),
    "folder": _checkpoints(lambda path: (path.unlink(), path.mkdir())),
    "pipe": _checkpoints(lambda path: (path.unlink(), os.mkfifo(path))),
    "dangling": _checkpoints(lambda path: (path.unlink(), path.symlink_to("nowhere"))),
}

PREDICTIONS: dict[str, Damage] = {
    "gone": _gone("predictions.npz"),
    "torn": _torn("predictions.npz"),
    "empty": _content("predictions.npz", b""),
    "text": _content("predictions.npz", b"not an archive"),
    "pickle": _content("predictions.npz", pickle.dumps(Malicious())),
    "folder": _folder("predictions.npz"),
    "other arrays": lambda root: _savez(root, other=[1, 2]),
    "other shape": lambda root: _savez(root, predicted=[1, 2], truth=[1]),
    "no image": lambda root: _savez(root, predicted=[], truth=[]),
    "more rank": lambda root: _savez(root, predicted=[[1]], truth=[[1]]),
    "fewer images": lambda root: _savez(root, predicted=[1, 2], truth=[1, 2]),
    "objects": lambda root: _savez(root, predicted=[Malicious()], truth=[Malicious()]),
}


def _savez(root: Path, **arrays: list[Any]) -> None:
    import numpy as np

    np.savez(root / "predictions.npz", **{name: np.array(value) for name, value in arrays.items()})


CPU = ("--accelerator", "cpu")


def run_cases() -> Iterator[Case]:
    """Every damage before every command that reads such a folder."""
    readers = {
        "evaluate": ("evaluate", "here", *CPU),
        "evaluate averaged": ("evaluate", "here", "--ema", "true", *CPU),
        "predict": ("predict", "here", "image.png", *CPU),
    }
    for kind, damage in WEIGHTS.items():
        for reader, words in readers.items():
            if reader != "evaluate averaged":
                yield _of_run(f"{reader}, weights {kind}", words, damage, "refused")
        yield _of_run(f"train again, weights {kind}", ("train", *QUICK, "--out", "here"), damage, "refused")
        words = ("train", *QUICK, "--weights", "here/model.safetensors")
        yield _of_run(f"train from weights {kind}", words, damage, "refused")
    for kind, damage in TENSORS.items():
        for reader, words in readers.items():
            if reader != "evaluate averaged":
                yield _of_run(f"{reader}, weights {kind}", words, damage, "refused")
        words = ("train", *QUICK, "--weights", "here/model.safetensors")
        allowed: Verdict = "refused" if kind in ("nan", "infinite", "none") else "either"
        yield _of_run(f"train from weights {kind}", words, damage, allowed)
    for kind, damage in CARDS.items():
        for reader in ("evaluate", "predict"):
            allowed = (
                "either"
                if kind in _CARDS_THAT_MAY_DO or (reader == "predict" and kind.startswith("label_names"))
                else "refused"
            )
            if (
                "input_size" in kind
                or kind.startswith("statickey.model_args {'")
                or kind.startswith("model_args")
                or kind == "without model_args"
            ):
                allowed = "either"
            yield _of_run(f"{reader}, card {kind}", readers[reader], damage, allowed)
    for kind, damage in RESULTS.items():
        allowed = "either" if kind in _UNREAD else "refused"
        yield _of_run(f"evaluate, result {kind}", readers["evaluate"], damage, allowed)
        yield _of_run(f"train again, result {kind}", ("train", *QUICK, "--out", "here"), damage, "either")
    for kind, damage in CONFIGS.items():
        yield _of_run(f"train again, configuration {kind}", ("train", *QUICK, "--out", "here"), damage, "either")
        again = ("compare", *QUICK, "--mixers", "ska", "identity", "--seeds", "0", "--out", "here")
        yield _of_comparison(
            f"compare again, configuration {kind}", again, damage, "either" if kind == "folder" else "refused"
        )
    for kind, damage in CHECKPOINTS.items():
        yield Case(
            f"train on, checkpoint {kind}",
            ("train", *QUICK, "--out", "here"),
            "refused",
            ("here",),
            _laid("begun", damage),
            begins=True,
        )
        yield Case(f"evaluate, checkpoint {kind}", readers["evaluate"], "refused", ("here",), _laid("begun", damage))
    again = ("compare", *QUICK, "--mixers", "ska", "identity", "--seeds", "0", "--out", "here")
    for kind, damage in {
        **PREDICTIONS,
        **{f"result {k}": d for k, d in RESULTS.items()},
        **{f"weights {k}": d for k, d in WEIGHTS.items()},
    }.items():
        allowed = (
            "either"
            if kind.removeprefix("result ")
            in (
                "unknown option",
                "config a list",
                "config null",
                "config a number",
                "data a number",
                "data null",
                "data_dir a list",
                "option of another type",
                "option out of range",
                "option null",
                "model of another",
            )
            else "refused"
        )
        yield _of_comparison(f"compare again, a run's {kind}", again, _in_run(damage), allowed)
    for name in ("ska-seed1", "copy", "ska-seed0 (copy)", "zzz", "mhsa-seed0"):
        yield _of_comparison(f"compare again, a copy {name}", again, _copied(name), "refused")
    for kind, words in {
        "held out of other data": ("evaluate", "{run}", "--split", "holdout", "--data", "{folder}"),
        "file as a run": ("evaluate", "image.png"),
        "picture as weights": ("predict", "image.png", "image.png"),
        "comparison as a run": ("evaluate", "{comparison}"),
        "empty folder": ("predict", "folder", "image.png"),
        "other classes": ("evaluate", "{run}", "--data", "{folder}"),
        "no such layer": ("predict", "{run}", "image.png", "--attention", "a", "--layer", "nowhere"),
        "no such table": ("predict", "{run}", "image.png", "--out", "p.txt"),
        "size of billions": ("predict", "{run}", "image.png", "--img-size", "99999999"),
        "evaluated at billions": ("evaluate", "{run}", "--img-size", "99999999"),
        "summary of billions": ("summary", "vit_tiny_patch16_224", "--img-size", "99999999"),
        "averaged file": ("evaluate", "{run}/model.safetensors", "--ema", "true"),
        "train into a comparison": ("train", *QUICK, "--out", "{comparison}"),
        "compare into a run": ("compare", *QUICK, "--mixers", "ska", "--seeds", "0", "--out", "{run}"),
        "train another in a run": ("train", *QUICK, "--seed", "1", "--out", "{run}"),
        "never resume": ("train", *QUICK, "--resume", "never", "--out", "{run}"),
        "out a file": ("train", *QUICK, "--out", "binary.bin"),
        "out under a file": ("train", *QUICK, "--out", "binary.bin/x"),
        "out of no rights": ("train", *QUICK, "--out", "/proc/x"),
        "compare out of no rights": ("compare", *QUICK, "--mixers", "ska", "--seeds", "0", "--out", "/proc/x"),
        "bench out of no rights": ("bench", "--out", "/proc/x"),
        "evaluate out of no rights": ("evaluate", "{run}", "--out", "/proc/x"),
        "evaluate out a file": ("evaluate", "{run}", "--out", "binary.bin"),
        "predict out of no rights": ("predict", "{run}", "image.png", "--out", "/proc/x.csv"),
        "predict out a folder": ("predict", "{run}", "image.png", "--out", "folder.csv"),
        "predict attention out of no rights": ("predict", "{run}", "image.png", "--attention", "/proc/x"),
        "predict attention a file": ("predict", "{run}", "image.png", "--attention", "binary.bin"),
        "summary out of no rights": ("summary", "skaformer_nano", "--csv", "/proc/x.csv"),
        "summary full": ("summary", "skaformer_nano", "--markdown", "/dev/full/x"),
        "bench compared nowhere": ("bench", "training", "--compared", "nowhere", "--rounds", "1"),
        "bench compared a run": ("bench", "training", "--compared", "{run}", "--rounds", "1"),
        "bench into nonsense": ("bench", "--out", "nonsense", "--rounds", "1"),
    }.items():
        yield Case(
            kind,
            words,
            "either" if kind in ("train into a comparison", "compare into a run") else "refused",
            (),
            _odds,
            quick=True,
        )
    for kind, words in {
        "std": ("--std", "[-1]"),
        "std zero": ("--std", "[0]"),
        "mean of three": ("--mean", "[0.5,0.5,0.5]"),
        "mean of none": ("--mean", "[]"),
        "mean of text": ("--mean", "[a]"),
        "mean enormous": ("--mean", "[1e300]"),
        "std tiny": ("--std", "[1e-300]"),
        "crop padding": ("--crop-padding", "1000"),
        "min lr": ("--min-lr", "10"),
        "warm-up lr": ("--warmup-lr", "10"),
        "warm-up": ("--warmup-epochs", "5"),
        "lr": ("--lr", "1e300"),
        "decay": ("--weight-decay", "1e300"),
        "accumulation": ("--grad-accum-steps", "7"),
        "image size": ("--img-size", "99999999"),
        "image size of a memory": ("--img-size", "8000"),
        "drop path": ("--model-args", '{"drop_path_rate": 5}'),
        "depth": ("--model-args", '{"depth": 100000}'),
        "no depth": ("--model-args", '{"depth": 0}'),
        "depth a fraction": ("--model-args", '{"depth": 1.5}'),
        "no heads": ("--model-args", '{"num_heads": 0}'),
        "heads that do not divide": ("--model-args", '{"embed_dim": 8, "num_heads": 3}'),
        "width zero": ("--model-args", '{"embed_dim": 0}'),
        "width negative": ("--model-args", '{"embed_dim": -8}'),
        "width of billions": ("--model-args", '{"embed_dim": 99999999999}'),
        "patch too large": ("--model-args", '{"patch_size": 16}'),
        "patch zero": ("--model-args", '{"patch_size": 0}'),
        "patch that does not divide": ("--model-args", '{"patch_size": 3}'),
        "argument unknown": ("--model-args", '{"nonsense": 1}'),
        "argument of the data": ("--model-args", '{"num_classes": 3}'),
        "argument in_chans": ("--model-args", '{"in_chans": 3}'),
        "argument img_size": ("--model-args", '{"img_size": 3}'),
        "ratio negative": ("--model-args", '{"mlp_ratio": -4}'),
        "ratio a word": ("--model-args", '{"mlp_ratio": "x"}'),
        "model args torn": ("--model-args", '{"depth": 1'),
        "limit of one": ("--limit", "1"),
        "batch too large": ("--batch-size", "100000"),
        "holdout of all": ("--holdout", "0.9999"),
        "holdout of none": ("--holdout", "1e-9"),
        "augmentation": ("--auto-augment", "rand-m9-n2-x3"),
        "augmentation strong": ("--auto-augment", "rand-m99"),
        "augmentation empty": ("--auto-augment", "rand"),
        "augmentation augmix": ("--auto-augment", "augmix-m5"),
        "erasing": ("--random-erasing", "2"),
        "smoothing": ("--label-smoothing", "1"),
        "mixup": ("--mixup", "1e300"),
        "cutmix": ("--cutmix", "1e300"),
        "devices": ("--devices", "100000"),
        "nodes": ("--num-nodes", "0"),
        "accelerator": ("--accelerator", "tpu"),
        "gpu": ("--accelerator", "gpu", "--devices", "64"),
        "half": ("--precision", "16-true"),
        "strategy": ("--strategy", "deepspeed"),
        "workers": ("--num-workers", "-2"),
        "mixer argument": ("--mixer", "cska:kernel_size=4"),
        "mixer argument zero": ("--mixer", "cska:kernel_size=0"),
        "mixer argument negative": ("--mixer", "cska:kernel_size=-3"),
        "mixer argument large": ("--mixer", "cska:kernel_size=51"),
        "mixer argument billions": ("--mixer", "cska:kernel_size=99999999999"),
        "mixer argument word": ("--mixer", "cska:kernel_size=x"),
        "mixer argument list": ("--mixer", "cska:kernel_size=[3,3]"),
        "mixer argument unknown": ("--mixer", "ska:kernel_size=3"),
        "mixer argument twice": ("--mixer", "cska:kernel_size=3,kernel_size=5"),
        "mixer argument of the host": ("--mixer", "ska:dim=3"),
        "mixer argument positional": ("--mixer", "ska:3"),
        "mixer argument nan": ("--mixer", "ska:scale=.nan"),
        "mixer rate": ("--mixer", "ska:attn_drop=5"),
        "mixer colon": ("--mixer", "ska:"),
        "mixer at": ("--mixer", "ska@"),
        "mixer layer": ("--mixer", "ska@7"),
        "mixer layer negative": ("--mixer", "ska@-7"),
        "mixer layer name": ("--mixer", "ska@nowhere"),
        "mixer layer fraction": ("--mixer", "ska@0.5"),
        "mixer layer twice": ("--mixer", "ska@0,0"),
        "mixer layer huge": ("--mixer", f"ska@{'9' * 23}"),
        "mixer layer empty": ("--mixer", "ska@0,,1"),
        "mixer unicode": ("--mixer", "skä"),
        "mixer yaml": ("--mixer", "ska:a={"),
        "mixer object": ("--mixer", "ska:a=!!python/object/apply:os.mkdir [unpickled]"),
        "model unicode": ("--model", "ï"),
        "model folder": ("--model", "local-dir:folder"),
        "model nowhere": ("--model", "local-dir:nowhere"),
        "model hub": ("--model", "hf-hub:a/b/c/d"),
        "model tag": ("--model", "vit_tiny_patch16_224.nowhere"),
        "model scheme": ("--model", "ftp:x"),
        "model without attention": ("--model", "resnet10t", "--mixer", "ska", "--model-args", "{}"),
        "weights text": ("--weights", "binary.bin"),
        "weights folder": ("--weights", "folder"),
        "weights picture": ("--weights", "image.png"),
        "weights device": ("--weights", "/dev/zero"),
        "weights null device": ("--weights", "/dev/null"),
        "optimizer": ("--opt", "nowhere"),
        "epochs of ages": ("--epochs", "9" * 23),
        "cool-down of ages": ("--cooldown-epochs", "9" * 23),
        "batch of ages": ("--batch-size", "9" * 23),
        "seed": ("--seed", "1" * 23),
        "seed negative": ("--seed", "-1"),
        "out empty": ("--out", ""),
        "data_dir a file": ("--data", "cifar10", "--data-dir", "binary.bin"),
    }.items():
        allowed = "either" if kind in _MAY_RUN else "refused"
        yield Case(
            f"train, {kind}", ("train", *QUICK, *words), allowed, (), _odds, begins=kind in _MAY_BEGIN, quick=True
        )
    for kind, content in MALICIOUS.items():
        words = ("train", *QUICK, "--weights", "bad.pth")
        yield Case(f"train from {kind}", words, "refused", ("bad.pth",), _writes(content), quick=True)
        yield Case(
            f"predict with {kind}",
            ("predict", "here/bad.pth", "image.png"),
            "refused",
            ("bad.pth",),
            _beside(content),
        )
        model_args = '{"depth": 1, "embed_dim": 8, "num_heads": 2, "checkpoint_path": "bad.pth"}'
        yield Case(
            f"checkpoint_path {kind}", ("train", *QUICK, "--model-args", model_args), "refused", (), _writes(content)
        )


_MAY_RUN = {
    "batch too large",
    "limit of one",
    "holdout of none",
    "mixer argument large",
    "mixer layer twice",
    "decay",
    "mixup",
    "cutmix",
    "ratio negative",
    "augmentation strong",
    "augmentation empty",
}
_MAY_BEGIN = {"lr", "decay", "mean enormous", "std tiny", "mixup", "cutmix"}
MALICIOUS: dict[str, Callable[[Path], object]] = {
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Malicious())),
    "a pickled state": lambda path: path.write_bytes(pickle.dumps({"state_dict": Malicious()})),
    "an archive of torch": lambda path: torch.save(Malicious(), path),
    "an archive of torch with a state": lambda path: torch.save({"state_dict": {"head.weight": Malicious()}}, path),
    "an old archive of torch": lambda path: torch.save(Malicious(), path, _use_new_zipfile_serialization=False),
    "a state of text": lambda path: torch.save({"head.weight": "text"}, path),
    "a state of numbers": lambda path: torch.save({"head.weight": 3}, path),
    "a list": lambda path: torch.save([torch.zeros(3)], path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "a state by number": lambda path: torch.save({3: torch.zeros(3)}, path),
    "a state of none": lambda path: torch.save({"state_dict": None}, path),
    "an empty state": lambda path: torch.save({}, path),
    "a state of sparse tensors": lambda path: torch.save({"head.weight": torch.zeros(10, 8).to_sparse()}, path),
    "a state of complex numbers": lambda path: torch.save(
        {"head.weight": torch.zeros(10, 8, dtype=torch.complex64)}, path
    ),
}


def _writes(make: Callable[[Path], object]) -> Callable[[Path, Stock], None]:
    return lambda folder, stock: make(folder / "bad.pth") and None  # type: ignore[func-returns-value]


def _beside(make: Callable[[Path], object]) -> Callable[[Path, Stock], None]:
    """In a copy of a run, beside its card."""

    def lay(folder: Path, stock: Stock) -> None:
        make(stock.copy("run", folder / "here") / "bad.pth")

    return lay


def _odds(folder: Path, stock: Stock) -> None:
    (folder / "folder.csv").mkdir()
    (folder / "nonsense").mkdir()
    (folder / "nonsense/bench.json").write_text('{"a": 1}')


def _of_run(name: str, words: tuple[str, ...], damage: Damage, verdict: Verdict) -> Case:
    return Case(name, words, verdict, ("here", "digits", "unknown task"), _laid("run", damage))


def _of_comparison(name: str, words: tuple[str, ...], damage: Damage, verdict: Verdict) -> Case:
    return Case(name, words, verdict, ("here", "configuration", "different images"), _laid("comparison", damage))


def _in_run(damage: Damage) -> Damage:
    return lambda root: damage(root / "runs/ska-seed0")


def _copied(name: str) -> Damage:
    return lambda root: shutil.copytree(root / "runs/ska-seed0", root / "runs" / name)


def _laid(name: str, damage: Damage) -> Callable[[Path, Stock], None]:
    def lay(folder: Path, stock: Stock) -> None:
        damage(stock.copy(name, folder / "here"))

    return lay
