import io
import json
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from rich.console import Console

from statickey import MIXERS
from statickey.compare import compare
from statickey.compare.config import CompareConfig
from statickey.compare.report import verdict, write_report
from statickey.compare.results import read_runs, summarize, write_results
from statickey.compare.table import results_table
from statickey.errors import OutputError
from statickey.tasks import Classification, ClassificationRecipe, Machine, Metric

RECIPE = ClassificationRecipe(
    limit=120, epochs=1, batch_size=32, model_args={"embed_dim": 16, "depth": 2, "num_heads": 2}
)
MACHINE = Machine(accelerator="cpu")


def run(out, mixers, recipe=RECIPE, seeds=(0,)):
    text = io.StringIO()
    compare(recipe, mixers=mixers, seeds=seeds, out=str(out), machine=MACHINE, console=Console(file=text, width=200))
    return (out / "report.html").read_text(), text.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder of a comparison, and its pieces."""
    out = tmp_path_factory.mktemp("report") / "out"
    run(out, ("mhsa", "ska"), seeds=(0, 1))
    config = CompareConfig(
        recipe=RECIPE.on(MACHINE),
        machine=MACHINE,
        mixers=("mhsa", "ska"),
        seeds=(0, 1),
        score_on="test",
        out=str(out),
    )
    data = config.task.read_data(RECIPE)
    return out, config, data, read_runs(config.task, out, config.ids(data.fingerprint()))


def shown_models(page):
    """Whose attention is on a page to be moved over."""
    data = json.loads(re.search(r"id=attention-data>(.*?)</script>", page, re.S)[1])
    assert len(data["captions"]) == 3
    return [model["name"] for model in data["models"]]


@dataclass(frozen=True)
class Score:
    """Evidence of a task to come: the weighted mean of a number an image."""

    of_images: np.ndarray

    @property
    def num_images(self):
        return len(self.of_images)

    def value(self, image_weights=None):
        return float(np.average(self.of_images, weights=image_weights))

    def arrays(self):
        return {"of_images": self.of_images}


def as_task(runs, metric):
    """The runs as if they were of another task, the higher the seed and the later the mixer the higher the score."""
    made = []
    for i, finished_run in enumerate(runs):
        noise = np.random.default_rng(i).normal(size=500)
        evidence = Score(5 + 2 * (finished_run.mixer == "ska") + 0.1 * finished_run.seed + noise)
        result = {k: v for k, v in finished_run.result.items() if "accuracy" not in k}
        curve = [{k: v for k, v in row.items() if "accuracy" not in k} for row in result["curve"]]
        result["curve"] = [row | {f"holdout_{metric.name}": 3.0} for row in curve]
        value = evidence.value()
        made.append(replace(finished_run, result=result | {metric.name: value, f"ema_{metric.name}": value}))
        made[-1] = replace(made[-1], evidence=evidence)
    return made


def test_everything_prints_the_metric_of_the_task(finished, tmp_path, monkeypatch):
    _, config, data, runs = finished
    metric = Metric("error_depth", "depth error", "m", higher_is_better=False)
    monkeypatch.setattr(Classification, "metric", metric)
    runs = as_task(runs, metric)
    summary = summarize(config, data, runs)
    write_results(tmp_path, summary, runs)
    page = write_report(tmp_path, config, data, summary, runs).read_text()
    row = summary["mixers"][1]
    assert row["error_depth_mean"] == pytest.approx(7.05, abs=0.15)
    assert row["ema_error_depth_std"] > 0
    assert (tmp_path / "results.csv").read_text().startswith("mixer,seed,error_depth,ema_error_depth,scored_on")
    assert json.loads((tmp_path / "summary.json").read_text())["metric"]["label"] == "depth error"
    console = Console(file=io.StringIO(), width=200)
    console.print(results_table(summary, 200))
    for text in (page, console.file.getvalue()):
        assert "depth error m" in text
        assert "accuracy" not in text
    assert "is left out" not in page
    assert re.search(r"\+\d\.\d\d m against mhsa", page)


def found(**values):
    summary = {"baseline": "mhsa", "metric": vars(Metric("accuracy", "accuracy", "%", values.pop("higher", True)))}
    difference = {"mean": 1.5, "seeds": (0, 1, 2), "decided": True} | values
    return verdict({"difference": None if "none" in values else difference}, summary)


def test_verdicts():
    assert found() == "+1.50 points against mhsa; better, over seeds and images together."
    assert found(mean=-1.5).endswith("worse, over seeds and images together.")
    assert found(higher=False).endswith("worse, over seeds and images together.")
    assert found(decided=False).endswith("not decided by this data, over seeds and images together.")
    assert found(decided=None, seeds=(0,)).endswith("one seed: nothing is said about other seeds.")
    assert found(decided=None).endswith("its seeds do not differ: nothing is said about other seeds.")
    assert found(none=True) == "no seed in common with mhsa."


def test_rate_is_the_median_of_all_epochs_of_all_runs(finished):
    """Stalled runs do not pull it down."""
    _, config, data, runs = finished
    rates = {0: [10.0] * 3, 1: [100.0, 101.0, 102.0, 103.0]}
    runs = [
        replace(r, result=r.result | {"curve": [{"images_per_second": rate} for rate in rates[r.seed]]}) for r in runs
    ]
    assert summarize(config, data, runs)["mixers"][0]["images_per_second"] == 100


def test_a_picture_that_cannot_be_drawn_costs_no_result(tmp_path, monkeypatch):
    class Short(MIXERS["ska"]):
        """Attends to all tokens but the last, and its key is none of a grid."""

        def attention_weights(self, x, feat_size=None):
            return super().attention_weights(x, feat_size)[..., :-1]

        def key_rows(self, grid=None, name="static_key"):
            if grid is None:
                raise AttributeError("no key of a grid")
            return super().key_rows(grid, name)

    class Silent(MIXERS["mhsa"]):
        def attention_weights(self, x, feat_size=None):
            raise RuntimeError("no map\nto be had")

    monkeypatch.setitem(MIXERS, "short", Short)
    monkeypatch.setitem(MIXERS, "silent", Silent)
    page, _ = run(tmp_path, ("mhsa", "ska", "short", "silent"))
    assert re.search(
        r"short is left out: .*the map of blocks.0.attn, \(3, 2, 16, 15\), is not \(B, heads, N, N\)", page
    )
    assert "silent is left out: no map to be had." in page
    assert "short is left out: no key of a grid." in page
    assert shown_models(page) == ["mhsa", "ska"]
    assert page.count("<figure>") == 1
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 5


def test_a_page_without_any_map(tmp_path, monkeypatch):
    class Silent(MIXERS["mhsa"]):
        def attention_weights(self, x, feat_size=None):
            raise RuntimeError("no map")

    monkeypatch.setitem(MIXERS, "silent", Silent)
    page, _ = run(tmp_path, ("silent",))
    assert "None of these mixers has an attention map" in page
    assert "silent is left out: no map." in page


def test_lost_weights_cost_their_pictures_only(finished):
    out, config, data, runs = finished
    summary = summarize(config, data, runs)
    path = out / "runs" / "ska-seed0" / "model.safetensors"
    kept = path.read_bytes()
    path.unlink()
    try:
        page = write_report(out, config, data, summary, runs).read_text()
    finally:
        path.write_bytes(kept)
    assert page.count("holds no model.safetensors; give the folder of a finished run") == 2
    assert shown_models(page) == ["mhsa"]


def test_what_training_added_is_counted_from_the_start_of_the_run(finished, tmp_path, monkeypatch):
    out, *_ = finished
    weights = str(out / "runs" / "ska-seed1" / "model.safetensors")
    added = []

    def record(key, *args):
        added.append(key.abs().max().item())
        return key.new_zeros(2, 4, 4, 3)

    monkeypatch.setattr("statickey.compare.report.key_colours", record)
    run(tmp_path, ("ska",), replace(RECIPE, weights=weights, lr=1e-9))
    assert len(added) == 2
    assert max(added) < 1e-5


def test_broken_runs_are_refused_in_one_line(finished):
    out, config, data, _ = finished
    for name, content, message in (
        ("predictions.npz", b"PK torn", "ska-seed0 is broken"),
        ("run.json", b"[]", "run.json is broken .*a dict is expected"),
        ("run.json", b'{"config_hash": "0"}', "ska-seed0 is broken .it has no 'data'"),
    ):
        path = out / "runs" / "ska-seed0" / name
        kept = path.read_bytes()
        path.write_bytes(content)
        try:
            with pytest.raises(OutputError, match=f"{message}.*; delete this folder to repeat the run"):
                read_runs(config.task, out, config.ids(data.fingerprint()))
        finally:
            path.write_bytes(kept)


def test_narrow_tables_keep_the_verdict(finished):
    _, config, data, runs = finished
    summary = summarize(config, data, runs)
    for width, absent in ((300, ()), (130, ("EMA",)), (80, ("EMA", "95 % images", "95 % seeds", "MACs"))):
        console = Console(file=io.StringIO(), width=width)
        console.print(results_table(summary, width))
        text = console.file.getvalue()
        head = text.splitlines()[2]
        assert all(word not in head for word in absent)
        assert all(word in head for word in ("mixer", "accuracy %", "minus mhsa", "95 % joint", "p (Holm)"))
        assert "…" not in head
