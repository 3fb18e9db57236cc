"""The engine serves a task that knows no label: here, how bright an image is."""

import csv
import io
import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from PIL import Image
from rich.console import Console
from torchvision.transforms.v2.functional import pil_to_tensor

from statickey.compare import compare
from statickey.data import Augmentation, ImageDataModule, load_images
from statickey.errors import StaticKeyError
from statickey.models import build_model
from statickey.tasks import (
    TASKS,
    Answer,
    Machine,
    Metric,
    ModelCard,
    Recipe,
    Task,
    evaluate,
    facts_table,
    load_model,
    predict,
    task_named,
    train,
)

CPU = Machine(accelerator="cpu")


@dataclass(frozen=True, kw_only=True)
class BrightnessRecipe(Recipe):
    """Adds what a task may add."""

    img_size: int | None = None
    weight: float = 0.5


@dataclass(frozen=True)
class Errors:
    said: np.ndarray
    truth: np.ndarray

    @property
    def num_images(self):
        return len(self.truth)

    def value(self, image_weights=None):
        return float(np.average(np.abs(self.said - self.truth), weights=image_weights))

    def arrays(self):
        return {"said": self.said, "truth": self.truth}


class Brightness(Task):
    name = "brightness"
    metric = Metric("error", "mean error", unit="", higher_is_better=False)
    recipe_class = BrightnessRecipe

    def read_data(self, recipe):
        return replace(load_images(recipe.data, limit=recipe.limit), class_names=("brightness",))

    def data_module(self, recipe, data, seed, num_workers=0):
        plain = Augmentation(crop_padding=0, flip=False, label_smoothing=0.0)
        return ImageDataModule(
            data, augmentation=plain, batch_size=recipe.batch_size, seed=seed, holdout=recipe.holdout
        )

    def settled(self, recipe, data):
        return recipe if recipe.lr is not None else BrightnessRecipe(**recipe.to_dict() | {"lr": 1e-3})

    def build(self, recipe, data, mixer, seed):
        return build_model(
            "small_vit", mixer, img_size=8, num_classes=1, in_chans=1, seed=seed, model_args=recipe.model_args
        )

    def input_size(self, recipe, data):
        return 1, 8, 8

    def card(self, recipe, data, module, mixer):
        names = data.class_names
        return ModelCard("small_vit", mixer, recipe.model_args, 8, 1, names, (0.0,), (1.0,), task=self.name)

    def examples(self, data, module, split, number):
        images = data.test.images[:number]
        return list(images), module.normalize(images), ["an image"] * number

    def losses(self, model, batch, recipe):
        said, truth = self.outputs(model, batch)
        return {"square": F.mse_loss(said, truth), "size": recipe.weight * said.abs().mean() * 1e-3}

    def outputs(self, model, batch):
        return model(batch[0]).float()[:, 0], batch[0].mean(dim=(1, 2, 3))

    def validation_metric(self, data):
        return torchmetrics.MeanAbsoluteError()

    def evidence(self, outputs, targets):
        return Errors(torch.cat(list(outputs)).numpy(), torch.cat(list(targets)).numpy())

    def evidence_from(self, arrays):
        return Errors(arrays["said"], arrays["truth"])

    def evaluation(self, class_names):
        found = []

        def errors():
            return self.evidence(*zip(*found, strict=True))

        return SimpleNamespace(
            update=lambda outputs, targets: found.append((outputs, targets)),
            to_json=lambda: {"images": errors().num_images, "error": errors().value()},
            rows=lambda: {"mean error": f"{errors().value():.3f}"},
            per_class=lambda: [{"class": class_names[0], "error": errors().value()}],
            figures=dict,
            results=lambda data: None,
        )

    def predictor(self, model, card, *, img_size, top_k):
        def read(path):
            with Image.open(path) as file:
                return pil_to_tensor(file.convert("L").resize((8, 8)))

        return SimpleNamespace(
            read=read,
            prepare=lambda pixels: torch.stack(pixels).float() / 255,
            batch_size=8,
            predict=lambda images: [Answer({"brightness": value.item()}) for value in model(images)[:, 0]],
            title=lambda row: f"{row['brightness']:.2f}",
            csv=lambda rows: (list(rows[0]), rows),
            table=lambda rows: facts_table("brightness", {row["file"]: str(row["brightness"]) for row in rows}),
        )


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(TASKS, "brightness", Brightness())


def recipe(**options):
    small = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    return BrightnessRecipe(limit=200, epochs=3, batch_size=32, model_args=small, **options)


def test_train_and_evaluate(tmp_path):
    text = io.StringIO()
    result = train(recipe(), mixer="ska", out=str(tmp_path), machine=CPU, console=Console(file=text, width=100))
    assert result["task"] == "brightness"
    assert result["error"] < 0.5
    rows = list(csv.DictReader((tmp_path / "curve.csv").open()))
    assert float(rows[-1]["train_loss"]) == pytest.approx(
        float(rows[-1]["train_square"]) + float(rows[-1]["train_size"])
    )
    assert float(rows[-1]["holdout_error"]) < 0.5
    assert "held-out 0." in text.getvalue()
    assert "mean error, 360 test images" in text.getvalue()
    assert load_model(tmp_path)[1].task == "brightness"
    found = evaluate(str(tmp_path), accelerator="cpu", console=Console(file=io.StringIO()))
    assert found["error"] == pytest.approx(result["error"])


def test_predict(tmp_path):
    train(recipe(), mixer="ska", out=str(tmp_path / "run"), machine=CPU, console=Console(file=io.StringIO()))
    Image.new("L", (9, 9), 200).save(tmp_path / "light.png")
    text = io.StringIO()
    found = predict(
        str(tmp_path / "run"),
        str(tmp_path / "light.png"),
        out=str(tmp_path / "said.csv"),
        attention=str(tmp_path / "maps"),
        accelerator="cpu",
        console=Console(file=text, width=200),
    )
    (row,) = found.rows
    assert row["attention"] == str(tmp_path / "maps" / "light.png")
    assert (tmp_path / "maps" / "light.png").is_file()
    (line,) = csv.DictReader((tmp_path / "said.csv").open())
    assert float(line["brightness"]) == pytest.approx(row["brightness"])
    assert "light.png" in text.getvalue()


def test_compare(tmp_path):
    text = io.StringIO()
    summary = compare(
        recipe(),
        mixers=["mhsa", "ska"],
        seeds=[0, 1],
        out=str(tmp_path),
        machine=CPU,
        console=Console(file=text, width=200),
    )
    assert "mean error" in text.getvalue()
    assert "accuracy" not in text.getvalue()
    assert summary["mixers"][1]["difference"] is not None
    page = (tmp_path / "report.html").read_text()
    assert "mean error" in page
    assert "accuracy" not in page.split("<svg")[0]
    assert json.loads((tmp_path / "summary.json").read_text())["mixers"][0]["error_mean"] < 0.5


class OwnNetwork(torch.nn.Module):
    """Of no registry."""

    def __init__(self):
        super().__init__()
        self.line = torch.nn.Linear(64, 1)

    def forward(self, images):
        return self.line(images.flatten(1))


class WithOwnNetwork(Brightness):
    def build(self, recipe, data, mixer, seed):
        torch.manual_seed(seed)
        return OwnNetwork()

    def rebuild(self, card, img_size=None):
        return OwnNetwork()


def test_a_network_of_no_registry(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "brightness", WithOwnNetwork())
    result = train(recipe(), out=str(tmp_path), machine=CPU, console=Console(file=io.StringIO()))
    found = evaluate(str(tmp_path), accelerator="cpu", console=Console(file=io.StringIO()))
    assert found["error"] == pytest.approx(result["error"])


def test_tasks_that_cannot_be_told_apart(monkeypatch):
    other = Brightness()
    other.name = "other"
    monkeypatch.setitem(TASKS, "other", other)
    with pytest.raises(StaticKeyError, match="the tasks brightness and other share BrightnessRecipe"):
        train(recipe(), out="nowhere")
    monkeypatch.setitem(TASKS, "another", other)
    with pytest.raises(
        StaticKeyError, match=r"TASKS\['another'\] calls itself 'other'; register it under its own name"
    ):
        task_named("another")


def test_a_task_without_a_learning_rate(tmp_path, monkeypatch):
    monkeypatch.setattr(Brightness, "settled", Task.settled)
    with pytest.raises(StaticKeyError, match="task 'brightness' knows no default for lr; give one"):
        train(recipe(), out=str(tmp_path), machine=CPU, console=Console(file=io.StringIO()))


def test_a_recipe_of_no_task():
    with pytest.raises(
        StaticKeyError, match=r"recipe is a Recipe, which is of no task; use ClassificationRecipe, .*Bri"
    ):
        train(Recipe(), out="nowhere")
