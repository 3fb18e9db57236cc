"""Detection through the commands: compared, interrupted, taken up again, evaluated, used on files."""

import csv
import json
import re

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from statickey.cli import main
from statickey.data import scenes
from statickey.tasks import TrainingModule

SMALL = ["--limit", "10", "--epochs", "2", "--batch-size", "4", "--holdout", "0.2", "--accelerator", "cpu"]
SMALL += ["--model", "small_vit", "--model-args", '{"depth": 1, "embed_dim": 16, "num_heads": 2}', "--channels", "8"]
SMALL += ["--img-size", "32", "--max-size", "64", "--anchor-size", "4"]
COMPARE = ["compare", "--task", "detect", *SMALL, "--mixers", "mhsa", "ska", "--seeds", "0"]


@pytest.fixture(scope="module", autouse=True)
def few_scenes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "TEST_SCENES", 6)
        yield


@pytest.fixture(scope="module")
def compared(tmp_path_factory, few_scenes):
    out = tmp_path_factory.mktemp("compare")
    assert main([*COMPARE, "--out", str(out)]) == 0
    return out


def test_a_comparison(compared, capsys):
    summary = json.loads((compared / "summary.json").read_text())
    assert [row["mixer"] for row in summary["mixers"]] == ["mhsa", "ska"]
    rows = list(csv.DictReader((compared / "results.csv").open()))
    for row in rows:
        run = json.loads((compared / "runs" / f"{row['mixer']}-seed0" / "run.json").read_text())
        assert float(row["box_ap"]) == pytest.approx(run["box_ap"]) and run["task"] == "detect"
    report = (compared / "report.html").read_text()
    assert "box AP" in report and "train_loss" not in report
    assert "<svg" in report and "is left out" not in report
    shown = json.loads(re.search(r"id=attention-data>(.*?)</script>", report, re.S)[1])
    assert [model["name"] for model in shown["models"]] == ["mhsa", "ska"]
    assert len(shown["captions"]) == 3
    assert report.count("<figure>") == 1  # keys


def test_an_interrupted_comparison_ends_in_the_same_bits(compared, tmp_path, monkeypatch, capsys):
    step, done = TrainingModule.training_step, []

    def stops(self, batch, batch_idx):
        done.append(batch_idx)
        if len(done) == 7:  # in the second of two epochs of the second run
            raise KeyboardInterrupt
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", stops)
        assert main([*COMPARE, "--out", str(tmp_path)]) == 130
    assert not (tmp_path / "report.html").exists()
    capsys.readouterr()
    assert main([*COMPARE, "--out", str(tmp_path)]) == 0
    assert "1 of 2 runs are finished already" in capsys.readouterr().out
    for run in (compared / "runs").iterdir():
        for name in ("model.safetensors", "model_ema.safetensors"):
            before, after = load_file(run / name), load_file(tmp_path / "runs" / run.name / name)
            assert all(value.equal(after[key]) for key, value in before.items())
    assert (tmp_path / "report.html").is_file()
    assert main([*COMPARE, "--task", "segment", "--out", str(tmp_path)]) == 2
    assert main([*COMPARE, "--arch", "faster_rcnn", "--out", str(tmp_path)]) == 2
    assert "arch: None there, faster_rcnn here" in capsys.readouterr().err


def test_evaluate(compared, tmp_path, capsys):
    run = compared / "runs" / "ska-seed0"
    words = ["evaluate", str(run), "--accelerator", "cpu"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    assert "box AP" in capsys.readouterr().out
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["box_ap"] == pytest.approx(json.loads((run / "run.json").read_text())["box_ap"], abs=1e-6)
    assert found["images"] == 6 and "mask_ap" in found
    assert {"per_class.csv", "per_class.png", "results.json"} <= {path.name for path in tmp_path.iterdir()}
    assert main([*words, "--split", "holdout", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["images"] == 2
    assert main([*words, "--img-size", "48", "--ema", "true", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main([*words, "--data", "digits"]) == 2
    assert capsys.readouterr().err.startswith("statickey: ")


def test_predict(compared, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, size in enumerate(((64, 48), (33, 70))):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (*size, 3), np.uint8)).save(photos / f"{i}.png")
    (photos / "broken.png").write_bytes(b"x")
    words = ["predict", str(compared / "runs" / "ska-seed0"), str(photos), "--accelerator", "cpu", "--top-k", "2"]
    assert main([*words, "--out", str(tmp_path / "p.json"), "--pictures", str(tmp_path / "pictures")]) == 1
    assert "skipped" in capsys.readouterr().out
    rows = json.loads((tmp_path / "p.json").read_text())
    assert [row["file"].rpartition("/")[2] for row in rows] == ["0.png", "1.png"]
    for row in rows:
        assert len(row["objects"]) <= 2
        with Image.open(row["picture"]) as picture:
            assert picture.width > 100
    (photos / "broken.png").unlink()
    assert main([*words, "--out", str(tmp_path / "p.csv"), "--attention", str(tmp_path / "a")]) == 0
    assert (tmp_path / "p.csv").read_text().startswith("file,")
    assert list((tmp_path / "a").iterdir())
