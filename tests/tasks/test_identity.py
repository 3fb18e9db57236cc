"""What tells runs apart: what differs from the defaults, the content of data and weights, never a path."""

from dataclasses import dataclass

import pytest

from statickey.errors import OutputError, StaticKeyError
from statickey.tasks import ClassificationRecipe, Machine, difference, identities

OTHERS = {"mixer": "ska", "seed": 0, "score_on": "test"}


@dataclass(frozen=True, kw_only=True)
class LaterRecipe(ClassificationRecipe):
    """Has an option more, as a later version will."""

    new_option: float = 0.5


def identity(recipe, data="data", **others):
    return identities(recipe, "classify", data, OTHERS | others)


def test_a_new_option_leaves_older_folders_their_identity():
    before, first_version = identity(ClassificationRecipe(epochs=3))
    after = identity(LaterRecipe(epochs=3))
    assert after == (before, first_version)
    assert identity(LaterRecipe(epochs=3, new_option=0.1))[0] != before
    assert len(identity(LaterRecipe(epochs=3, new_option=0.1))) == 1  # version 0.1 had no such run


def test_what_counts():
    base = identity(ClassificationRecipe())[0]
    assert identity(ClassificationRecipe(data="elsewhere", data_dir="there"))[0] == base
    assert identity(ClassificationRecipe(epochs=14))[0] == base
    different = [
        identity(ClassificationRecipe(epochs=15)),
        identity(ClassificationRecipe(model_args={"depth": 2})),
        identity(ClassificationRecipe(), data="others"),
        identity(ClassificationRecipe(), seed=1),
        identity(ClassificationRecipe(), mixer="mhsa"),
        identity(ClassificationRecipe(), score_on="holdout"),
    ]
    assert len({base, *(ids[0] for ids in different)}) == 7


def test_one_number_is_one_identity():
    assert identity(ClassificationRecipe(weight_decay=1)) == identity(ClassificationRecipe(weight_decay=1.0))


def test_weights_count_by_their_content(tmp_path):
    first, moved, other = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors"))
    first.write_bytes(b"same")
    moved.write_bytes(b"same")
    other.write_bytes(b"other")
    ids = [identity(ClassificationRecipe(weights=str(path)))[0] for path in (first, moved, other)]
    assert ids[0] == ids[1] != ids[2]
    with pytest.raises(OutputError, match=r"no weights file 'nowhere' .*; give a .safetensors file"):
        identity(ClassificationRecipe(weights="nowhere"))


def test_differences_take_missing_options_for_their_defaults():
    defaults = {"epochs": 14, "new_option": 0.5}
    assert difference({"epochs": 3}, {"epochs": 3, "new_option": 0.5}, defaults) == ""
    assert difference({"epochs": 3}, {"epochs": 3, "new_option": 1}, defaults) == "new_option: 0.5 there, 1 here"
    assert difference({"gone": 1}, {}, defaults) == "gone: 1 there, absent here"
    assert difference({"out": "a"}, {"out": "b"}, defaults, besides=("out",)) == ""


WRONG = {
    "text for a number": ({"epochs": "3"}, "epochs='3' must be a whole number"),
    "bool for a number": ({"batch_size": True}, "batch_size=True must be a whole number"),
    "float for a count": ({"epochs": 3.0}, "epochs=3.0 must be a whole number"),
    "none": ({"ema_decay": None}, "ema_decay=None must be a finite number"),
    "infinite": ({"lr": float("inf")}, "lr=inf must be a finite number"),
    "nan": ({"weight_decay": float("nan")}, "weight_decay=nan must be a finite number"),
    "text for yes or no": ({"flip": "no"}, "flip='no' must be true or false"),
    "numbers": ({"mean": ("a",)}, r"mean=\('a',\) must be a list of finite numbers"),
    "negative spread": ({"std": (-1.0,)}, r"std=\(-1.0,\) must be positive numbers, one per channel"),
    "above the peak": ({"lr": 0.1, "min_lr": 10.0}, "min_lr=10.0 must not exceed the peak, lr=0.1"),
    "choice": ({"on_bad_image": "warn"}, "on_bad_image='warn' must be 'fail' or 'skip'"),
    "names": ({"model_args": [1]}, r"model_args=\[1\] must be names and their values"),
}


@pytest.mark.parametrize("case", WRONG)
def test_recipes_of_wrong_values(case):
    options, message = WRONG[case]
    with pytest.raises(StaticKeyError, match=message):
        ClassificationRecipe(**options)


def test_machines_of_wrong_values():
    with pytest.raises(StaticKeyError, match="devices='2' must be a whole number"):
        Machine(devices="2")
    with pytest.raises(StaticKeyError, match="compile=1 must be true or false"):
        Machine(compile=1)
