"""``convert`` with images: whole models, which heads, what is reported, and what is refused."""

import copy
import json

import pytest
import torch
from timm.models import create_model
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv

from statickey import Calibration, CalibrationReport, StaticKeyAttention, convert
from statickey.convert import token_mixers
from statickey.convert.again import static_heads
from statickey.convert.calibration import calibrate as calibrate_module
from statickey.convert.calibration.choice import largest_within
from statickey.convert.calibration.reading import change, turned_back
from statickey.errors import StaticKeyError, UnsupportedHostError
from statickey.layers import PartlyStaticAttention, SelfAttention
from tolerances import assert_close

SIZES = {"img_size": 32, "depth": 2, "embed_dim": 24, "num_heads": 3, "num_classes": 5}
LAYERS = ["blocks.0.attn", "blocks.1.attn"]
NUM_HEADS = 3


def strong(model):
    """Weights so large that attention is far from uniform."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.35, generator=generator)
            elif name.endswith("gamma"):
                parameter.fill_(1.0)
            elif name.endswith("bias"):
                parameter.zero_()
    return model.eval()


def vit(**kwargs):
    return strong(create_model("vit_tiny_patch16_224", patch_size=8, **SIZES | kwargs))


def dinov2():
    return strong(create_model("vit_small_patch14_reg4_dinov2", patch_size=8, **SIZES))


def caformer():
    mixers = [SepConv, SepConv, Attention, Attention]
    norms = [LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2
    args = {"depths": (1, 1, 1, 1), "dims": (8, 8, 32, 64), "num_classes": 5}
    model = MetaFormer(**args, token_mixers=mixers, norm_layers=norms)
    model.default_cfg = model.pretrained_cfg = {"input_size": (3, 64, 64)}
    return strong(model)


def swin():
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2,), "num_heads": (2,)}
    return strong(create_model("swin_tiny_patch4_window7_224", num_classes=5, **sizes))


def beit():
    return strong(create_model("beit_base_patch16_224", patch_size=8, **SIZES))


def dinov3():
    return strong(create_model("vit_small_patch16_dinov3", patch_size=8, **SIZES))


def images(size=32, count=24):
    generator = torch.Generator().manual_seed(1)
    places = torch.randn(1, 3, size, size, generator=generator)
    return places + 0.7 * torch.randn(count, 3, size, size, generator=generator)


HOSTS = {
    "vit": (vit, 32),
    "dinov2": (dinov2, 32),
    "dinov3": (dinov3, 32),
    "caformer": (caformer, 64),
    "swin": (swin, 32),
    "beit": (beit, 32),
}


@pytest.mark.parametrize("host", HOSTS)
def test_what_is_reported_is_what_the_converted_model_does(host):
    """Measured from outside, on the images kept back; the heads chosen are static, the others as they were."""
    build, size = HOSTS[host]
    model, batch = build(), images(size)
    before = copy.deepcopy(model)
    report = convert(model, "ska", calibration=Calibration(batch, fraction=0.5, bias="map"))
    assert isinstance(report, CalibrationReport)
    held = batch[3::4]
    with torch.no_grad():
        moved = change([before(held)], [model(held)])
    assert report.stages[0].change < 1e-4
    assert min(stage.change for stage in report.stages[1:]) == pytest.approx(moved, abs=1e-6)
    assert 0 < moved < min(control.change for control in report.controls)
    static = {}
    for figures in report.heads:
        static.setdefault(figures.layer, []).append(figures.static)
    assert sum(map(sum, static.values())) == round(0.5 * len(report.heads))
    for name, flags in static.items():
        mixers = list(token_mixers(model.get_submodule(name)).values())
        if not any(flags):
            assert not mixers
        else:
            assert isinstance(mixers[0], PartlyStaticAttention)
            assert mixers[0].dynamic_heads == tuple(head for head, flag in enumerate(flags) if not flag)
    assert (report.num_images, report.num_measured) == (18, 6)
    assert len(str(report).splitlines()) > len(report.heads)
    json.dumps(report.to_json())


def test_all_heads_become_plain_static_keys_and_errors_shrink_with_better_fits():
    batch, changes = images(count=64), {}
    for fit in ("kl", "lstsq", "mean", "constant"):
        model = vit()
        report = convert(model, "ska", calibration=Calibration(batch, fit=fit, criterion="kl"))
        mixers = token_mixers(model)
        assert [*mixers] == LAYERS
        plain = StaticKeyAttention if fit != "constant" else PartlyStaticAttention
        assert {type(mixer) for mixer in mixers.values()} == {plain}
        assert all(figures.static and figures.change is None for figures in report.heads)
        assert report.params_after < report.params_before or fit == "constant"
        assert report.macs_after < report.macs_before
        changes[fit] = sum(figures.kl for figures in report.heads)
    assert changes["kl"] < min(changes["lstsq"], changes["mean"])


def test_a_loader_alone_is_enough_and_is_read_once():
    batch, seen = images(), []

    def loader():
        for start in range(0, 24, 10):
            seen.append(start)
            yield batch[start : start + 10], torch.zeros(10, dtype=torch.long)

    one, other = vit(), vit()
    convert(one, "ska", calibration=loader())
    convert(other, "ska", calibration=Calibration([{"pixel_values": batch}]))
    assert seen == [0, 10, 20]
    x = images(count=2)
    assert torch.equal(one(x), other(x))
    few = vit()
    report = convert(few, "ska", calibration=Calibration(loader(), num_images=12))
    assert seen == [0, 10, 20, 0, 10]
    assert report.num_images + report.num_measured == 12


def test_same_images_same_model():
    reports, states = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = vit()
        reports.append(convert(model, "ska", calibration=Calibration(images(), fraction=0.7, bias="key")))
        states.append(model.state_dict())
    assert reports[0] == reports[1]
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    other = convert(vit(), "ska", calibration=Calibration(images(), fraction=0.7, bias="key", seed=1))
    assert other.controls != reports[0].controls
    assert other.stages == reports[0].stages


def test_each_layer_is_fitted_on_what_the_converted_ones_give():
    """The last layer's keys are those of a calibration of it alone, on the model whose first layer is converted."""
    calibrator = calibrate_module.Calibrator(vit(), "all", Calibration(images(), fit="lstsq", criterion="kl"))
    calibrator.survey()
    refitted = calibrator.refitted([(name, head) for name in LAYERS for head in range(NUM_HEADS)])
    first, alone = vit(), vit()
    convert(first, "ska", layers=0, calibration=Calibration(images(), fit="lstsq", criterion="kl"))
    convert(alone, "ska", layers=1, calibration=Calibration(images(), fit="lstsq", criterion="kl"))
    assert torch.equal(refitted.blocks[0].attn.static_key, first.blocks[0].attn.static_key)
    convert(first, "ska", layers=1, calibration=Calibration(images(), fit="lstsq", criterion="kl"))
    assert_close("keys", refitted.blocks[1].attn.static_key, first.blocks[1].attn.static_key)
    difference = refitted.blocks[1].attn.static_key - alone.blocks[1].attn.static_key
    assert difference.abs().max() > 0.01


def test_heads_by_name():
    model = vit()
    heads = {"blocks.1.attn": [2, 0]}
    report = convert(model, "ska", calibration=Calibration(images(), heads=heads, criterion="output"))
    assert [(h.layer, h.head) for h in report.heads if h.static] == [("blocks.1.attn", 0), ("blocks.1.attn", 2)]
    assert model.blocks[1].attn.dynamic_heads == (1,)
    assert [m.name for m in report.modules] == ["blocks.1.attn"]
    assert model.blocks[0].attn.fused_attn is not None  # the host's own
    assert report.note == "as named"


def test_nothing_is_ranked_where_nothing_is_left_out(monkeypatch):
    copies = []
    converted = calibrate_module.Calibrator.converted
    monkeypatch.setattr(
        calibrate_module.Calibrator, "converted", lambda self, heads: copies.append(heads) or converted(self, heads)
    )
    for choice in ({}, {"heads": {LAYERS[0]: [1]}}):
        report = convert(vit(), "ska", calibration=Calibration(images(), fit="mean", **choice))
        assert len(copies) == 1
        assert all(figures.change is None for figures in report.heads)
        copies.clear()
    report = convert(vit(), "ska", calibration=Calibration(images(), fit="mean", fraction=1.0))
    assert len(copies) == 1 + len(report.heads)
    assert all(figures.change > 0 for figures in report.heads)


@pytest.mark.parametrize("host", HOSTS)
def test_heads_that_were_left_dynamic_can_follow(host):
    """Heads of a layer do not see each other: two calibrations, one after the other, give the keys of one."""
    build, size = HOSTS[host]
    twice, once, options = build(), build(), {"fit": "lstsq", "bias": "key"}
    name = convert(build(), "mhsa").modules[-1].name
    convert(twice, "ska", layers=name, calibration=Calibration(images(size), heads={name: [1]}, **options))
    report = convert(twice, "ska", layers=name, calibration=Calibration(images(size), **options))
    assert 1 not in {figures.head for figures in report.heads}
    convert(once, "ska", layers=name, calibration=Calibration(images(size), **options))
    (mixer,), (wanted,) = (token_mixers(model.get_submodule(name)).values() for model in (twice, once))
    assert mixer.dynamic_heads == ()
    for key, tensor in wanted.state_dict().items():
        if not key.endswith("_extra_state"):
            assert_close("keys", mixer.state_dict()[key], tensor)


def test_a_share_counts_the_heads_that_are_static_already():
    model, batch = vit(), images()

    def static():
        return {
            (name, head): mixer.static_key[place].clone()
            for name, mixer in token_mixers(model).items()
            for place, head in enumerate(static_heads(mixer))
        }

    convert(model, "ska", calibration=Calibration(batch, heads={LAYERS[0]: [1, 2], LAYERS[1]: [0]}))
    before = static()
    assert len(before) == 3
    with pytest.raises(
        StaticKeyError, match=r"fraction=0\.4 of 6 heads, 3 of which are static already; ask for more"
    ):
        convert(model, "ska", calibration=Calibration(batch, fraction=0.4, criterion="kl"))
    with pytest.raises(StaticKeyError, match=r"heads\['blocks.0.attn'\] has 2; its heads that are not static are 0$"):
        convert(model, "ska", calibration=Calibration(batch, heads={LAYERS[0]: [2]}))
    with pytest.raises(
        StaticKeyError, match="has static heads with bias=None, as all its heads must; this fit has 'map'"
    ):
        convert(model, "ska", calibration=Calibration(batch, bias="map"))
    assert {place: tensor.tolist() for place, tensor in static().items()} == {
        place: tensor.tolist() for place, tensor in before.items()
    }
    start = copy.deepcopy(model)
    report = convert(model, "ska", calibration=Calibration(batch, fraction=0.8, criterion="kl"))
    now = static()
    assert len(now) == 5
    assert all(torch.equal(now[place], tensor) for place, tensor in before.items())
    with torch.no_grad():
        moved = change([start(batch[3::4])], [model(batch[3::4])])
    assert min(stage.change for stage in report.stages[1:]) == pytest.approx(moved, abs=1e-6)
    convert(model, "ska", calibration=Calibration(batch, criterion="kl"))
    assert {type(mixer) for mixer in token_mixers(model).values()} == {StaticKeyAttention}
    model.train()(batch).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_what_is_made_under_inference_mode_can_be_trained():
    model, batch = vit(), images()
    with torch.inference_mode():
        convert(model, "ska", calibration=Calibration([batch * 1.0]))
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model.train()(batch).square().sum().backward()
    assert model.blocks[0].attn.qv.weight.grad.abs().sum() > 0


def test_chosen_layers_alone():
    model = vit()
    report = convert(model, "ska", layers=-1, calibration=Calibration(images(), fraction=1.0))
    assert {figures.layer for figures in report.heads} == {"blocks.1.attn"}
    assert [*token_mixers(model)] == ["blocks.1.attn"]


@pytest.mark.parametrize("criterion", ["change", "kl", "output"])
def test_a_share_takes_those_with_the_smallest_error(criterion):
    report = convert(vit(), "ska", calibration=Calibration(images(), fraction=0.5, criterion=criterion))
    errors = {"change": "change", "kl": "kl", "output": "output_error"}[criterion]
    static = [getattr(figures, errors) for figures in report.heads if figures.static]
    dynamic = [getattr(figures, errors) for figures in report.heads if not figures.static]
    assert len(static) == len(dynamic) == 3
    assert max(static) <= min(dynamic)


def test_a_budget_of_change_takes_as_many_as_stay_within():
    full = convert(vit(), "ska", calibration=Calibration(images(), fraction=1.0))
    ranked = sorted(full.heads, key=lambda figures: figures.change)
    taken = []
    for max_drop in (1.01 * ranked[0].change, 0.5 * full.stages[1].change, 2.0):
        report = convert(vit(), "ska", calibration=Calibration(images(), max_drop=max_drop))
        assert min(stage.change for stage in report.stages[1:]) <= max_drop
        assert "within max_drop" in report.note
        taken.append(sum(figures.static for figures in report.heads))
    assert taken[0] >= 1
    assert taken == sorted(taken)
    assert taken[-1] == 6


def test_a_budget_of_a_metric():
    batch = images()
    truth = vit()(batch).argmax(1)

    def accuracy(model):
        assert not model.training
        with torch.no_grad():
            return 100 * (model(batch).argmax(1) == truth).double().mean()

    model = vit().train()
    report = convert(model, "ska", calibration=Calibration(batch, max_drop=10.0, metric=accuracy))
    assert model.training
    assert report.stages[0].metric == 100.0
    assert accuracy(model.eval()) >= 90.0
    assert "of the metric" in report.note
    assert "metric" in str(report)


def test_a_metric_may_change_the_model_it_is_given():
    def changes(model):
        model.train().reset_classifier(0)
        return 1.0

    reports = [convert(vit(), "ska", calibration=Calibration(images(), metric=m)) for m in (changes, None)]
    assert [stage.change for stage in reports[0].stages] == [stage.change for stage in reports[1].stages]


def test_wrong_heads_are_refused_before_anything_is_fitted(monkeypatch):
    monkeypatch.setattr(calibrate_module.Calibrator, "survey", lambda _: pytest.fail("fitted"))
    for heads, text in (
        ({"blocks.0.attn": 0}, r"heads\['blocks.0.attn'\]=0 must be a list"),
        ({"blocks.9.attn": [0]}, "heads names 'blocks.9.attn', the chosen layers are blocks.0.attn, blocks.1.attn"),
    ):
        with pytest.raises(StaticKeyError, match=text):
            convert(vit(), "ska", calibration=Calibration(images(), heads=heads))


def test_a_layer_that_runs_twice_is_refused():
    class Twice(torch.nn.Sequential):
        def forward(self, x):
            return super().forward(super().forward(x))

    model = vit()
    model.blocks = Twice(*model.blocks)
    with pytest.raises(UnsupportedHostError, match=r"blocks.0.attn runs 2 times per pass; convert it without"):
        convert(model, "ska", calibration=images())


def test_bisection_finds_the_largest_set():
    ranked = [("a", head) for head in range(20)]
    for wanted in range(1, 21):
        calls = []

        def drop(heads, calls=calls):
            calls.append(len(heads))
            return float(len(heads))

        found, cost = largest_within(ranked, wanted + 0.5, drop, "points")
        assert (found, cost) == (ranked[:wanted], wanted)
        assert len(calls) <= 6
    with pytest.raises(StaticKeyError, match="the best found, head 0 of a alone, costs 1 points"):
        largest_within(ranked, 0.5, drop, "points")


def test_the_budget_nothing_meets_says_what_the_best_costs():
    model = vit()
    with pytest.raises(StaticKeyError, match=r"max_drop=1e-09: no head stays within it; the best found, head \d of "):
        convert(model, "ska", calibration=Calibration(images(), max_drop=1e-9))
    assert not token_mixers(model)


def test_the_converted_model_trains_resizes_and_copies_like_any_other():
    model = vit()
    convert(model, "ska", calibration=Calibration(images(), fraction=0.5, bias="map"))
    twin = copy.deepcopy(model)
    x = images(count=2)
    assert torch.equal(twin(x), model(x))
    names = {name.rpartition(".")[2] for name in model.no_weight_decay()}
    assert {"static_key", "map_bias"} <= names
    model.train()(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.eval().set_input_size((48, 64))
    assert model(torch.randn(1, 3, 48, 64)).isfinite().all()


def test_interruption_leaves_the_model_untouched(monkeypatch):
    """Wherever it comes: while images are read, while a metric runs, and between the last swaps."""
    model = vit()
    x, before = images(count=2), model(images(count=2))
    modules = dict(model.named_modules())

    def untouched():
        assert type(model).__name__ == "VisionTransformer"
        assert {name: id(module) for name, module in model.named_modules()} == {n: id(m) for n, m in modules.items()}
        assert torch.equal(model(x), before)

    def interrupted(*_):
        raise KeyboardInterrupt

    def loader():
        yield images(count=4)
        interrupted()

    with pytest.raises(KeyboardInterrupt):
        convert(model, "ska", calibration=loader())
    untouched()
    with pytest.raises(KeyboardInterrupt):
        convert(model, "ska", calibration=Calibration(images(), metric=interrupted))
    untouched()
    real = calibrate_module.swap

    def fails_late(target, *args, **kwargs):
        if target is model and token_mixers(model):
            interrupted()
        return real(target, *args, **kwargs)

    monkeypatch.setattr(calibrate_module, "swap", fails_late)
    heads = {"blocks.0.attn": [0], "blocks.1.attn": [1]}
    with pytest.raises(KeyboardInterrupt):
        convert(model, "ska", calibration=Calibration(images(), heads=heads))
    untouched()


def test_keys_of_a_rotary_host_are_stored_unturned():
    layer = SelfAttention(12, 2, feat_size=(3, 2), num_prefix_tokens=1, dtype=torch.float64)
    angles = torch.randn(2, 6, 3, dtype=torch.float64)
    rope = torch.cat([angles.sin().repeat_interleave(2, -1), angles.cos().repeat_interleave(2, -1)], -1)
    key = torch.randn(2, 7, 6, dtype=torch.float64)
    assert_close("key", turned_back(layer, layer._rotation(rope)(key), rope), key)


def broken():
    model = vit()
    model.blocks[1].attn.qkv.weight.data[0] = float("nan")
    return model


def static_already():
    model = vit()
    convert(model, "ska", layers=[0])
    return model


def talking():
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    return create_model("cait_xxs24_224", num_classes=5, **sizes)


def with_nan():
    batch = images()
    batch[13, 0, 0, 0] = float("nan")
    return batch


REFUSED = {
    "empty": (vit, lambda: Calibration([]), "calibration got 0 images; give at least 8, better 300 to 4,000"),
    "tiny": (vit, lambda: Calibration(images(count=7)), "calibration got 7 images; give at least 8"),
    "few asked for": (vit, lambda: Calibration(images(), num_images=7), "num_images=7 must be at least 8"),
    "no loader": (vit, lambda: Calibration(7), "calibration images must be a loader of batches, got int"),
    "no images": (vit, lambda: Calibration([torch.zeros(4, 3)]), r"a calibration batch is \(4, 3\) of torch.float32"),
    "bytes": (vit, lambda: Calibration([images().byte()]), r"of torch.uint8; give floats \(B, C, H, W\)"),
    "text": (vit, lambda: Calibration(["cat.jpg"]), "a calibration batch is str; give floats"),
    "two sizes": (vit, lambda: Calibration([images(), images(40)]), r"are \(3, 32, 32\) and \(3, 40, 40\); give one"),
    "nan images": (vit, lambda: Calibration(with_nan().split(8)), "images 8 to 15 hold NaN or infinity"),
    "nan weights": (broken, lambda: Calibration(images()), "output on the calibration images is not finite"),
    "converted": (static_already, lambda: Calibration(images()), None),
    "talking heads": (talking, lambda: Calibration(images()), "mixes the logits of all heads"),
    "no such layer": (
        vit,
        lambda: Calibration(images(), heads={"head": [0]}),
        "heads names 'head', the chosen layers",
    ),
    "no such head": (
        vit,
        lambda: Calibration(images(), heads={LAYERS[0]: [3]}),
        "has 3; its heads that are not static are 0, 1, 2",
    ),
    "no head": (vit, lambda: Calibration(images(), heads={LAYERS[0]: []}), "must name one head or more"),
    "wrong metric": (vit, lambda: Calibration(images(), metric=lambda m: float("nan")), "metric gives nan"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_the_model_as_it_was(case):
    build, calibration, message = REFUSED[case]
    model = build()
    state = copy.deepcopy(model.state_dict())
    if message is None:
        with pytest.raises(
            UnsupportedHostError, match=r"blocks.0.attn is already a StaticKeyAttention, with no keys"
        ):
            convert(model, "ska", layers=[0, 1], calibration=calibration())
    else:
        with pytest.raises(StaticKeyError, match=message):
            convert(model, "ska", calibration=calibration())
    assert state.keys() == model.state_dict().keys()


def test_nan_inside_the_model_is_named():
    model = create_model("vit_tiny_patch16_224", patch_size=8, **SIZES).eval()
    convert(model, "mhsa")

    def spoil(module, args, output):
        return output * float("nan")

    calibrator = calibrate_module.Calibrator(model, "all", Calibration(images()))
    calibrator.teacher.blocks[1].attn.qkv.register_forward_hook(spoil)
    with pytest.raises(StaticKeyError, match=r"queries of blocks.1.attn are not finite"):
        calibrator.run()


def test_other_sizes_than_the_models_are_refused():
    model = create_model("vit_tiny_patch16_224", patch_size=8, dynamic_img_size=True, **SIZES)
    with pytest.raises(StaticKeyError, match=r"make a grid of \(5, 5\) tokens where the model is built for \(4, 4\)"):
        convert(model, "ska", calibration=images(40))


WRONG = {
    "fit": ({"fit": "l2"}, "fit='l2' must be one of 'kl', 'lstsq', 'mean', 'constant'"),
    "criterion": ({"criterion": "std"}, "criterion='std' must be one of"),
    "bias": ({"bias": "row"}, "bias='row' must be None, 'key' or 'map'"),
    "bias of means": ({"fit": "mean", "bias": "key"}, "fit='mean' has no bias, got bias='key'"),
    "two choices": ({"fraction": 0.5, "max_drop": 1.0}, "fraction and max_drop both choose heads; give one"),
    "fraction": ({"fraction": 0}, "fraction=0 must be above 0 and at most 1"),
    "drop": ({"max_drop": -1.0}, "max_drop=-1.0 must not be negative"),
    "heads": ({"heads": [0]}, r"heads=\[0\] must map names of layers to lists of heads"),
    "images": ({"num_images": 0}, "num_images=0 must be a positive integer"),
}


@pytest.mark.parametrize("case", WRONG)
def test_settings_are_refused_at_once(case):
    arguments, message = WRONG[case]
    with pytest.raises(StaticKeyError, match=message):
        Calibration([], **arguments)


def test_only_ska_has_keys_to_fit():
    with pytest.raises(StaticKeyError, match="calibration fits the keys of mixer 'ska', not of 'cska'"):
        convert(vit(), "cska", calibration=images())
    with pytest.raises(StaticKeyError, match="leave out mixer_args and keep_weights"):
        convert(vit(), "ska", mixer_args={"scale": 1.0}, calibration=images())
