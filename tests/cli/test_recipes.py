import json

import pytest
import timm
import yaml

from image_folders import make_folder
from statickey.cli import main
from statickey.cli.parser import RECIPES, recipes
from statickey.tasks import ClassificationRecipe


def test_the_recipes_that_are_promised_are_there():
    promised = {
        "digits",
        "cifar10-cpu",
        "cifar10-paper",
        "cifar10-modern",
        "imagenet-s18",
        "imagenet-b36",
        "finetune",
    }
    assert promised <= set(recipes())


@pytest.mark.parametrize("name", recipes())
def test_recipe_trains_one_step(name, tmp_path, monkeypatch, capsys):
    """Through the real command, on tiny data; what the recipe says about training stays as it is."""
    monkeypatch.chdir(tmp_path)
    text = (RECIPES / f"{name}.yaml").read_text()
    for word in ("# command:", "# hardware:", "# score:"):
        assert word in text
    recipe = ClassificationRecipe(**yaml.safe_load(text))
    assert timm.is_model(recipe.model)
    tiny = [
        "--epochs",
        "1",
        "--cooldown-epochs",
        "0",
        "--warmup-epochs",
        "0",
        "--batch-size",
        "4",
        "--holdout",
        "0.2",
    ]
    if recipe.data != "digits":
        tiny += ["--data", str(make_folder(tmp_path / "data", per_class=4, size=(32, 32))), "--img-size", "32"]
    if "s18" in recipe.model or "b36" in recipe.model:
        tiny += ["--model", "cskaformer_nano"]
    elif timm.is_model(recipe.model):
        tiny += ["--model-args.depth", "1"] + (["--model-args.patch_size", "8"] if "patch16" in recipe.model else [])
    tiny += ["--limit", "40"] if recipe.data == "digits" else []
    if recipe.limit is not None:
        tiny += ["--limit", "8"]
    assert main(["train", "--config", name, *tiny, "--accelerator", "cpu", "--out", "out"]) == 0
    capsys.readouterr()
    result = json.loads((tmp_path / "out" / "run.json").read_text())
    assert result["config"]["opt"] == recipe.opt
    assert result["config"]["auto_augment"] == recipe.auto_augment
    config = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert config["epochs"] == 1
    assert main(["train", "--config", "out/config.yaml", "--out", "again"]) == 0
    again = json.loads((tmp_path / "again" / "run.json").read_text())
    assert again["curve"][0]["train_loss"] == result["curve"][0]["train_loss"]


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
    "recipe": (["train", "--config", "nope"], "unknown recipe 'nope'; choose one of cifar10-cpu,"),
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
