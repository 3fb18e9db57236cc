"""Segmentation under the engine: trained, resumed, scored, compared, used on files."""

import io
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

from statickey.compare import compare
from statickey.data import IGNORE_INDEX
from statickey.errors import OutputError, StaticKeyError
from statickey.tasks import Machine, SegmentationRecipe, TrainingModule, evaluate, load_model, predict, train
from statickey.tasks.overlap import MeanIoU, Overlap
from statickey.tasks.segmentation import Segmentation

CPU = Machine(accelerator="cpu")
TASK = Segmentation()
VIT = {"depth": 1, "embed_dim": 16, "num_heads": 2}


def recipe(**changes):
    small = {"model": "small_vit", "model_args": VIT, "decoder_channels": 16, "limit": 12, "epochs": 2}
    return SegmentationRecipe(**small | {"batch_size": 4, "holdout": 0.25, "crop_size": 32, "img_size": 40} | changes)


def quiet():
    return Console(file=io.StringIO(), width=100)


def trained(out, **changes):
    return train(recipe(**changes), mixer="ska", out=str(out), machine=CPU, console=quiet())


@pytest.fixture(scope="module", autouse=True)
def few_scenes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("statickey.data.scenes.TEST_SCENES", 12)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory, few_scenes):
    folder = tmp_path_factory.mktemp("segment")
    return folder, trained(folder, loss=["cross_entropy", "dice", "focal"])


def test_a_run_is_trained_scored_and_read_back(run):
    folder, result = run
    assert result["task"] == "segment" and 0 <= result["miou"] <= 100 and result["macs"] > 0
    assert {"train_cross_entropy", "train_dice", "train_focal", "holdout_miou"} <= result["curve"][0].keys()
    model, card = load_model(folder)
    assert card.class_names == ("background", *map(str, range(10))) and card.img_size == 32
    with np.load(folder / "predictions.npz") as arrays:
        assert TASK.evidence_from(arrays).value() == result["miou"]
    assert model(torch.rand(1, 3, 37, 50)).shape == (1, 11, 37, 50)


def test_evaluation(run, tmp_path):
    folder, result = run
    found = evaluate(str(folder), out=str(tmp_path / "e"), accelerator="cpu", console=quiet())
    assert found["miou"] == pytest.approx(result["miou"], abs=1e-4) and found["images"] == 12
    rows = found["per_class"]
    assert [row["class"] for row in rows][:2] == ["background", "0"]
    confusion = np.array(found["confusion"])
    assert confusion.sum() == sum(row["pixels"] for row in rows)
    assert {path.name for path in (tmp_path / "e").iterdir()} == {
        "evaluation.json",
        "per_class.csv",
        "iou.png",
        "confusion.png",
    }
    held_out = evaluate(str(folder), split="holdout", out=str(tmp_path / "h"), accelerator="cpu", console=quiet())
    assert held_out["images"] == 3
    larger = evaluate(str(folder), img_size=64, out=str(tmp_path / "l"), accelerator="cpu", console=quiet())
    assert np.sum(larger["confusion"]) == confusion.sum()  # scored on the maps as stored, whatever the images' size


def test_pictures_and_masks_of_files(run, tmp_path):
    folder, _ = run
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)).save(path)
    out = {name: str(tmp_path / name) for name in ("pictures", "masks", "attention")}
    found = predict(str(folder), str(path), out=str(tmp_path / "p.json"), accelerator="cpu", console=quiet(), **out)
    (row,) = json.loads((tmp_path / "p.json").read_text())
    assert row == found.rows[0] and sum(each["share"] for each in row["classes"]) <= 100 + 1e-6
    with Image.open(row["mask"]) as mask, Image.open(row["picture"]) as picture:
        assert mask.mode == "P" and mask.size == (56, 40)  # the run brings the shorter side to 40
        assert picture.width > 500
        classes = np.asarray(mask)
    names = ("background", *map(str, range(10)))
    best = names[np.bincount(classes.ravel()).argmax()]
    assert row["classes"][0]["class"] == best
    predict(str(folder), str(path), out=str(tmp_path / "p.csv"), accelerator="cpu", console=quiet())
    assert (tmp_path / "p.csv").read_text().startswith("file,rank,class,share")


def test_interrupted_run_ends_in_the_same_bits(run, tmp_path, monkeypatch):
    folder, _ = run
    whole = TrainingModule.on_train_epoch_start

    def stop(self):
        if self.current_epoch == 1:
            raise KeyboardInterrupt
        whole(self)

    options = {"loss": ["cross_entropy", "dice", "focal"]}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TrainingModule, "on_train_epoch_start", stop)
        trained(tmp_path / "r", **options)
    trained(tmp_path / "r", **options)
    for name in ("model.safetensors", "model_ema.safetensors"):
        before, after = load_file(folder / name), load_file(tmp_path / "r" / name)
        assert all(before[key].equal(after[key]) for key in before)


def test_a_comparison(tmp_path):
    summary = compare(
        recipe(epochs=1), mixers=["ska", "mhsa"], seeds=[0], out=str(tmp_path), machine=CPU, console=quiet()
    )
    assert {row["mixer"] for row in summary["mixers"]} == {"ska", "mhsa"}
    assert "mIoU" in (tmp_path / "report.html").read_text()


def test_overlap_by_hand():
    # image 0: 6 pixels of class 0, of which 4 are found, 2 called 1; image 1: 3 of class 1, all found
    counts = torch.tensor([[[4, 2, 0], [0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 3, 0], [0, 0, 0]]])
    evidence = TASK.evidence([counts], [counts.sum(2)])
    np.testing.assert_allclose(evidence.per_class(), [100 * 4 / 6, 100 * 3 / 5, np.nan])
    assert evidence.value() == pytest.approx(100 * (4 / 6 + 3 / 5) / 2)
    assert evidence.value(np.array([0.0, 1.0])) == 100  # the first image's classes are not there any more
    assert evidence.value(np.array([2.0, 1.0])) == pytest.approx(100 * (8 / 12 + 3 / 7) / 2)
    again = TASK.evidence_from(evidence.arrays())
    assert again.value() == evidence.value() and again.num_images == 2
    metric = MeanIoU(3)
    metric.update(counts[:1], None)
    metric.update(counts[1:], None)
    assert metric.compute().item() == pytest.approx(evidence.value() / 100)
    with pytest.raises(StaticKeyError, match="must be"):
        Overlap(np.zeros((2, 3)), np.zeros((2, 2)), np.zeros((2, 3)))


def test_pixels_of_no_class_are_not_counted():
    model = TASK.build(recipe(), TASK.read_data(recipe()), "ska", 0).eval()
    image, truth = torch.rand(3, 32, 40), torch.randint(0, 11, (32, 40), dtype=torch.uint8)
    truth[:, 30:] = IGNORE_INDEX
    with torch.no_grad():
        counts, of_class = TASK.outputs(model, ([image], [truth]))
        said = model.segment(image)
    assert counts.sum() == 32 * 30 and of_class[0].equal(torch.bincount(truth[:, :30].flatten(), minlength=11))
    for true, guess in ((3, 3), (4, int(said.flatten().mode().values))):
        assert counts[0, true, guess] == ((truth == true) & (said == guess)).sum()


def test_losses_ignore_what_is_of_no_class():
    model = torch.nn.Conv2d(3, 4, 1)
    images, maps = torch.rand(2, 3, 8, 8), torch.randint(0, 4, (2, 8, 8))
    every = recipe(loss=("cross_entropy", "dice", "focal"))
    plain = TASK.losses(model, (images, maps), recipe())
    torch.testing.assert_close(plain["cross_entropy"], F.cross_entropy(model(images), maps))
    cut = maps.clone()
    cut[:, :, 4:] = IGNORE_INDEX
    changed = images.clone()
    changed[..., 4:] = 0.5
    for name, loss in TASK.losses(model, (images, cut), every).items():
        torch.testing.assert_close(loss, TASK.losses(model, (changed, cut), every)[name])
    nothing = TASK.losses(model, (images, torch.full_like(maps, IGNORE_INDEX)), every)
    sum(nothing.values()).backward()
    assert all(loss.isfinite() for loss in nothing.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder": "pspnet"}, "decoder 'pspnet'"),
        ({"loss": ["ce"]}, "loss 'ce'"),
        ({"loss": []}, "loss=.* must be one or several"),
        ({"loss": ["dice", "dice"]}, "each once"),
        ({"scale": (2.0, 0.5)}, "scale=.* the smaller first"),
        ({"crop_size": 0}, "crop_size=0"),
        ({"mean": (0.5,)}, "mean=.* three numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "std=.* positive"),
        ({"on_bad_sample": "warn"}, "on_bad_sample='warn'"),
        ({"frozen_stages": -1}, "frozen_stages=-1"),
    ],
)
def test_recipes_that_are_refused(changes, message):
    with pytest.raises(StaticKeyError, match=message):
        recipe(**changes)


def test_frozen_stages_stay(tmp_path):
    data = TASK.read_data(recipe())
    model = TASK.build(recipe(frozen_stages=1), data, "ska", 0)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert "pyramid.body.blocks.0.mlp.fc1.weight" in frozen and "head.weight" not in frozen
    with pytest.raises(StaticKeyError, match="frozen_stages=9"):
        TASK.build(recipe(frozen_stages=9), data, "ska", 0)


def test_a_card_that_is_none(run, tmp_path):
    folder, _ = run
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    card = json.loads((tmp_path / "config.json").read_text())
    given = card["statickey"]["task_args"]
    missing = {name: value for name, value in given.items() if name != "window"}
    for wrong, message in (
        (given | {"nonsense": 1}, "nonsense is no setting of task 'segment'"),
        (missing, "window is missing for task 'segment'"),
        (given | {"decoder": "upernext"}, "decoder 'upernext'"),
    ):
        card["statickey"]["task_args"] = wrong
        (tmp_path / "config.json").write_text(json.dumps(card))
        with pytest.raises(OutputError, match=message):
            load_model(tmp_path)
