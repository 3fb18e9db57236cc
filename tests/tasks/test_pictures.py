"""Pictures of held-out images beside the curves: what TensorBoard gets, and that training does not notice."""

import io

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from scenes import rectangles
from statickey.tasks import ClassificationRecipe, DetectionRecipe, Machine, SegmentationRecipe, train
from statickey.tasks.dense import DenseTask
from statickey.tasks.pictures import is_due

SMALL = {"model": "small_vit", "model_args": {"depth": 1, "embed_dim": 16, "num_heads": 2, "drop_path_rate": 0.1}}
COMMON = {"batch_size": 4, "holdout": 0.25, "epochs": 2, **SMALL}
RECIPES = {
    "segment": SegmentationRecipe(limit=8, decoder_channels=16, crop_size=32, img_size=40, **COMMON),
    "detect": DetectionRecipe(data="rectangles", channels=8, lr=1e-3, **COMMON),
}


@pytest.fixture(autouse=True)
def small_data(monkeypatch):
    monkeypatch.setattr("statickey.data.scenes.TEST_SCENES", 2)
    monkeypatch.setattr(
        "statickey.tasks.detection.open_detection", lambda data, **options: rectangles(train=8, test=2)
    )


def trained(recipe, out, **options):
    train(recipe, out=str(out), machine=Machine(accelerator="cpu"), console=Console(file=io.StringIO()), **options)
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"images": 0}).Reload()
    return {tag: events.Images(tag) for tag in events.Tags()["images"]}


@pytest.mark.parametrize("task", RECIPES)
def test_held_out_images_are_shown_and_weights_stay(task, tmp_path, monkeypatch):
    shown = trained(RECIPES[task], tmp_path / "with", mixer="ska")
    assert list(shown) == ["held-out/1", "held-out/2"]  # as many as are held out
    for pictures in shown.values():
        assert [picture.step for picture in pictures] == [1, 2]
        assert all(picture.width > 400 for picture in pictures)
    monkeypatch.setattr(DenseTask, "pictured", False)
    assert not trained(RECIPES[task], tmp_path / "without", mixer="ska")
    for name in ("model.safetensors", "model_ema.safetensors"):
        one, other = (load_file(tmp_path / folder / name) for folder in ("with", "without"))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_a_classifier_has_none(tmp_path):
    assert not trained(ClassificationRecipe(limit=40, **COMMON | {"epochs": 1}), tmp_path)


@pytest.mark.parametrize("epochs", [1, 7, 10, 12, 100, 310])
def test_pictures_come_ten_times_a_run(epochs):
    due = [epoch for epoch in range(1, epochs + 1) if is_due(epoch, epochs)]
    assert len(due) == min(epochs, 10)
    assert due[-1] == epochs
    steps = {later - earlier for earlier, later in zip([0, *due[:-1]], due, strict=True)}
    assert max(steps) - min(steps) <= 1
