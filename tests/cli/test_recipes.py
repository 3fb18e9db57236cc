import json
from functools import wraps

import pytest
import timm
import yaml

from dense_folders import SQUARE, coco_mark, make_coco, make_masks
from image_folders import make_folder
from statickey.cli import main
from statickey.cli.parser import RECIPES, recipes
from statickey.compare import compare
from statickey.tasks import TASKS, ClassificationRecipe, DetectionRecipe, RepairRecipe

PROMISED = {
    "classify": {
        "digits",
        "cifar10-cpu",
        "cifar10-paper",
        "cifar10-modern",
        "imagenet-s18",
        "imagenet-b36",
        "finetune",
    },
    "detect": {"coco-maskrcnn-1x", "coco-maskrcnn-3x", "coco-cascade-3x", "bccd"},
    "segment": {"ade20k-upernet", "camvid"},
    "repair": {"repair"},
}
KEPT = {
    "classify": ("opt", "auto_augment"),
    "detect": ("opt", "scale", "arch", "max_size"),
    "segment": ("opt", "scale", "decoder", "loss"),
    "repair": ("opt", "match"),
}
"""What stays as the recipe says when it is made tiny."""
SMALL = {"depths": [1, 1, 1, 1], "dims": [16, 32, 32, 32]}


def content(name):
    return yaml.safe_load((RECIPES / f"{name}.yaml").read_text())


def recipe_of(name):
    values = content(name)
    return TASKS[values.pop("task", "classify")].recipe_class(**values)


def tiny(recipe, folder):
    """Options that make a recipe small: one step, on images of a folder or of the package."""
    words = ["--epochs", "1", "--cooldown-epochs", "0", "--warmup-epochs", "0"]
    if "former" in recipe.model:
        words += ["--model", f"{recipe.model.partition('_')[0]}_nano"]
        words += [word for name, value in SMALL.items() for word in (f"--model-args.{name}", str(value))]
    if isinstance(recipe, RepairRecipe):
        return [*words, "--batch-size", "4", "--limit", "40", *converted(folder)]
    if isinstance(recipe, ClassificationRecipe):
        words += ["--batch-size", "4", "--holdout", "0.2"]
        if recipe.data == "digits":
            words += ["--limit", "40"]
        else:
            words += ["--data", str(make_folder(folder, per_class=4, size=(32, 32))), "--img-size", "32"]
            words += ["--limit", "8"] if recipe.limit is not None else []
        if "former" not in recipe.model:
            words += ["--model-args.depth", "1"]
        return words + (["--model-args.patch_size", "8"] if "patch16" in recipe.model else [])
    words += ["--batch-size", "1", "--holdout", "0.5", "--img-size", "32"]
    words += ["--limit", "2"] if recipe.data == "scenes" else []
    if isinstance(recipe, DetectionRecipe):
        words += ["--channels", "8", "--train-size", "32"]
        marks = [coco_mark(1, segmentation=[SQUARE])]
        return words if recipe.data == "scenes" else [*words, "--data", str(make_coco(folder, marks, marks))]
    words += ["--decoder-channels", "16", "--crop-size", "32"]
    return words if recipe.data == "scenes" else [*words, "--data", str(make_masks(folder))]


def converted(folder):
    """The options that name a tiny network and what it was converted of."""
    teacher, student = str(folder / "teacher"), str(folder / "student")
    tiny = ["--limit", "40", "--epochs", "1", "--model-args.depth", "1", "--accelerator", "cpu"]
    assert main(["train", *tiny, "--out", teacher]) == 0
    fit = ["--fit", "mean", "--num-images", "8", "--accelerator", "cpu"]
    assert main(["convert", teacher, *fit, "--out", student]) == 0
    return ["--teacher", teacher, "--student", student]


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr("statickey.data.scenes.TEST_SCENES", 2)


def test_the_recipes_that_are_promised_are_there():
    assert {name for names in PROMISED.values() for name in names} <= set(recipes())
    for task, names in PROMISED.items():
        assert all(content(name).get("task", "classify") == task for name in names)


LIKE_OTHERS = {"coco-maskrcnn-3x", "coco-cascade-3x", "imagenet-b36"}
"""Recipes of longer schedules or wider networks than one that the suite runs."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LIKE_OTHERS else ()) for name in recipes()]
)
def test_recipe_trains_one_step(name, tmp_path, monkeypatch, capsys):
    """Through the real command, on tiny data; what the recipe says about training stays as it is."""
    monkeypatch.chdir(tmp_path)
    text = (RECIPES / f"{name}.yaml").read_text()
    for word in ("# command:", "# hardware:", "# score:"):
        assert word in text
    recipe = recipe_of(name)
    assert timm.is_model(recipe.model)
    words = ["train", "--config", name, *tiny(recipe, tmp_path / "data"), "--accelerator", "cpu"]
    assert main([*words, "--out", "out"]) == 0
    capsys.readouterr()
    result = json.loads((tmp_path / "out" / "run.json").read_text())
    assert result["task"] == content(name).get("task", "classify")
    for option in KEPT[result["task"]]:
        assert result["config"][option] == recipe.to_dict()[option]
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["epochs"] == 1
    assert main(["train", "--config", "out/config.yaml", "--out", "again"]) == 0
    again = json.loads((tmp_path / "again" / "run.json").read_text())
    assert again["curve"][0]["train_loss"] == result["curve"][0]["train_loss"]


@pytest.mark.parametrize("name", sorted(PROMISED["detect"] | PROMISED["segment"]))
def test_no_key_of_a_dense_recipe_grows_with_the_image(name):
    """Keys on more tokens than they were built for would cost the square of them."""
    recipe = recipe_of(name)
    assert not recipe.model_args.keys() & {"off_grid", "key_size"}  # which mixers without a static key refuse
    assert recipe.off_grid in ("pool", "window") and recipe.train_size in (None, 224)


@pytest.mark.parametrize("name", recipes())
def test_recipe_compares_in_its_task(name, monkeypatch):
    calls = []

    @wraps(compare)
    def record(recipe, **options):
        calls.append((recipe, options))

    monkeypatch.setattr("statickey.cli.compare.compare", record)
    assert main(["compare", "--config", name, "--mixers", "mhsa", "ska", "--seeds", "3"]) == 0
    ((recipe, options),) = calls
    assert recipe == recipe_of(name)
    assert (options["mixers"], options["seeds"]) == (["mhsa", "ska"], [3])


def test_train_evaluate_predict_through_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = make_folder(tmp_path / "data", per_class=6, size=(16, 16))
    tiny = ["--epochs", "1", "--batch-size", "4", "--model-args.embed_dim", "16", "--model-args.depth", "1"]
    assert (
        main(["train", "--data", str(data), "--mixer", "fcska", *tiny, "--accelerator", "cpu", "--out", "run"]) == 0
    )
    assert main(["evaluate", "run", "--accelerator", "cpu", "--img-size", "24"]) == 0
    assert "top-1" in capsys.readouterr().out
    assert main(["predict", "run", str(data / "val"), "--out", "p.json", "--accelerator", "cpu"]) == 0
    assert len(json.loads((tmp_path / "p.json").read_text())) == 12
    (data / "val" / "a" / "bad.png").write_bytes(b"nope")
    capsys.readouterr()
    assert main(["predict", "run", str(data / "val"), "--accelerator", "cpu"]) == 1
    assert "bad.png" in capsys.readouterr().out


FILES = {"typo.yaml": "lrr: 3\n", "broken.yaml": "lr: [\n", "list.yaml": "- lr\n", "good.yaml": "epochs: 0\n"}
WRONG = {
    "recipe": (["train", "--config", "nope"], "unknown recipe 'nope'; choose one of ade20k-upernet,"),
    "no file": (["train", "--config=nope.yaml"], ", or give a YAML file"),
    "not for recipes": (["evaluate", "run", "--config", "digits"], "no file 'digits'; give a YAML file"),
    "key in a file": (["train", "--config", "typo.yaml"], "typo.yaml: unknown option 'lrr'; did you mean lr"),
    "broken file": (["train", "--config", "broken.yaml"], "broken.yaml: while parsing"),
    "no options": (["train", "--config", "list.yaml"], "list.yaml: the content is ['lr']; it must map names"),
    "value": (["train", "--config", "good.yaml"], "epochs=0 must be a positive integer"),
    "option": (["train", "--epoch-s", "3"], "unknown option 'epoch_s'; did you mean epochs"),
    "no such option": (["predict", "run", "x.png", "--zzzzz"], "unknown option 'zzzzz'; known: "),
    "mixer": (["train", "--mixer", "skaa"], "unknown mixer 'skaa'"),
    "run": (["evaluate", "nowhere"], "there is no 'nowhere'; give the folder"),
    "files": (["predict", "nowhere", "x.png"], "there is no 'nowhere'; give the folder"),
    "accelerator": (["train", "--accelerator", "abacus"], "accelerator='abacus'"),
    "stream": (["compare", "--stream", "true"], "a comparison keeps its images in memory"),
    "devices": (["compare", "--devices", "2"], "a comparison's run is on one device"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line_and_exit_2(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    words, message = WRONG[case]
    assert main(words) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == set(FILES)


@pytest.mark.parametrize("command", ["compare", "train", "evaluate", "predict"])
def test_help_lists_recipes_where_they_can_be_used(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert ("imagenet-s18" in capsys.readouterr().out) == (command in ("compare", "train"))
