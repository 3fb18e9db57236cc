"""A step whose loss is not finite is kept and taken again."""

import io
import json
import re

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from statickey.compare import compare
from statickey.data import scenes
from statickey.errors import DivergedError, OutputError
from statickey.tasks import (
    ClassificationRecipe,
    DetectionRecipe,
    Machine,
    SegmentationRecipe,
    TrainingModule,
    load_model,
    replay,
    train,
)

CPU = Machine(accelerator="cpu")
SMALL = {"model": "small_vit", "limit": 10, "batch_size": 4, "holdout": 0.2, "epochs": 2}
SMALL["model_args"] = {"depth": 1, "embed_dim": 16, "num_heads": 2, "drop_path_rate": 0.5}
RECIPES = {
    "classify": (ClassificationRecipe, {"limit": 40, "mixup": 0.2, "flip": True}, "cross_entropy"),
    "detect": (DetectionRecipe, {"channels": 8, "img_size": 48, "max_size": 64, "anchor_size": 4}, "loss_mask"),
    "segment": (
        SegmentationRecipe,
        {"decoder_channels": 16, "crop_size": 32, "loss": ("cross_entropy", "dice")},
        "dice",
    ),
}


def quiet():
    return Console(file=io.StringIO())


def trained(task, out, **changes):
    cls, settings, _ = RECIPES[task]
    train(cls(**SMALL | settings | changes), mixer="ska", seed=3, out=str(out), machine=CPU, console=quiet())


@pytest.fixture(autouse=True)
def few_scenes(monkeypatch):
    monkeypatch.setattr(scenes, "TEST_SCENES", 4)


def poisoned(monkeypatch, of, at=(0, 1)):
    """Spoil weights, or the images of a batch, before this step of this epoch; what the step then met."""
    step, met = TrainingModule.training_step, {}

    def spoils(self, batch, batch_idx):
        if (self.current_epoch, batch_idx) == at:
            name, broken = next(self.model.named_parameters()) if of == "weights" else ("", batch[0][0])
            if of != "nothing":
                broken.data[..., 0, 0] = float("nan")
            met["broken"] = name
            met["state"] = {name: value.clone() for name, value in self.model.state_dict().items()}
        try:
            return step(self, batch, batch_idx)
        finally:
            met["losses"] = {name: value.item() for name, value in self._step.losses.items()}

    monkeypatch.setattr(TrainingModule, "training_step", spoils)
    return met


@pytest.mark.parametrize("of", ["weights", "data"])
@pytest.mark.parametrize("task", RECIPES)
def test_the_step_is_kept_and_taken_again(task, of, tmp_path, monkeypatch):
    folder = tmp_path / "diverged"
    with monkeypatch.context() as patch:
        met = poisoned(patch, of)
        with pytest.raises(
            DivergedError, match=rf"^loss is nan at epoch 1, step 2 \(seed 3\); .*{re.escape(str(folder))}, .*replay"
        ):
            trained(task, tmp_path)
    facts = json.loads(
        (folder / "replay.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )
    assert (facts["task"], facts["seed"], facts["epoch"], facts["step"]) == (task, 3, 1, 2)
    assert facts["broken_weights"] == ([met["broken"]] if of == "weights" else [])
    assert {name: float(value) for name, value in facts["losses"]["0"].items()} == pytest.approx(
        met["losses"], nan_ok=True
    )
    for name, value in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(value, met["state"][name], rtol=0, atol=0, equal_nan=True)
    state = torch.get_rng_state()
    again = {name: value.item() for name, value in replay(folder).items()}
    assert torch.equal(torch.get_rng_state(), state)
    assert again == pytest.approx(met["losses"], rel=0, abs=0, nan_ok=True)
    assert not torch.tensor(list(again.values())).isfinite().all()
    if of == "data":
        load_model(folder)  # it is built as any network


@pytest.mark.parametrize("task", RECIPES)
def test_a_step_that_is_well_is_taken_again_to_the_bit(task, tmp_path, monkeypatch):
    """Masks and draws inside the network too, which a loss that is nan cannot show."""
    met = poisoned(monkeypatch, "nothing", at=(1, 1))
    real = TrainingModule._stop_all_unless

    def stops(self, finite, problem):
        here = (self._step.epoch, self._step.number) == (2, 2)
        return real(self, torch.tensor(False) if here else finite, problem)

    monkeypatch.setattr(TrainingModule, "_stop_all_unless", stops)
    with pytest.raises(DivergedError):
        trained(task, tmp_path)
    first, second = ({name: value.item() for name, value in replay(tmp_path / "diverged").items()} for _ in range(2))
    assert first == second == met["losses"]
    assert all(torch.tensor(value).isfinite() for value in first.values())


def test_weights_that_break_in_an_epochs_last_step(tmp_path, monkeypatch):
    end = TrainingModule.on_train_epoch_end

    def spoils(self):
        with torch.no_grad():
            next(self.model.parameters()).view(-1)[0] = float("inf")
        end(self)

    monkeypatch.setattr(TrainingModule, "on_train_epoch_end", spoils)
    with pytest.raises(
        DivergedError, match=r"is not finite after epoch 1 .*diverged, statickey.tasks.replay repeats"
    ):
        trained("classify", tmp_path)
    assert not replay(tmp_path / "diverged")["cross_entropy"].isfinite()


def test_a_comparison_keeps_it_with_the_run(tmp_path, monkeypatch):
    poisoned(monkeypatch, "data")
    cls, settings, _ = RECIPES["classify"]
    with pytest.raises(DivergedError, match="runs/ska-seed0/diverged"):
        compare(cls(**SMALL | settings), mixers=["ska"], seeds=[0], out=str(tmp_path), machine=CPU, console=quiet())


def test_a_step_that_cannot_be_kept_is_still_named(tmp_path, monkeypatch):
    poisoned(monkeypatch, "data")
    (tmp_path / "diverged").touch()
    with pytest.raises(DivergedError, match=r"^loss is nan .*; the step could not be kept: cannot write [^\n]*$"):
        trained("classify", tmp_path)


@pytest.fixture(scope="module")
def diverged(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        poisoned(patch, "data")
        with pytest.raises(DivergedError):
            trained("classify", out)
    return out / "diverged"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("replay.json", None, r"cannot read .*replay.json.*give the folder `diverged`"),
        ("replay.json", b"{}", r"replay.json is broken \(it has no 'task'\)"),
        ("config.json", b"{}", "config.json does not describe a network"),
        ("model.safetensors", b"torn", "is not whole"),
        ("batch-0.safetensors", None, "is not whole"),
        ("batch-0.safetensors", b"", "is not whole"),
    ],
)
def test_a_folder_that_is_not_whole(diverged, tmp_path, name, content, message):
    for path in diverged.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OutputError, match=message):
        replay(tmp_path)


def test_a_process_that_saw_nothing(diverged):
    with pytest.raises(OutputError, match="has no step of process 1; give one of 0"):
        replay(diverged, rank=1)
