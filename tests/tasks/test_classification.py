import os

import lightning as L
import pytest
import torch
from torch import nn

from statickey.data import ImageData, LabelledImages
from statickey.errors import DivergedError, OutputError
from statickey.models import build_model
from statickey.tasks import AtomicCheckpointIO, Classification, ClassificationRecipe, TrainingModule


def images(count):
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(count))
    return LabelledImages(pixels.to(torch.uint8), torch.arange(count) % 4)


DATA = ImageData("noise", images(60), images(20), tuple("abcd"), 1, True)


def module():
    return Classification().data_module(ClassificationRecipe(batch_size=16), DATA, 0)


def task(seed=0, **recipe):
    args = {"embed_dim": 16, "depth": 2, "num_heads": 2, "drop_path_rate": 0.5}
    model = build_model("small_vit", "ska", img_size=8, in_chans=1, num_classes=4, model_args=args)
    return training(model, seed=seed, **recipe)


def training(model, seed=0, **recipe):
    learns = Classification()
    return TrainingModule(model, learns, learns.settled(ClassificationRecipe(**recipe), DATA), DATA, seed=seed)


def trainer(tmp_path, epochs, **kwargs):
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=tmp_path,
        **kwargs,
    )


def test_keys_positions_norms_and_biases_have_no_weight_decay():
    made = task()
    assert "blocks.1.attn.static_key" in made.model.no_weight_decay()
    made.trainer = type("T", (), {"estimated_stepping_batches": 10, "max_epochs": 2, "precision": "32-true"})()
    groups = {g["weight_decay"]: g["params"] for g in made.configure_optimizers()["optimizer"].param_groups}
    assert set(groups) == {0.0, 0.05}
    decayed = {id(p) for p in groups[0.05]}
    names = {n for n, p in made.model.named_parameters() if id(p) in decayed}
    assert "blocks.0.attn.qv.weight" in names
    assert not any("static_key" in n or "pos_embed" in n or "norm" in n or n.endswith("bias") for n in names)


def test_schedule_warms_up_and_ends_near_zero():
    made = task(warmup_epochs=1, epochs=4)
    made.trainer = type("T", (), {"estimated_stepping_batches": 40, "max_epochs": 4})()
    factors = [made._lr_factor(step) for step in range(40)]
    assert factors[0] < 0.1
    assert max(factors) == factors[10] == 1.0
    assert factors == sorted(factors[:11]) + sorted(factors[11:], reverse=True)
    assert factors[-1] < 0.01


def test_training_moves_weights_and_the_average_lags_behind(tmp_path):
    made = task()
    before = [p.clone() for p in made.model.parameters()]
    trainer(tmp_path, 2).fit(made, module())
    assert not any(torch.equal(a, b) for a, b in zip(before, made.model.parameters(), strict=True))
    pairs = zip(made.ema.module.parameters(), made.model.parameters(), strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)
    assert [row["epoch"] for row in made.curve] == [1, 2]
    assert made.curve[0]["images_per_second"] > 0


def test_resumed_run_ends_in_the_same_bits(tmp_path):
    whole = task(seed=3)
    trainer(tmp_path, 3).fit(whole, module())
    part = task(seed=3)
    first = trainer(tmp_path, 3)
    stop = type("Stop", (L.Callback,), {"on_train_epoch_end": lambda self, t, m: setattr(t, "should_stop", True)})
    first.callbacks.append(stop())
    first.fit(part, module())
    assert len(part.curve) == 1
    first.save_checkpoint(tmp_path / "a.ckpt")
    resumed = task(seed=3)
    torch.rand(11)  # the global random state is another one now
    trainer(tmp_path, 3).fit(resumed, module(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert len(resumed.curve) == 3
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


class Diverging(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 4)
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        out = self.linear(x.flatten(1))
        return out * float("nan") if self.calls > 4 else out


def test_loss_that_is_not_finite_names_epoch_and_step(tmp_path):
    made = training(Diverging(), lr=0.1)
    with pytest.raises(DivergedError, match=r"loss is nan at epoch 2, step 2 \(seed 0\); .* lower --lr \(now 0.1\)"):
        trainer(tmp_path, 3).fit(made, module())


def test_checkpoints_run_no_code_and_foreign_files_are_refused(tmp_path):
    io = AtomicCheckpointIO()
    path = tmp_path / "last.ckpt"
    io.save_checkpoint({"weights": torch.ones(3), "curve": [{"epoch": 1}]}, path)
    assert io.load_checkpoint(path)["curve"] == [{"epoch": 1}]
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OutputError, match=r"last.ckpt is not a .*; delete it"):
        io.load_checkpoint(path)
    torch.save(Diverging(), path)
    with pytest.raises(OutputError, match=r"not a whole checkpoint of this program \(checksum\)"):
        io.load_checkpoint(path)


def test_failed_save_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    io = AtomicCheckpointIO()
    path = tmp_path / "last.ckpt"
    io.save_checkpoint({"step": 1}, path)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="disk is full"):
        io.save_checkpoint({"step": 2}, path)
    monkeypatch.undo()
    assert io.load_checkpoint(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]
