import csv
import io
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

from image_folders import make_folder, make_parquet
from statickey.errors import DataError, OutputError, StaticKeyError
from statickey.models import build_model
from statickey.tasks import ClassificationRecipe, Machine, evaluate, load_model, predict, train
from statickey.tasks.classification_report import ClassificationScores
from statickey.tasks.predict import _layer

QUIET = {"accelerator": "cpu"}


def silent():
    return Console(file=io.StringIO(), width=100)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    recipe = ClassificationRecipe(limit=400, epochs=8, model_args={"embed_dim": 32, "depth": 2, "num_heads": 2})
    train(recipe, mixer="ska", out=str(out), machine=Machine(accelerator="cpu"), console=silent())
    return out


def scores(logits, labels):
    """Of two batches."""
    found = ClassificationScores(tuple("abc"))
    for part in (slice(0, 1), slice(1, None)):
        found.update(logits[part], labels[part])
    return found.to_json()


def test_metrics_of_known_logits():
    logits = torch.log(torch.tensor([[0.8, 0.2, 1e-9], [0.6, 0.4, 1e-9], [0.1, 0.9, 1e-9], [0.3, 0.1, 0.6]]))
    found = scores(logits, torch.tensor([0, 1, 1, 2]))
    assert found["top1"] == 75.0
    assert found["top5"] == 100.0
    assert [row["accuracy"] for row in found["per_class"]] == [100.0, 50.0, 100.0]
    assert found["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]
    assert found["mean_per_class"] == pytest.approx(250 / 3)
    # four bins of one image each: |1-.8|, |0-.6|, |1-.9|, and .6 shares a bin with the second
    assert found["calibration_error"] == pytest.approx(100 * (0.2 + 0.1 + 2 * abs(0.5 - 0.6)) / 4, abs=1e-3)
    assert found["cross_entropy"] == pytest.approx(-np.log([0.8, 0.4, 0.9, 0.6]).mean(), abs=1e-5)


def test_a_class_without_images_has_no_accuracy():
    found = scores(torch.eye(3)[:2], torch.tensor([0, 1]))
    assert found["per_class"][2]["accuracy"] is None
    assert found["mean_per_class"] == 100.0


def test_results_on_disk(trained):
    text = io.StringIO()
    found = evaluate(str(trained), console=Console(file=text, width=100), **QUIET)
    out = trained / "evaluation"
    assert json.loads((out / "evaluation.json").read_text())["top1"] == found["top1"]
    assert found["top1"] == pytest.approx(json.loads((trained / "run.json").read_text())["accuracy"])
    assert found["top1"] > 30
    rows = list(csv.DictReader((out / "per_class.csv").open()))
    assert [row["class"] for row in rows] == list("0123456789")
    assert sum(int(row["images"]) for row in rows) == found["images"] == 360
    assert Image.open(out / "confusion.png").size[0] > 400
    assert "top-1" in text.getvalue()
    assert found["images_per_second"] > 0


def test_averaged_weights_have_a_folder_of_their_own(trained):
    evaluate(str(trained), console=silent(), **QUIET)
    before = (trained / "evaluation" / "evaluation.json").read_bytes()
    whole = evaluate(str(trained), ema=True, console=silent(), **QUIET)
    (trained / "evaluation-ema" / "evaluation.json").unlink()
    file = evaluate(str(trained / "model_ema.safetensors"), console=silent(), **QUIET)
    assert file["ema"]
    assert file["top1"] == whole["top1"]
    assert json.loads((trained / "evaluation-ema" / "evaluation.json").read_text())["ema"]
    assert (trained / "evaluation" / "evaluation.json").read_bytes() == before
    with pytest.raises(OutputError, match="is one file, not the averaged weights; give its folder, or leave out"):
        evaluate(str(trained / "model.safetensors"), ema=True, console=silent(), **QUIET)


def test_holdout_and_weights_file_and_another_size(trained, tmp_path):
    whole = evaluate(str(trained), out=str(tmp_path / "a"), console=silent(), **QUIET)
    file = evaluate(str(trained / "model.safetensors"), out=str(tmp_path / "b"), console=silent(), **QUIET)
    assert file["top1"] == whole["top1"]
    held = evaluate(str(trained), split="holdout", out=str(tmp_path / "c"), console=silent(), **QUIET)
    curve = json.loads((trained / "run.json").read_text())["curve"]
    assert held["images"] == 40
    assert held["top1"] == pytest.approx(curve[-1]["holdout_accuracy"])
    larger = evaluate(str(trained), img_size=12, out=str(tmp_path / "d"), console=silent(), **QUIET)
    assert larger["img_size"] == 12
    assert larger["top1"] > 15  # resampled keys still know digits
    assert load_model(trained, img_size=12)[0].blocks[0].attn.feat_size == (6, 6)  # patches stay as they were


def test_a_size_that_patches_do_not_divide_is_refused(trained, scans):
    for act in (evaluate, lambda source, **options: predict(source, [str(scans)], **options)):
        with pytest.raises(OutputError, match=r"patch_size=2 does not divide img_size=7; .* or img_size=6"):
            act(str(trained), img_size=7, console=silent(), **QUIET)
    assert guesses(trained, scans, img_size=6).rows


def test_streamed_and_folder_runs(tmp_path):
    data = make_folder(tmp_path / "data", per_class=8, size=(40, 32))
    args = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    recipe = ClassificationRecipe(
        data=str(data), stream=True, img_size=32, holdout=0.2, epochs=1, batch_size=4, model_args=args
    )
    made = train(recipe, mixer="ska", out=str(tmp_path / "run"), machine=Machine(accelerator="cpu"), console=silent())
    found = evaluate(str(tmp_path / "run"), console=silent(), **QUIET)
    assert found["top1"] == pytest.approx(made["accuracy"])
    guesses = predict(str(tmp_path / "run"), [str(data / "val" / "a")], console=silent(), **QUIET)
    right = sum(row["classes"][0]["class"] == "a" for row in guesses.rows)
    assert right == found["per_class"][0]["right"]


def test_what_does_not_fit_is_named(trained, tmp_path):
    with pytest.raises(OutputError, match="there is no 'nowhere'; give the folder of a finished run"):
        evaluate("nowhere", console=silent(), **QUIET)
    for act in (evaluate, lambda source, **options: predict(source, "x.png", **options)):
        with pytest.raises(OutputError, match=r"source='' must name a folder"):
            act("", console=silent(), **QUIET)
        with pytest.raises(OutputError, match=r"there is no 'a\\nb'; give"):
            act("a\nb", console=silent(), **QUIET)
    with pytest.raises(DataError, match="has 3 classes, the network knows 10"):
        evaluate(str(trained), data=str(make_parquet(tmp_path / "p", labels=(0, 1, 2))), console=silent(), **QUIET)
    with pytest.raises(StaticKeyError, match="split='train' must be"):
        evaluate(str(trained), split="train", console=silent(), **QUIET)
    copy = tmp_path / "copy"
    copy.mkdir()
    state = load_file(trained / "model.safetensors")
    for change, message in (
        (
            {"head.weight": torch.zeros(7, 32)},
            r"head.weight is \(7, 32\) there, .*another number of classes.*; give weights and c",
        ),
        (
            {"blocks.0.attn.static_key": None},
            r"of another model: it lacks 'blocks.0.attn.static_key' \(1 missing.*; give weights and config.json",
        ),
        ({"extra": torch.zeros(1)}, r"the model has no 'extra' \(0 missing, 1 foreign"),
    ):
        changed = {k: v for k, v in (state | change).items() if v is not None}
        save_file(changed, copy / "model.safetensors")
        (copy / "config.json").write_text((trained / "config.json").read_text())
        with pytest.raises(OutputError, match=message):
            evaluate(str(copy), data="digits", console=silent(), **QUIET)
    (copy / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(OutputError, match=r"cannot read weights from .*: not a safetensors file \(.*\); give a"):
        evaluate(str(copy), data="digits", console=silent(), **QUIET)
    (tmp_path / "resnet.pth").write_bytes(b"")
    with pytest.raises(OutputError, match=r"resnet.pth has no config.json beside it; give the folder"):
        evaluate(str(tmp_path / "resnet.pth"), console=silent(), **QUIET)
    (copy / "config.json").write_text("{}")
    with pytest.raises(OutputError, match="does not describe a network"):
        evaluate(str(copy), data="digits", console=silent(), **QUIET)


def test_weights_never_run_code(trained, tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").touch, ())

    torch.save({"state_dict": Evil()}, tmp_path / "model.pt")
    (tmp_path / "config.json").write_text((trained / "config.json").read_text())
    with pytest.raises(OutputError, match="cannot read weights"):
        evaluate(str(tmp_path / "model.pt"), data="digits", console=silent(), **QUIET)
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def scans(tmp_path):
    from sklearn.datasets import load_digits

    raw = load_digits()
    folder = tmp_path / "scans"
    (folder / "more").mkdir(parents=True)
    for i in range(6):
        pixels = np.rint(raw.images[i] * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / ("more" if i > 3 else ".") / f"{i}.png")
    return folder


def guesses(trained, *files, **options):
    return predict(str(trained), [str(f) for f in files], console=silent(), **QUIET | options)


def test_files_folders_and_wildcards_name_the_same_images(trained, scans):
    whole = guesses(trained, scans)
    assert [row["file"].rpartition("/")[2] for row in whole.rows] == [f"{i}.png" for i in range(6)]
    assert guesses(trained, scans / "**" / "*.png").rows == whole.rows
    assert guesses(trained, scans / "0.png", scans).rows == whole.rows  # once each
    for row in whole.rows:
        shares = [guess["probability"] for guess in row["classes"]]
        assert len(shares) == 5
        assert shares == sorted(shares, reverse=True)
    assert sum(g["probability"] for g in guesses(trained, scans, top_k=99).rows[0]["classes"]) == pytest.approx(1)


def test_standard_input(trained, scans, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{scans}/0.png\n\n{scans}/1.png\n"))
    assert [row["file"] for row in guesses(trained, "-").rows] == [f"{scans}/0.png", f"{scans}/1.png"]


def test_bad_files_are_named_and_skipped(trained, scans):
    (scans / "bad.png").write_bytes(b"nope")
    found = guesses(trained, scans, scans / "gone.png")
    assert len(found.rows) == 6
    assert any("bad.png" in line for line in found.skipped)
    assert any("gone.png': No such file" in line for line in found.skipped)
    with pytest.raises(StaticKeyError, match=r"^cannot read '.*bad.png': "):
        guesses(trained, scans / "bad.png")
    with pytest.raises(StaticKeyError, match="none of 2 files could be read"):
        guesses(trained, scans / "bad.png", scans / "gone.png")
    with pytest.raises(StaticKeyError, match="no image in"):
        guesses(trained, scans / "*.jpg")


@pytest.mark.parametrize("suffix", ["csv", "json"])
def test_results_in_a_file(trained, scans, tmp_path, suffix):
    out = tmp_path / f"p.{suffix}"
    found = guesses(trained, scans, out=str(out), top_k=2)
    if suffix == "json":
        assert json.loads(out.read_text()) == found.rows
    else:
        rows = list(csv.DictReader(out.open()))
        assert len(rows) == 12
        assert rows[0]["class"] == found.rows[0]["classes"][0]["class"]


def test_pictures_of_the_attention(trained, scans, tmp_path):
    Image.open(scans / "0.png").save(scans / "more" / "0.png")  # a second file of that name
    guesses(trained, scans, attention=str(tmp_path / "maps"), layer="blocks.0.attn")
    names = sorted(path.name for path in (tmp_path / "maps").iterdir())
    assert names == ["0-2.png", "0.png", *(f"{i}.png" for i in range(1, 6))]
    assert Image.open(tmp_path / "maps" / "0.png").size[0] > 300
    out = tmp_path / "p.csv"
    found = guesses(trained, scans, attention=str(tmp_path / "maps"), top_k=1, out=str(out))
    twice = {row["file"]: row["attention"] for row in found.rows if row["file"].endswith("0.png")}
    assert list(twice.values()) == [str(tmp_path / "maps" / name) for name in ("0.png", "0-2.png")]
    assert [row["attention"] for row in csv.DictReader(out.open())] == [row["attention"] for row in found.rows]
    assert "attention" not in guesses(trained, scans).rows[0]
    with pytest.raises(StaticKeyError, match=r"layer='blocks.9.attn' .* one of blocks.0.attn, blocks.1.attn"):
        guesses(trained, scans, attention=str(tmp_path / "maps"), layer="blocks.9.attn")


def test_a_grid_of_one_token_is_not_drawn():
    stages = {size: build_model("skaformer_nano", None, img_size=size, num_classes=2) for size in (32, 64)}
    assert stages[64].stages[3].blocks[-1].token_mixer.feat_size == (2, 2)
    assert _layer(stages[64], "last").startswith("stages.3")
    assert _layer(stages[32], "last").startswith("stages.2")
    with pytest.raises(StaticKeyError, match=r"grid of one token, .*; choose 'last' or one of stages.1"):
        _layer(stages[32], _layer(stages[64], "last"))
    with pytest.raises(
        StaticKeyError, match=r"all attention .* one token, which is always 1; give a larger --img-size"
    ):
        _layer(build_model("skaformer_nano", None, img_size=8, num_classes=2), "last")


def test_words_for_people(trained, scans):
    text = io.StringIO()
    predict(str(trained), [str(scans / "0.png")], top_k=2, console=Console(file=text, width=100), **QUIET)
    assert "1 image\n" in re.sub(r" +\n", "\n", text.getvalue())
    assert re.search(r"│ \d \(\d+ %\) +│", text.getvalue())


def test_wrong_options(trained, scans):
    for options in ({"out": ""}, {"out": "file/evaluation"}):
        (scans / "file").touch()
        folder = options["out"] and str(scans / options["out"])
        with pytest.raises(
            OutputError, match=r"out='' must name a folder|a file is where a folder should be; choose"
        ):
            evaluate(str(trained), out=folder, console=silent(), **QUIET)
    with pytest.raises(OutputError, match="attention='' must name a folder"):
        guesses(trained, scans, attention="")
    with pytest.raises(OutputError, match=r"out='p.txt' must end in .csv or .json"):
        guesses(trained, scans, out="p.txt")
    with pytest.raises(StaticKeyError, match="top_k=0"):
        guesses(trained, scans, top_k=0)


def test_held_out_images_are_those_of_the_run(tmp_path):
    first, second = (make_folder(tmp_path / name, per_class=n) for name, n in (("a", 10), ("b", 12)))
    small = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    recipe = ClassificationRecipe(
        data=str(first), epochs=1, batch_size=4, holdout=0.2, limit=16, img_size=16, model_args=small
    )
    out = tmp_path / "run"
    train(recipe, mixer="ska", out=str(out), machine=Machine(accelerator="cpu"), score_on="holdout", console=silent())
    curve = json.loads((out / "run.json").read_text())["curve"]
    found = evaluate(str(out), split="holdout", console=silent(), **QUIET)
    assert found["top1"] == pytest.approx(curve[-1]["holdout_accuracy"])
    first.rename(tmp_path / "moved")
    moved = evaluate(str(out), data=str(tmp_path / "moved"), split="holdout", console=silent(), **QUIET)
    assert moved["top1"] == found["top1"]
    larger = evaluate(str(out), data=str(tmp_path / "moved"), split="holdout", img_size=24, console=silent(), **QUIET)
    assert (larger["images"], larger["img_size"]) == (found["images"], 24)
    with pytest.raises(DataError, match=r"is not the data that .*run saw, .*; give that data, or use --split test"):
        evaluate(str(out), data=str(second), split="holdout", console=silent(), **QUIET)
    text = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(text | {"config": text["config"] | {"later": 1}}))
    with pytest.raises(OutputError, match="was made with later, which this version does not know"):
        evaluate(str(out), console=silent(), **QUIET)
