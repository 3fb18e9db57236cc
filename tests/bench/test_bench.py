import csv
import io
import json
import os
import platform
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
import yaml
from rich.console import Console
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from statickey.bench import bench, contender, main, suites
from statickey.bench.contender import (
    PLAIN_CSKA,
    TIMM_MHSA,
    Contender,
    LayerShape,
    Targets,
    layer,
    macs,
    mask_rcnn,
    model,
    twin,
)
from statickey.bench.measure import Roofline, Setting, differences, interleaved, peak_memory, roofline, time_in
from statickey.bench.table import markdown, tables
from statickey.errors import OutputError, StaticKeyError, UnknownNameError

SMALL = (LayerShape((4, 4), 16, 2, num_prefix_tokens=1, batch=2), LayerShape((5, 3), 16, 4, batch=2))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(suites, "LAYERS", SMALL)
    monkeypatch.setattr(suites, "RESOLUTIONS", (24, 40))
    monkeypatch.setattr(suites, "BUILT_FOR", (3, 3))
    monkeypatch.setattr(main, "roofline", lambda setting: Roofline(1e9, 1e9))


def run(out, *names, width=100, **options):
    text = io.StringIO()
    options = {"rounds": 2, "memory": False} | options
    return bench(names, out=out, console=Console(file=text, width=width), **options), text.getvalue()


def test_rows_files_and_tables(small, tmp_path):
    rows, text = run(tmp_path, "layers")
    assert json.loads((tmp_path / "bench.json").read_text()) == rows
    assert [row["contender"] for row in csv.DictReader((tmp_path / "bench.csv").open())] == [
        row["contender"] for row in rows
    ]
    by_name = {(row["group"], row["phase"], row["contender"]): row for row in rows}
    assert len(by_name) == len(rows) == 2 * (6 + 7)
    row = by_name[str(SMALL[1]), "training", "cska"]
    assert (row["against"], row["suite"], row["dtype"]) == (PLAIN_CSKA, "layers", "float32")
    assert row["ratio_q1"] <= row["ratio"] <= row["ratio_q3"]
    assert row["share_of_limit"] == pytest.approx(row["gmacs"] / row["milliseconds"] * 1e3, rel=1e-6)
    assert by_name[str(SMALL[0]), "forward", "cska"]["against"] == TIMM_MHSA  # a plain twin has no prefix tokens
    assert by_name[str(SMALL[0]), "forward", TIMM_MHSA]["ratio"] is None
    assert sum(share for name, share in row.items() if name.startswith("time_in_")) == pytest.approx(1)
    assert "fcska : ska" in text
    assert "5x3x16, 4 heads, batch 2: forward and backward" in text
    assert (tmp_path / "bench.md").read_text().count("| fcska : ska |") == 4


def test_a_batch_of_another_size(small, tmp_path):
    rows, _ = run(tmp_path, "layers", mixers=["ska"], batch=3)
    assert {row["group"] for row in rows} == {str(replace(shape, batch=3)) for shape in SMALL}
    with pytest.raises(StaticKeyError, match="batch=3 is for layers, models, training"):
        run(tmp_path, "shapes", batch=3)
    with pytest.raises(StaticKeyError, match="batch=0 must be a positive integer"):
        run(tmp_path, "layers", batch=0)


def test_suites_join_and_replace_their_own_rows(small, tmp_path):
    run(tmp_path, "layers", mixers=["ska"])
    rows, _ = run(tmp_path, "resolution", mixers=["ska", "cska"])
    assert [row["ratio_at_most"] for row in rows] == [None] * 6
    larger = [row for row in rows if row["contender"] == "ska 40"]
    assert larger[0]["against"] == "ska 24"
    assert larger[0]["tokens"] == 25
    run(tmp_path, "layers", mixers=["fcska"])
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert {row["contender"] for row in stored if row["suite"] == "layers"} == {TIMM_MHSA, "fcska"}
    assert {row["suite"] for row in stored} == {"layers", "resolution"}
    assert (tmp_path / "resolution.png").stat().st_size > 10_000


def test_shapes_are_a_table_that_marks_what_is_slower(small, tmp_path, monkeypatch):
    for name, values in {"SIDES": (2, 3), "WIDTHS": (64, 128), "BATCHES": (1, 2)}.items():
        monkeypatch.setattr(suites, name, values)
    monkeypatch.setattr(suites, "MOST_MAP_BYTES", 4 * 2 * 2 * 3**4)  # leaves out 3x3, 4 heads, batch 2
    rows, _ = run(tmp_path, "shapes", memory=True)
    assert len(rows) == 2 * 2 * 7
    assert {row["ratio_at_most"] for row in rows if row["against"]} == {1.03}
    assert {row["peak_megabytes"] for row in rows} == {None}
    for row in rows:
        slow = (row["group"], row["phase"]) == ("2x2x256, 2 heads, batch 1", "training")
        row["ratio"] = (1.04 if slow else 1.03) if row["against"] else None
    table = markdown(rows)
    assert "**cska : plain cska, forward and backward**" in table
    assert "| ratio | batch 1 | batch 2 |" in table
    assert table.count("✗") == 1
    assert "| 2x2x256, 2 heads | 1.04 ✗ | 1.03 |" in table
    assert table.count("| 3x3x256, 4 heads | 1.03 | – |") == 2
    assert [len(each.rows) for each in tables(rows)] == [4, 4]


def test_long_rounds_are_few():
    turns = [len(list(interleaved({"a": lambda: None}, 7, Setting(), seconds))) for seconds in (0.0, 60.0)]
    assert turns == [3, 7]


def test_the_training_suite_measures_a_compared_network(small, tmp_path):
    compared = tmp_path / "compared"
    (compared / "runs" / "ska-seed0").mkdir(parents=True)
    args = {"embed_dim": 16, "depth": 1, "num_heads": 2}
    (compared / "config.yaml").write_text(yaml.safe_dump({"model": "small_vit", "model_args": args, "batch_size": 3}))
    card = {"num_classes": 5, "pretrained_cfg": {"input_size": [1, 8, 8]}}
    (compared / "runs" / "ska-seed0" / "config.json").write_text(json.dumps(card))
    found = [{"mixer": "mhsa", "accuracy_mean": 90.0, "accuracy_std": None}]
    (compared / "summary.json").write_text(json.dumps({"mixers": found}))
    rows, text = run(tmp_path / "out", "training", mixers=["ska"], compared=compared)
    assert {row["group"] for row in rows} == {"small_vit, 8 pixels, batch 3"}
    assert [row["contender"] for row in rows] == ["mhsa", "ska"] * 2
    assert "training step with AdamW" in text
    assert (tmp_path / "out" / "accuracy.png").stat().st_size > 5_000
    rows, _ = run(tmp_path / "out", "training", mixers=["ska"], compared=compared, batch=1)
    assert {row["group"] for row in rows} == {"small_vit, 8 pixels, batch 1"}
    run(tmp_path / "other", "resolution", mixers=["ska"], compared=compared)  # no step was measured: no figure
    assert not (tmp_path / "other" / "accuracy.png").exists()


def test_a_finished_suite_is_kept_when_a_later_one_breaks(small, tmp_path, monkeypatch):
    measure = main._measure

    def breaks(suite, *args):
        if suite == "resolution":
            raise KeyboardInterrupt
        return measure(suite, *args)

    earlier, _ = run(tmp_path, "resolution", mixers=["ska"])
    monkeypatch.setattr(main, "_measure", breaks)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "layers", "resolution", mixers=["ska"])
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert {row["suite"] for row in stored} == {"layers", "resolution"}
    assert [row for row in stored if row["suite"] == "resolution"] == earlier


def test_a_measured_group_is_kept_when_a_later_one_breaks(small, tmp_path, monkeypatch):
    earlier, _ = run(tmp_path, "layers", mixers=["ska"])
    measure = main._measure

    def breaks(*args):
        yield next(measure(*args))
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "_measure", breaks)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "layers", mixers=["fcska"])
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert [row for row in stored if row["group"] == str(SMALL[1])] == [
        row for row in earlier if row["group"] == str(SMALL[1])
    ]
    assert {row["contender"] for row in stored if row["group"] == str(SMALL[0])} == {TIMM_MHSA, "fcska"}


def test_rows_of_another_version_are_left_alone(small, tmp_path):
    (tmp_path / "bench.json").write_text('[{"suite": "layers", "milliseconds": 1.0}]')
    with pytest.raises(OutputError, match="was not written by this version of bench; choose another"):
        run(tmp_path, "layers")
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_every_place_of_measurement_is_told(small, tmp_path):
    run(tmp_path, "layers", mixers=["ska"], dtype="bfloat16")
    run(tmp_path, "resolution", mixers=["ska"])
    text = (tmp_path / "bench.md").read_text()
    assert re.search(r"Layers: [^;]*threads, bfloat16; 1 GMAC/s, 1 GB/s; torch \S+, timm \S+, python", text)
    assert re.search(r"Resolution: [^;]*threads, float32;", text)


def test_where_the_time_goes_is_told_where_there_is_room(small, tmp_path):
    for width, told in ((80, 0), (160, 2)):
        _, text = run(tmp_path, "layers", mixers=["ska"], width=width, rounds=1)
        assert text.count("time in  ") == 2 * told
        assert max(map(len, text.splitlines())) <= width
    cells = [line.split(" | ")[-1] for line in (tmp_path / "bench.md").read_text().splitlines() if line[-1:] == "|"]
    assert sum(cell.count(",") == 2 for cell in cells) == 2 * 2 * 2


def test_time_is_shared_out_by_kind():
    x = torch.randn(400, 400)

    def multiply():
        for _ in range(20):  # one call is too short to tell from what else the machine does
            (x @ x @ x @ x).softmax(0)

    spent = time_in(multiply, Setting())
    assert spent["products"] > spent["softmax"] > 0
    assert spent["convolution"] == spent["attention"] == 0

    def attend():
        for _ in range(20):
            torch.nn.functional.scaled_dot_product_attention(*[x[None, None]] * 3)

    attend()
    spent = time_in(attend, Setting())
    assert max(spent, key=spent.get) == "attention"


def _profile(path):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), 2)
    os.environ.pop("KINETO_LOG_LEVEL", None)
    time_in(lambda: torch.ones(4, 4) @ torch.ones(4, 4), Setting())


def test_the_profiler_keeps_to_itself(processes, tmp_path):
    child = processes.Process(target=_profile, args=(tmp_path / "stderr",))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert (tmp_path / "stderr").read_text() == ""


def test_targets_are_for_float32(small, tmp_path):
    rows, _ = run(tmp_path / "full", "layers", mixers=["ska", "fcska"], rounds=1)
    assert {row["ratio_at_most"] for row in rows} == {None, 1.20, 1.30}
    rows, _ = run(tmp_path / "half", "layers", mixers=["ska", "fcska"], rounds=1, dtype="bfloat16")
    assert {row["ratio_at_most"] for row in rows} == {None}
    assert {row["dtype"] for row in rows} == {"bfloat16"}


def test_static_keys_are_measured_with_the_kernel_when_asked(small, tmp_path, monkeypatch):
    def planned(contenders, *args):
        plans.append(contenders)
        raise KeyboardInterrupt

    plans = []
    monkeypatch.setattr(main, "_check", planned)
    monkeypatch.setattr(main, "INSTALLED", True)
    monkeypatch.setattr(main, "environment", lambda device: {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for kernel in (False, True):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "layers", mixers=["mhsa", "ska", "cska"], device="cuda", kernel=kernel)
    without, fused = (
        {each.name: each for each in plan if each.group == str(SMALL[1]) and "triton" in each.name} for plan in plans
    )
    assert not without
    assert {name: each.against for name, each in fused.items()} == {"ska, triton": "ska", "cska, triton": "cska"}
    assert fused["cska, triton"].make()[0].backend == "triton"
    assert twin(fused["cska, triton"])[0].backend == "math"
    for wrong in ({"compile": True}, {"device": "cpu"}):
        with pytest.raises(StaticKeyError, match=r"kernel=True is for the suite layers with device='cuda'"):
            run(tmp_path, "layers", **{"kernel": True, "device": "cuda"} | wrong)
    with pytest.raises(StaticKeyError, match=r"mixers=\['mhsa'\] has none"):
        run(tmp_path, "layers", mixers=["mhsa"], kernel=True, device="cuda")


def test_costs_per_token_are_compared_per_token(monkeypatch):
    samples = {"large": [0.4, 0.4], "small": [0.1, 0.1]}
    members = [
        Contender("g", "large", layer, "small", units=8, targets=Targets(1.15)),
        Contender("g", "small", layer),
    ]
    members[1] = Contender("g", "small", layer, units=2)
    row = main._row(members[0], members, "forward", samples, {"large": 30, "small": 10}, 1, 10, 0.1)
    assert (row["ratio"], row["ratio_at_most"], row["memory_ratio"]) == (pytest.approx(1.0), 1.15, 3.0)
    assert row["share_of_limit"] == pytest.approx(0.25)


def test_nothing_is_timed_when_a_contender_differs_from_its_twin(small, tmp_path, monkeypatch):
    monkeypatch.setattr("statickey.bench.contender.reference.conv_static_key_attention", _off_by_a_percent)
    monkeypatch.setattr(main, "_measure", lambda *args: pytest.fail("timed"))
    with pytest.raises(StaticKeyError, match=r"the output of cska is .* from that of its plain twin .* nothing was"):
        run(tmp_path / "out", "layers")
    assert not (tmp_path / "out").exists()


def _off_by_a_percent(query, conv_key, conv_bias, value, **options):
    return 1.01 * value + 0 * query.sum() + 0 * conv_key.sum()


@pytest.mark.parametrize("name", ["ska", "cska", "fcska", TIMM_MHSA])
def test_twins_compute_the_same_function(name):
    made = partial(layer, SMALL[1], name)
    other = partial(layer, SMALL[1], PLAIN_CSKA) if name == "cska" else None
    apart = differences(made(), twin(Contender("g", name, made, twin=other)), ("training",))
    assert apart.keys() == {"output", "gradient"}
    assert max(apart.values()) < 1e-5


@pytest.mark.parametrize("name", ["ska", "cska", "fcska", TIMM_MHSA, PLAIN_CSKA])
def test_macs_are_torchs_count(name):
    made, x = layer(SMALL[1], name)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(Contender("g", name, partial(layer, SMALL[1], name)))[0](x)
    assert macs(made, x) == counter.get_total_flops() // 2


def test_macs_of_timm_models_see_fused_attention():
    fused, x = model("vit_tiny_patch16_224", 1)
    assert macs(fused, x) == pytest.approx(1.254e9, rel=1e-3)


def test_turns_start_with_another_one_each():
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    rounds = list(interleaved(functions, 3, Setting()))
    assert [list(times) for times in rounds] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]
    assert all(seconds > 0 for times in rounds for seconds in times.values())


def test_roofline_is_the_least_time():
    limit = roofline(Setting())
    assert limit.macs > 1e8
    assert limit.bandwidth > 1e8
    assert limit.seconds(limit.macs, 1) == 1
    assert limit.seconds(1, 2 * limit.bandwidth) == 2


class Greedy(nn.Module):
    """Holds 64 MiB for a moment."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        held = torch.ones(1 << 24)
        return x * self.weight + held.sum()


def greedy():
    return Greedy(), torch.zeros(1, 2, 4)


@pytest.mark.skipif(platform.system() != "Linux", reason="peaks are read from /proc")
def test_peak_memory_is_what_was_held(processes):
    peaks = peak_memory(greedy, ("forward", "training"), Setting())
    for peak in peaks.values():
        assert peak / 2**20 == pytest.approx(64, abs=4)


@pytest.mark.parametrize(
    ("names", "options", "error", "message"),
    [
        (("layer",), {}, UnknownNameError, "unknown suite 'layer'; did you mean layers"),
        (("layers",), {"mixers": ["sak"]}, UnknownNameError, "unknown mixer 'sak'; did you mean ska"),
        (("layers",), {"rounds": 0}, StaticKeyError, "rounds=0"),
        ((), {}, StaticKeyError, "no suite to measure; name any of layers"),
        (("layers",), {"device": "cuda"}, StaticKeyError, "device='cuda' is not available"),
        (("layers",), {"dtype": "float8"}, StaticKeyError, "dtype='float8' must be 'float32'"),
        (
            ("training",),
            {"compared": "nowhere"},
            OutputError,
            "cannot read nowhere/summary.json: .*; give --compared a folder",
        ),
    ],
    ids=["suite", "mixer", "rounds", "none", "device", "dtype", "compared"],
)
def test_refuses_and_writes_nothing(tmp_path, names, options, error, message):
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(error, match=message):
        run(tmp_path / "out", *names, **options)
    assert not (tmp_path / "out").exists()


def test_a_foreign_file_is_left_alone(small, tmp_path):
    (tmp_path / "bench.json").write_text('{"mine": 1}')
    with pytest.raises(OutputError, match="was not written by this version of bench; choose another"):
        run(tmp_path, "layers")
    assert (tmp_path / "bench.json").read_text() == '{"mine": 1}'


GUARDS = {
    ("197x384, 6 heads, batch 8", "ska"): (0.92, 0.95),
    ("28x28x128, 8 heads, batch 8", "cska"): (0.45, 0.62),
    ("28x28x128, 8 heads, batch 8", "fcska"): (1.25, 1.35),
}
"""Bounds on the ratios of the main rows: a tenth and more above what docs/results/speed.md has."""


@pytest.mark.slow
def test_main_rows_keep_their_speed(tmp_path):
    rows, _ = run(tmp_path, "layers", rounds=15)
    found = {(row["group"], row["contender"], row["phase"]): row["ratio"] for row in rows}
    for (group, name), bounds in GUARDS.items():
        for phase, bound in zip(("forward", "training"), bounds, strict=True):
            assert found[group, name, phase] <= bound, (group, name, phase)


def test_mixers_with_arguments(small, tmp_path, monkeypatch):
    """A key with a grid of its own is measured as such in every suite, and named with it."""
    monkeypatch.setattr(suites, "DETECTOR", suites.LayerShape((9, 11), 8, 2, batch=1))
    texts = ["ska:key_size=[2,2]", "ska:off_grid=resample", "ska:key=continuous"]
    rows, _ = run(tmp_path, "layers", "resolution", "detector", mixers=texts)
    found = {(row["suite"], row["contender"]): row for row in rows}
    assert {name for suite, name in found if suite == "detector"} == {"timm mhsa", texts[0]}
    assert found["layers", texts[0]]["gmacs"] < found["layers", texts[2]]["gmacs"]
    assert found["resolution", f"{texts[0]} 40"]["gmacs"] < found["resolution", f"{texts[1]} 40"]["gmacs"]
    with pytest.raises(StaticKeyError, match="mixer 'ska@-1' names layers, all are measured"):
        run(tmp_path, "layers", mixers=["ska@-1"])


def test_models_with_arguments():
    contenders = {each.name: each for each in suites.models(["ska:key_size=[7,7]"], batch=1)}
    network, _ = contenders["skaformer_s18:key_size=[7,7]"].make()
    assert network.stages[1].blocks[0].token_mixer.key_size == (7, 7)
    assert contenders["skaformer_s18:key_size=[7,7]"].targets == suites.Targets(1.0, 1.0)
    assert "ska_vit_small_patch16_224:key_size=[7,7]" in contenders


def test_whole_detectors(small, tmp_path, monkeypatch):
    """Pooled by default, so that keys do not grow with the image; what attends to all is left out on large ones."""
    monkeypatch.setattr(suites, "DETECTOR_IMAGES", ((40, 64), (64, 96)))
    monkeypatch.setattr(suites, "LONGEST_RESAMPLED", 64)
    monkeypatch.setattr(contender, "BUILT_FOR", 32)
    texts = ["ska", "ska:off_grid=resample"]
    plan = [
        replace(each, make=partial(mask_rcnn, "skaformer_nano", *each.make.args[1:], channels=8, anchor_size=8))
        for each in suites.detectors(texts)
    ]
    assert [each.name for each in plan] == ["caformer_s18", *texts, "caformer_s18", texts[0]]
    monkeypatch.setitem(suites.SUITES, "detectors", lambda mixers: plan[:3])
    rows, _ = run(tmp_path, "detectors", mixers=texts, rounds=1)
    found = {(row["contender"], row["phase"]): row for row in rows}
    assert len(found) == 2 * 3 and all(row["milliseconds"] > 0 for row in rows)
    assert found["ska", "forward"]["gmacs"] < found[texts[1], "forward"]["gmacs"]
