"""Values of wrong types from Python: a StaticKeyError in one line, or a value that may stand."""

import dataclasses
import datetime
from pathlib import Path

import pytest
from trial_stock import Stock

from statickey.compare import compare
from statickey.errors import StaticKeyError
from statickey.layers import MIXERS
from statickey.models import Swap, build_model
from statickey.summary import summary
from statickey.tasks import ClassificationRecipe, Machine, Recipe, evaluate, predict, train

VALUES = [
    *(None, "", "many", "ünïcødé", b"bytes", 0, -1, 1.5, 10**23, -(10**23), True, 1j),
    *(float("nan"), float("inf"), [], ["x"], [1, None], {}, {"a": 1}, {1: 2}, (), set(), object(), object, len),
    *(datetime.date(2020, 2, 2), Path("x"), range(3), [[1]], "a\0b"),
]
TINY = ClassificationRecipe(limit=40, epochs=1, model_args={"depth": 1, "embed_dim": 8, "num_heads": 2})
CPU = Machine(accelerator="cpu")
TEXTS = {"data", "data_dir", "model", "weights", "accelerator"}
"""Any text may be one of these, until it is looked up."""


def one_line(error):
    assert "\n" not in str(error.value)
    assert str(error.value)


@pytest.mark.parametrize("cls", [ClassificationRecipe, Recipe, Machine])
def test_options_of_wrong_types(cls):
    for field in dataclasses.fields(cls):
        for value in VALUES:
            try:
                made = cls(**{field.name: value})
            except StaticKeyError as error:
                assert "\n" not in str(error), (field.name, value)
                assert field.name in str(error) or repr(value) in str(error), (field.name, value, error)
            else:
                _check_kept(field, value, getattr(made, field.name))


def _check_kept(field, value, kept):
    """What was taken is of the field's type, and small enough to count with."""
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    assert kept == (tuple(value) if isinstance(value, list) else value)
    if isinstance(default, bool):
        assert isinstance(value, bool)
    elif isinstance(default, int):
        assert isinstance(value, int) and not isinstance(value, bool)
        assert abs(value) < 2**63
    elif isinstance(default, float):
        assert isinstance(value, int | float)
    elif isinstance(default, str):
        assert isinstance(value, str)
        assert field.name in TEXTS or value == default, (field.name, value)


@pytest.mark.parametrize("name", ["mixer", "seed", "out", "resume", "logger", "score_on", "recipe", "machine"])
def test_train_of_wrong_types(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in VALUES:
        right = {"seed": (0,), "mixer": (None,), "recipe": (None,), "machine": (None,)}.get(name, ())
        if value in right or (name == "seed" and value is not True and value == 0):
            continue
        if name == "out" and isinstance(value, str | Path) and str(value):
            continue
        with pytest.raises(StaticKeyError) as error:
            train(**{"recipe": TINY, "machine": CPU, "out": "run"} | {name: value})
        one_line(error)
        assert not list(tmp_path.iterdir()), (name, value)


@pytest.mark.parametrize("name", ["mixers", "seeds", "out", "score_on", "recipe", "machine"])
def test_compare_of_wrong_types(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in VALUES:
        if value is None and name in ("mixers", "seeds", "recipe", "machine"):
            continue
        if (name == "out" and isinstance(value, str | Path) and str(value)) or (
            name == "seeds" and value == range(3)
        ):
            continue
        with pytest.raises(StaticKeyError) as error:
            compare(**{"recipe": TINY, "machine": CPU, "mixers": ["ska"], "seeds": [0], "out": "c"} | {name: value})
        one_line(error)
        assert not list(tmp_path.iterdir()), (name, value)


def test_a_text_is_no_list_of_mixers(tmp_path):
    with pytest.raises(StaticKeyError, match="mixers='ska' must be a list"):
        compare(TINY, mixers="ska", out=str(tmp_path / "c"))


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return Stock.make(tmp_path_factory.mktemp("stock"))


@pytest.mark.parametrize("name", ["source", "data", "data_dir", "split", "img_size", "ema", "out", "accelerator"])
def test_evaluate_of_wrong_types(name, stock, tmp_path, monkeypatch):
    _refused_or_run(evaluate, name, {"source": str(stock.run), "accelerator": "cpu"}, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", ["source", "files", "top_k", "img_size", "ema", "out", "attention", "layer"])
def test_predict_of_wrong_types(name, stock, tmp_path, monkeypatch):
    arguments = {"source": str(stock.run), "files": str(stock.folder / "val/a/0.png"), "accelerator": "cpu"}
    if name == "layer":
        arguments["attention"] = "pictures"
    _refused_or_run(predict, name, arguments, tmp_path, monkeypatch)


def _refused_or_run(command, name, arguments, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for value in VALUES:
        try:
            command(**arguments | {name: value})
        except StaticKeyError as error:
            assert "\n" not in str(error), (name, value)
        else:
            assert value is None or isinstance(value, str | Path) or value in (0, True), (name, value)


def test_one_file_may_be_given_as_text(stock):
    with pytest.raises(StaticKeyError, match=r"cannot read 'nope\.jpg': No such file"):
        predict(str(stock.run), "nope.jpg")
    assert len(predict(str(stock.run), str(stock.folder / "val/a/0.png")).rows) == 1


@pytest.mark.parametrize("name", ["csv", "markdown"])
@pytest.mark.parametrize("value", [Path("a\0b"), Path("\udcff")])
def test_paths_that_are_no_names_of_files(name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StaticKeyError, match=rf"^{name}='.*' holds a null character or is not UTF-8"):
        summary(["skaformer_nano"], **{name: value})


@pytest.mark.parametrize("name", ["models", "img_size", "csv", "markdown"])
def test_summary_of_wrong_types(name, tmp_path, monkeypatch):
    _refused_or_run_summary(name, tmp_path, monkeypatch)


def _refused_or_run_summary(name, folder, monkeypatch):
    monkeypatch.chdir(folder)
    for value in VALUES:
        if name == "models" and value in (None, "", [], (), {}, set()):
            continue
        try:
            summary(**{"models": ["skaformer_nano"]} | {name: value})
        except StaticKeyError as error:
            assert "\n" not in str(error), (name, value)
        else:
            assert value is None or isinstance(value, str | Path), (name, value)


@pytest.mark.parametrize("name", ["mixer", "img_size", "num_classes", "in_chans", "model_args"])
def test_build_model_of_wrong_types(name):
    for value in VALUES:
        arguments = {"mixer": "ska", "img_size": 8, "num_classes": 2, "in_chans": 1}
        try:
            build_model("small_vit", **arguments | {"model_args": TINY.model_args} | {name: value})
        except StaticKeyError as error:
            assert "\n" not in str(error), (name, value)
        else:
            assert value is None or value == {} or (name == "mixer" and value in MIXERS), (name, value)


@pytest.mark.parametrize(
    "mixer",
    [name if name in ("cska", "sepconv") else pytest.param(name, marks=pytest.mark.slow) for name in sorted(MIXERS)],
)
def test_mixer_arguments_of_wrong_types(mixer):
    for name in (
        "num_heads",
        "head_dim",
        "kernel_size",
        "scale",
        "attn_drop",
        "proj_drop",
        "qkv_bias",
        "learned_temperature",
    ):
        for value in VALUES:
            try:
                swap = Swap(mixer, mixer_args={name: value})
                build_model("small_vit", swap, img_size=8, num_classes=2, in_chans=1, model_args=TINY.model_args)
            except StaticKeyError as error:
                assert "\n" not in str(error), (name, value)
            else:
                assert (
                    value is None or isinstance(value, bool | float) or (name, value) == ("scale", -1) or value == 0
                ), (name, value)


@pytest.mark.parametrize(
    "args", [{"num_heads": 0}, {"embed_dim": 0}, {"head_dim": 0}, {"embed_dim": 8, "num_heads": 16}]
)
def test_a_head_has_a_width(args):
    with pytest.raises(StaticKeyError):
        build_model("small_vit", "ska", img_size=8, num_classes=2, in_chans=1, model_args=TINY.model_args | args)


@pytest.mark.parametrize(
    "layers", [value for value in VALUES if value not in (0, -1)], ids=lambda value: repr(value)[:20]
)
def test_layers_of_wrong_types(layers):
    with pytest.raises(StaticKeyError) as error:
        swap = Swap("ska", layers=layers)
        build_model(
            "vit_tiny_patch16_224", swap, img_size=32, num_classes=2, model_args={"depth": 1, "embed_dim": 12}
        )
    one_line(error)
