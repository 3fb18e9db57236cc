import csv
import importlib
import io
import json
import os
import re
import shutil
import time
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from rich.console import Console
from safetensors.torch import load_file

from statickey import MIXERS, ConvStaticKeyAttention
from statickey.compare import compare, main
from statickey.compare.config import CONFIG_FILE
from statickey.compare.main import _summary_of_another
from statickey.compare.table import results_table
from statickey.convert import token_mixers
from statickey.data import ImageData, LabelledImages
from statickey.errors import DivergedError, OutputError, StaticKeyError
from statickey.tasks import (
    Classification,
    ClassificationRecipe,
    Machine,
    SegmentationRecipe,
    TrainingModule,
    load_model,
)

TINY = {
    "limit": 120,
    "epochs": 2,
    "seeds": (0, 1),
    "batch_size": 32,
    "model_args": {"embed_dim": 16, "depth": 2, "num_heads": 2},
    "accelerator": "cpu",
}


def run(out, **kwargs):
    text = io.StringIO()
    recipe, machine, options = {}, {}, TINY | kwargs
    for cls, own in ((ClassificationRecipe, recipe), (Machine, machine)):
        own |= {field.name: options.pop(field.name) for field in fields(cls) if field.name in options}
    console = Console(file=text, width=160)
    summary = compare(
        ClassificationRecipe(**recipe), machine=Machine(**machine), out=str(out), console=console, **options
    )
    return summary, text.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("compare") / "out"
    return (out, *run(out, mixers=("mhsa", "ska", "cska", "sepconv")))


def test_numbers_agree_with_what_is_on_disk(finished):
    out, summary, _ = finished
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert len(rows) == 8
    for row in summary["mixers"]:
        folders = [out / "runs" / f"{row['mixer']}-seed{seed}" for seed in (0, 1)]
        results = [json.loads((f / "run.json").read_text()) for f in folders]
        accuracies = []
        for folder, result in zip(folders, results, strict=True):
            arrays = np.load(folder / "predictions.npz")
            accuracies.append(100 * (arrays["predicted"] == arrays["truth"]).mean())
            assert result["accuracy"] == pytest.approx(accuracies[-1])
            assert result["ema_accuracy"] == pytest.approx(100 * (arrays["ema_predicted"] == arrays["truth"]).mean())
            assert result["scored_images"] == len(arrays["truth"]) == 360
            assert len(result["curve"]) == 2
            weights = load_file(folder / "model.safetensors")  # and the grid of every key
            assert result["params"] == sum(v.numel() for n, v in weights.items() if not n.endswith("_extra_state"))
            assert not list(folder.glob("*.ckpt"))
        assert row["accuracy_mean"] == pytest.approx(np.mean(accuracies))
        assert row["accuracy_std"] == pytest.approx(np.std(accuracies, ddof=1))
    macs = {row["mixer"]: row["macs"] for row in summary["mixers"]}
    assert macs["ska"] < macs["mhsa"] < macs["cska"]


@pytest.mark.parametrize("model", ["skaformer_nano", "cait_xxs24_224"])
def test_other_hosts_get_a_report_too(model, tmp_path):
    """Stages of several grids, and class attention beside the patches'."""
    args = {"depth": 1, "embed_dim": 48, "patch_size": 2} if "cait" in model else {}
    mixers = ["mhsa", "ska", "sepconv"][: 3 if "former" in model else 2]
    run(tmp_path, mixers=mixers, seeds=[0], epochs=1, limit=200, model=model, model_args=args)
    page = (tmp_path / "report.html").read_text()
    if "former" in model:  # whose attention has one token on images this small
        assert re.search(r"ska is left out: .* in ska \(\d+ layers left out: one token\)", page)
    else:
        assert "id=attention-data>" in page
        assert "is left out" not in page


def test_differences_are_paired_with_the_baseline(finished):
    _out, summary, _ = finished
    assert summary["baseline"] == "mhsa"
    rows = {row["mixer"]: row for row in summary["mixers"]}
    assert rows["mhsa"]["difference"] is None
    difference = rows["ska"]["difference"]
    assert difference["mean"] == pytest.approx(rows["ska"]["accuracy_mean"] - rows["mhsa"]["accuracy_mean"])
    assert difference["seeds"] == (0, 1)
    low, high = difference["image_interval"]
    assert low <= difference["mean"] <= high


def test_terminal_shows_the_table_without_bars(finished):
    _, _, text = finished
    for word in ("mixer", "params", "MACs", "img/s", "accuracy %", "minus mhsa", "sepconv", "report.html", "8/8"):
        assert word in text
    assert "\x1b[" not in text


def test_narrow_terminals_get_the_columns_that_matter(finished):
    _, summary, _ = finished
    text = io.StringIO()
    Console(file=text, width=80).print(results_table(summary, 80))
    assert "…" not in text.getvalue().replace(" … ", "")
    assert "accuracy %" in text.getvalue()
    assert "params" not in text.getvalue()


def test_report_is_self_contained(finished):
    out, _summary, _ = finished
    page = (out / "report.html").read_text()
    assert not re.search(r"(src|href)=['\"](?!data:|#)", page)
    for word in (
        "Learning curves",
        "Where a token looks",
        "What the static keys learned",
        "sepconv is left out: no attention map of whole images in sepconv.",
        "configuration",
    ):
        assert word in page
    assert page.count("<figure>") == 2  # static keys
    heads = re.findall(r"<th>([^<]*)", page)[:12]
    assert heads[:5] == ["mixer", "accuracy %", "minus mhsa", "95 % joint", "p (Holm)"]
    assert heads[5:7] == ["95 % seeds (t)", "95 % images"]
    rows = [re.findall(r"<td>([^<]*)", row) for row in page.split("<tr>")[2:6]]
    assert [dict(zip(heads, row, strict=True))["runs"] for row in rows] == ["2"] * 4
    assert str(out.parent) not in page.replace(str(out), "")


def test_finished_runs_are_reused_and_mixers_join(finished):
    out, _summary, _ = finished
    before = {p: p.stat().st_mtime_ns for p in out.glob("runs/*/run.json")}
    again, text = run(out, mixers=("mhsa", "identity"), seeds=(1,))
    assert "1 of 2 runs are finished already" in text
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in before.items())
    assert [row["mixer"] for row in again["mixers"]] == ["mhsa", "ska", "cska", "sepconv", "identity"]
    assert again["config"]["seeds"] == [0, 1]
    assert "--mixers mhsa ska cska sepconv identity --seeds 0 1" in (out / "report.html").read_text()
    config = (out / CONFIG_FILE).read_text()
    assert "- sepconv" in config
    assert "- identity" in config


def test_other_configuration_is_refused_with_the_difference(finished):
    out, _, _ = finished
    before = (out / CONFIG_FILE).read_bytes()
    with pytest.raises(
        OutputError, match=r"another configuration \(epochs: 2 there, 3 here; weight_decay: 0.05 there, 0.1 here\)"
    ):
        run(out, epochs=3, weight_decay=0.1)
    assert (out / CONFIG_FILE).read_bytes() == before


def test_runs_from_other_data_are_refused(tmp_path):
    out = tmp_path / "out"
    run(out, mixers=("ska",), seeds=(0,))
    path = out / "runs" / "ska-seed0" / "run.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps(result | {"config_hash": "0000"}))
    with pytest.raises(OutputError, match=r"was made from other data, or under another configuration \(0000, now"):
        run(out, mixers=("ska", "mhsa"), seeds=(0,))
    assert not (out / "runs" / "mhsa-seed0").exists()  # refused before any training
    path.write_text("{")
    with pytest.raises(OutputError, match=r"is broken .* delete this folder"):
        run(out, mixers=("ska",), seeds=(0,))


def weights(out, name):
    return load_file(out / "runs" / name / "model.safetensors")


def run_on_other_data(out, monkeypatch, options):
    with monkeypatch.context() as patch:
        patch.setattr(ImageData, "fingerprint", lambda self: "other pixels")
        run(out, **options)


class Interruption(Exception):
    """Stands in for a power cut."""


def test_interrupted_run_continues_and_ends_in_the_same_bits(tmp_path, monkeypatch):
    options = {
        "mixers": ("cska",),
        "seeds": (0,),
        "epochs": 3,
        "model_args": TINY["model_args"] | {"drop_path_rate": 0.3},
    }
    run(tmp_path / "whole", **options)
    step = TrainingModule.training_step

    def breaks(self, batch, batch_idx):
        if self.current_epoch == 2 and batch_idx == 1:
            raise Interruption
        return step(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", breaks)
    with pytest.raises(Interruption):
        run(tmp_path / "parts", **options)
    folder = tmp_path / "parts" / "runs" / "cska-seed0"
    assert sorted(p.name for p in folder.glob("*.ckpt")) == ["epoch00000.ckpt", "epoch00001.ckpt"]
    with pytest.raises(OutputError, match=r"the checkpoint is of another configuration or other data"):
        run_on_other_data(tmp_path / "parts", monkeypatch, options)
    steps = []

    def counts(self, batch, batch_idx):
        steps.append(self.current_epoch)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", counts)
    run(tmp_path / "parts", **options)
    assert set(steps) == {2}
    whole, parts = (weights(tmp_path / name, "cska-seed0") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    curve = json.loads((folder / "run.json").read_text())["curve"]
    assert [row["epoch"] for row in curve] == [1, 2, 3]


def test_diverged_run_keeps_its_last_good_checkpoint(tmp_path, monkeypatch):
    step = TrainingModule.training_step

    def poisoned(self, batch, batch_idx):
        images, labels = batch
        return step(self, (images * (float("nan") if self.current_epoch else 1.0), labels), batch_idx)

    monkeypatch.setattr(TrainingModule, "training_step", poisoned)
    with pytest.raises(DivergedError, match="ska seed 0: loss is nan at epoch 2, step 1"):
        run(tmp_path, mixers=("ska",), seeds=(0,))
    assert (tmp_path / "runs" / "ska-seed0" / "epoch00000.ckpt").is_file()


def test_torn_checkpoint_is_refused_by_name(tmp_path):
    folder = tmp_path / "runs" / "ska-seed0"
    folder.mkdir(parents=True)
    (folder / "epoch00001.ckpt").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(OutputError, match=r"ska-seed0/epoch00001.ckpt is not a checkpoint"):
        run(tmp_path, mixers=("ska",), seeds=(0,))


def test_same_seed_gives_all_mixers_the_same_start_batches_and_augmentation(tmp_path, monkeypatch):
    starts, batches = {}, {}
    step, begin = TrainingModule.training_step, TrainingModule.on_train_epoch_start

    def record_batch(self, batch, batch_idx):
        batches.setdefault(type(self.model.blocks[0].attn), []).append([x.clone() for x in batch])
        return step(self, batch, batch_idx)

    def record_start(self):
        if self.current_epoch == 0:
            state = {k: v.clone() for k, v in self.model.state_dict().items()}
            starts[type(self.model.blocks[0].attn)] = state
        begin(self)

    monkeypatch.setattr(TrainingModule, "training_step", record_batch)
    monkeypatch.setattr(TrainingModule, "on_train_epoch_start", record_start)
    options = TINY["model_args"] | {"drop_path_rate": 0.3}
    run(tmp_path, mixers=("mhsa", "ska", "cska"), seeds=(5,), crop_padding=1, flip=True, model_args=options)
    first, *others = starts.values()
    assert len(others) == 2
    for other in others:
        shared = set(first) & set(other)
        assert {"pos_embed", "blocks.0.attn.proj.weight", "blocks.1.mlp.fc2.weight"} <= shared
        assert all(torch.equal(first[name], other[name]) for name in shared)
    first, *others = batches.values()
    for other in others:
        assert len(first) == len(other) == 6
        assert all(torch.equal(a, b) for x, y in zip(first, other, strict=True) for a, b in zip(x, y, strict=True))
    assert not torch.equal(first[0][0], first[3][0])


def test_holdout_scores_and_own_mixer(tmp_path, monkeypatch):
    class Mine(MIXERS["ska"]):
        pass

    monkeypatch.setitem(MIXERS, "mine", Mine)
    summary, _ = run(tmp_path, mixers=("mine",), seeds=(0,), score_on="holdout")
    assert summary["baseline"] == "mine"
    assert summary["data"]["scored_images"] == 12


WRONG = {
    "mixer": ({"mixers": ("mhsaa",)}, "unknown mixer 'mhsaa'; did you mean mhsa"),
    "twice": ({"mixers": ("ska", "ska")}, "none twice"),
    "seed": ({"seeds": (-1,)}, "seed=-1 must be a whole number from 0"),
    "epochs": ({"epochs": 0}, "epochs=0 must be a positive integer"),
    "model": ({"model": "vit_tinny"}, "unknown model 'vit_tinny'"),
    "data": ({"data": "nowhere", "limit": None}, "data 'nowhere' is neither"),
    "heads": ({"model_args": {"num_heads": 5}}, "dim=64 is not divisible by num_heads=5; use num_heads in"),
    "timm patch": (
        {"model": "vit_tiny_patch16_224", "model_args": {}},
        "patch size 16 of 'vit_tiny_patch16_224' does not",
    ),
    "holdout": ({"holdout": 0.0}, "holdout=0.0 must be in"),
    "few images": ({"limit": 4}, "holdout=0.1 of 4 training images"),
    "precision": ({"precision": "fp9"}, "precision='fp9' must be one of auto, 32-true"),
    "accelerator": ({"accelerator": "abacus"}, "accelerator='abacus'"),
    "patch": ({"model_args": {"patch_size": 3}}, "patch_size=3 does not divide img_size=8"),
    "lr": ({"lr": 0.0}, "lr=0.0 must be positive"),
    "score": ({"score_on": "train"}, "score_on='train'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses_and_writes_nothing(tmp_path, case):
    options, message = WRONG[case]
    with pytest.raises(StaticKeyError, match=message):
        run(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_out_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write .*choose another --out"):
        run(tmp_path / "file" / "out", mixers=("ska",))


def test_mixed_precision_trains(tmp_path):
    summary, _ = run(tmp_path, mixers=("cska",), seeds=(0,), precision="bf16-mixed")
    assert summary["mixers"][0]["accuracy_mean"] > 5


def test_one_class_is_refused(tmp_path, monkeypatch):
    part = LabelledImages(torch.zeros(20, 1, 8, 8, dtype=torch.uint8), torch.zeros(20, dtype=torch.long))
    data = ImageData("one", part, part, ("only",), 0, False)
    monkeypatch.setattr("statickey.tasks.classification.load_images", lambda *args, **kwargs: data)
    with pytest.raises(StaticKeyError, match="a classifier needs two"):
        run(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_names_are_escaped_in_the_page(tmp_path, monkeypatch):
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    part = LabelledImages(images, torch.arange(40) % 2)
    data = ImageData("odd", part, part, ("<b>&", "[red]b"), 0, False, skipped=("<i>bad [x].png</i>",))
    monkeypatch.setattr("statickey.tasks.classification.load_images", lambda *args, **kwargs: data)
    _, text = run(tmp_path, mixers=("ska",), seeds=(0,), limit=None)
    page = (tmp_path / "report.html").read_text()
    assert "<b>" not in page
    assert '"captions":["\\u003cb>&",' in page
    assert "<i>bad" not in page
    assert "[x].png" in text


def test_one_process_at_a_time_writes_results(tmp_path, monkeypatch):
    monkeypatch.setattr("statickey.compare.main._PATIENCE", 0.1)
    with FileLock(tmp_path / ".lock"), pytest.raises(OutputError, match="another process is writing to"):
        run(tmp_path, mixers=("ska",), seeds=(0,))


def test_a_copy_of_a_run_is_no_other_seed(tmp_path):
    run(tmp_path, mixers=("ska",), seeds=(0,), epochs=1)
    shutil.copytree(tmp_path / "runs" / "ska-seed0", tmp_path / "runs" / "ska-seed0 (copy)")
    with pytest.raises(
        OutputError, match=r"ska-seed0 \(copy\) holds the run ska-seed0, .*; move this folder out of ru"
    ):
        run(tmp_path, mixers=("ska",), seeds=(0,), epochs=1)


def test_mixers_with_arguments_and_layers(tmp_path):
    mixers = ["ska", "cska:kernel_size=5", "ska@-1"]
    summary, text = run(tmp_path, mixers=mixers, seeds=(0,), epochs=1)
    assert [row["mixer"] for row in summary["mixers"]] == mixers
    assert summary["config"]["mixers"] == mixers
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["cska_kernel_size=5-seed0", "ska-seed0", "ska@-1-seed0"]
    params = {row["mixer"]: row["params"] for row in summary["mixers"]}
    assert params["cska:kernel_size=5"] > params["ska@-1"] > params["ska"]
    model, card = load_model(tmp_path / "runs" / "ska@-1-seed0")
    assert card.mixer == "ska@-1"
    assert list(token_mixers(model)) == ["blocks.1.attn"]
    _again, text = run(tmp_path, mixers=mixers, seeds=(0,), epochs=1)
    assert "3 of 3 runs are finished already: reused" in text


def test_mixers_that_cannot_have_folders_of_their_own(tmp_path):
    with pytest.raises(StaticKeyError, match=r"mixers 'ska@blocks.\*' and 'ska@blocks.\?' would share a folder"):
        run(tmp_path, mixers=("ska@blocks.*", "ska@blocks.?"))
    with pytest.raises(StaticKeyError, match="is too long for a folder's name; use patterns of layers"):
        run(tmp_path, mixers=("ska@" + ",".join(f"blocks.{i}.attn" for i in range(25)),))
    assert not list(tmp_path.iterdir())


def test_a_run_that_diverges_does_not_keep_the_others_from_their_turn(tmp_path, monkeypatch):
    losses = Classification.losses

    def poisoned(self, model, batch, recipe):
        bad = any(isinstance(module, ConvStaticKeyAttention) for module in model.modules())
        return {
            name: value * (float("nan") if bad else 1) for name, value in losses(self, model, batch, recipe).items()
        }

    monkeypatch.setattr(Classification, "losses", poisoned)
    with pytest.raises(
        DivergedError, match=r"^cska seed 0: loss is nan .*; the other runs are finished and in the rep"
    ):
        run(tmp_path, mixers=("mhsa", "cska", "ska"), seeds=(0,), epochs=1)
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [row["mixer"] for row in rows] == ["mhsa", "ska"]
    assert (tmp_path / "report.html").is_file()


def test_default_runs(monkeypatch):
    asked = []

    def of(recipe, machine, mixers, seeds, *rest):
        asked.append((list(mixers), list(seeds)))
        raise StaticKeyError("enough")

    monkeypatch.setattr(main.CompareConfig, "of", of)
    for recipe in (None, SegmentationRecipe(), SegmentationRecipe(data="elsewhere")):
        with pytest.raises(StaticKeyError, match="enough"):
            compare(recipe)
    whole = ["mhsa", "ska", "cska", "fcska"], [0, 1, 2]
    assert asked == [whole, (["mhsa", "ska"], [0]), whole]


def test_results_that_another_process_wrote_since_are_not_written_again(tmp_path, monkeypatch):
    train_missing, written = main._train_missing, []

    def train_and_be_overtaken(*args):
        trained = train_missing(*args)
        if not written:
            written.append("outer")  # the other process is not overtaken in turn
            run(tmp_path, mixers=("ska",), seeds=(0,), epochs=1)
        return trained

    def write(*args):
        written.append("report")
        return write_report(*args)

    write_report = main.write_report
    monkeypatch.setattr(main, "_train_missing", train_and_be_overtaken)
    monkeypatch.setattr(main, "write_report", write)
    summary, _ = run(tmp_path, mixers=("mhsa",), seeds=(0,), epochs=1)
    assert [row["mixer"] for row in summary["mixers"]] == ["mhsa", "ska"]
    assert written == ["outer", "report"]
    run(tmp_path, mixers=("mhsa",), seeds=(0,), epochs=1)  # nothing was missing: written anew
    assert written == ["outer", "report", "report"]


def test_what_another_process_wrote_is_taken_only_if_it_tells_of_all_runs(finished):
    out, *_ = finished

    def a_run(mixer, seed):
        return SimpleNamespace(mixer=mixer, seed=seed, result=out / "runs" / f"{mixer}-seed{seed}" / "run.json")

    told = [a_run(mixer, seed) for mixer in ("mhsa", "ska") for seed in (0, 1)]
    assert _summary_of_another(out, told) == json.loads((out / "summary.json").read_text())
    untold = SimpleNamespace(mixer="fcska", seed=0, result=told[0].result)
    assert _summary_of_another(out, [*told, untold]) is None
    assert _summary_of_another(out / "runs", told) is None
    times = told[0].result.stat()
    later = (out / "summary.json").stat().st_mtime_ns + 1
    try:
        os.utime(told[0].result, ns=(later, later))
        assert _summary_of_another(out, told) is None
    finally:
        os.utime(told[0].result, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_runs_of_earlier_code_of_a_mixer_are_not_todays(tmp_path, monkeypatch):
    def register(name, code):
        (tmp_path / f"{name}.py").write_text(f"from statickey import MIXERS\nclass Own(MIXERS['ska']):\n    {code}\n")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setitem(MIXERS, "own", importlib.import_module(name).Own)

    register("first_own_mixer", "pass")
    run(tmp_path / "out", mixers=("own",), seeds=(0,), epochs=1)
    register("second_own_mixer", "extra = 1")
    with pytest.raises(OutputError, match="own-seed0 is of earlier code of the mixer 'own'; choose another --out"):
        run(tmp_path / "out", mixers=("own",), seeds=(0,), epochs=1)


def test_wrong_kinds_of_lists(tmp_path):
    with pytest.raises(StaticKeyError, match="mixers='ska' must be a list"):
        run(tmp_path, mixers="ska")
    with pytest.raises(StaticKeyError, match="seeds=3 must be a list"):
        run(tmp_path, seeds=3)
    with pytest.raises(StaticKeyError, match=r"mixers=\['ska', 'ska'\] must name at least one, none twice"):
        run(tmp_path, mixers=("ska", "ska@all"))


def test_weights_that_are_not_finite_are_no_checkpoint(tmp_path, monkeypatch):
    def spoil(self, *args):
        if self.current_epoch == 1:
            self.model.head.weight.data[0, 0] = float("nan")

    monkeypatch.setattr(TrainingModule, "on_train_batch_end", spoil)
    monkeypatch.setattr(TrainingModule, "training_step", lambda self, batch, i: self.model(batch[0]).mean())
    with pytest.raises(DivergedError, match=r"pos_embed is not finite after epoch 2"):
        run(tmp_path, mixers=("ska",), seeds=(0,))
    kept = torch.load(tmp_path / "runs" / "ska-seed0" / "epoch00000.ckpt", weights_only=True)
    assert len(kept["curve"]) == 1
    assert all(v.isfinite().all() for k, v in kept["state_dict"].items() if k.startswith("model."))


@pytest.mark.slow
def test_defaults_finish_in_time_and_learn(tmp_path):
    start = time.monotonic()
    summary = compare(out=str(tmp_path), console=Console(file=io.StringIO()))
    assert time.monotonic() - start < 180
    assert [row["mixer"] for row in summary["mixers"]] == ["mhsa", "ska", "cska", "fcska"]
    assert all(row["accuracy_mean"] > 95 for row in summary["mixers"])
