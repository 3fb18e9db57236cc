"""Keys of heads from images: sums against two passes, closed forms and the convex fit against brute force."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from statickey.convert.calibration import statistics as statistics_module
from statickey.convert.calibration.divergence import divergence, fit_divergence
from statickey.convert.calibration.fits import HeadKeys, constant_map, fit_heads, least_squares
from statickey.convert.calibration.measure import head_errors
from statickey.convert.calibration.reading import LayerCall
from statickey.convert.calibration.statistics import LayerStatistics
from tolerances import assert_close

IMAGES, HEADS, TOKENS, WIDTH = 12, 2, 6, 3
BIASES = [None, "key", "map"]


def calls(mask=None, *, noise=1.0, images=IMAGES, batches=(5, 4, 3), seed=0):
    """A layer's queries and keys that belong to places, and to images by ``noise``."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (images, HEADS, TOKENS, WIDTH)
    query = draw(*shape) + draw(HEADS, TOKENS, WIDTH) + 0.5
    key = noise * draw(*shape) + draw(HEADS, TOKENS, WIDTH)
    value = draw(*shape)
    masks = None
    if mask == "shared":
        masks = draw(1, HEADS, TOKENS, TOKENS)
    elif mask == "each":
        masks = draw(images, 1, TOKENS, TOKENS)
        masks[::2, :, :, 0] = float("-inf")
    start, made = 0, []
    for size in batches:
        part = slice(start, start + size)
        own = masks if masks is None or len(masks) == 1 else masks[part]
        made.append(LayerCall(query[part], key[part], value[part], own, size))
        start += size
    return made


def whole(parts):
    mask = parts[0].mask
    if mask is not None and len(mask) > 1:
        mask = torch.cat([part.mask for part in parts])
    query, key, value = (torch.cat([getattr(part, n) for part in parts]) for n in ("query", "key", "value"))
    return LayerCall(query, key, value, mask, len(query))


def test_half_precision_is_fitted_as_finely_as_float32():
    """The queries that the divergence's fit holds are not in half, whose logits would be too coarse for it."""
    half, single = (
        LayerStatistics.of((replace(c, **as_type(c, torch.bfloat16, dtype)) for c in calls()), IMAGES)
        for dtype in (torch.bfloat16, torch.float32)
    )
    made, wanted = (fit_heads(found, "kl", None, [0, 1]) for found in (half, single))
    assert torch.equal(made.key, wanted.key)


def as_type(call, rounded, dtype):
    return {name: getattr(call, name).to(rounded).to(dtype) for name in ("query", "key", "value")}


@pytest.mark.parametrize("mask", [None, "shared", "each"])
def test_streaming_sums_are_those_of_two_passes(mask):
    parts = calls(mask)
    found, all_at_once = LayerStatistics.of(parts, IMAGES), whole(parts)
    query, key = all_at_once.query, all_at_once.key
    centred = key - key.mean(2, keepdim=True)
    logits = query @ centred.mT
    maps = (query @ key.mT + (0 if mask is None else all_at_once.mask)).softmax(-1)
    assert found.count == IMAGES
    assert_close("key_sum", found.key_sum, key.sum(0))
    assert_close("query_sum", found.query_sum, query.sum(0))
    assert_close("gram", found.gram, torch.einsum("bhnd,bhne->hde", query, query))
    assert_close("cross", found.cross, torch.einsum("bhnd,bhnm->hdm", query, logits))
    assert_close("logit_sum", found.logit_sum, logits.sum(0))
    assert_close("map_sum", found.map_sum, maps.sum(0))
    assert_close("spread", found.spread(), maps.std(0, correction=0).mean((1, 2)) * TOKENS)
    sample = found.sample()
    assert_close("query", sample.query, query)
    assert_close("map_sum of the sample", sample.map_sum, maps.sum(0))
    assert_close("pulled", sample.pulled, torch.einsum("bhij,bhid->hjd", maps, query))
    logs = torch.where(maps > 0, maps * (maps.log() - (0 if mask is None else all_at_once.mask)), 0.0)
    assert_close("constant", sample.constant, logs.sum((0, 2, 3)))


def test_a_bounded_sample_is_spread_over_the_images_and_has_its_own_sums(monkeypatch):
    parts = calls()
    monkeypatch.setattr(statistics_module, "SAMPLE_BYTES", 4 * parts[0].query[0].nbytes)
    sample, all_at_once = LayerStatistics.of(parts, IMAGES).sample(), whole(parts)
    chosen = [0, 3, 6, 9]
    assert_close("query", sample.query, all_at_once.query[chosen])
    maps = all_at_once.maps()[0][chosen]
    assert_close("maps", sample.map_sum, maps.sum(0))
    assert_close("pulled", sample.pulled, torch.einsum("bhij,bhid->hjd", maps, sample.query))


@pytest.mark.parametrize("bias", BIASES)
def test_least_squares_is_that_of_the_written_out_regression(bias):
    parts = calls()
    keys, full = least_squares(LayerStatistics.of(parts, IMAGES), bias, [0, 1]), whole(parts)
    logits = full.query @ (full.key - full.key.mean(2, keepdim=True)).mT
    for head in range(HEADS):
        query = full.query[:, head].reshape(-1, WIDTH)
        columns = [query]
        if bias == "key":
            columns.append(torch.ones(len(query), 1, dtype=torch.float64))
        elif bias == "map":
            columns.append(torch.eye(TOKENS, dtype=torch.float64).repeat(IMAGES, 1))
        design, wanted = torch.cat(columns, dim=1), logits[:, head].reshape(-1, TOKENS)
        expected = design @ torch.linalg.lstsq(design, wanted).solution
        assert_close("logits", keys.logits(full.query)[:, head].reshape(-1, TOKENS), expected)


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("far", [-100.0, float("-inf")])
def test_least_squares_leaves_out_what_a_mask_does(bias, far):
    """Windows of a shifted map: of two kinds, the keys of one in two parts that do not see each other."""
    mask = torch.zeros(IMAGES, 1, TOKENS, TOKENS, dtype=torch.float64)
    mask[::2, :, :2, 2:] = mask[::2, :, 2:, :2] = far
    parts = [replace(part, mask=own) for part, own in zip(calls(noise=0.5), mask.split([5, 4, 3]), strict=True)]
    keys, full = least_squares(LayerStatistics.of(parts, IMAGES), bias, [0, 1]), whole(parts)
    counts = (mask > -50).expand(-1, HEADS, -1, -1)
    missed = full.query @ full.key.mT - keys.logits(full.query)
    blind = least_squares(LayerStatistics.of(calls(noise=0.5), IMAGES), bias, [0, 1])
    for head in range(HEADS):
        error, other = (
            written_out_error(full, counts[:, head], head, each)
            for each in (missed, full.query @ full.key.mT - blind.logits(full.query))
        )
        assert_close("squared error", error, regression_error(full, counts[:, head], head, bias))
        assert error < 0.999 * other


def written_out_error(full, counts, head, missed):
    """Of each row, less its mean over the keys that count."""
    rows = [row[own] for row, own in zip(missed[:, head].flatten(0, 1), counts.flatten(0, 1), strict=True)]
    return sum((row - row.mean()).square().sum() for row in rows)


def regression_error(full, counts, head, bias):
    """What is left by the best of all keys, biases and numbers common to a row, as one dense regression."""
    width = {None: WIDTH, "key": WIDTH + 1, "map": WIDTH + TOKENS}[bias]
    rows, wanted = [], []
    logits = full.query[:, head] @ full.key[:, head].mT
    for image in range(IMAGES):
        for place in range(TOKENS):
            numbers = torch.zeros(width, dtype=torch.float64)
            numbers[:WIDTH] = full.query[image, head, place]
            if bias is not None:
                numbers[WIDTH + (place if bias == "map" else 0)] = 1
            for key in counts[image, place].nonzero().flatten():
                row = torch.zeros(TOKENS * width + IMAGES * TOKENS, dtype=torch.float64)
                row[key * width : (key + 1) * width] = numbers
                row[TOKENS * width + image * TOKENS + place] = 1
                rows.append(row)
                wanted.append(logits[image, place, key])
    design, target = torch.stack(rows), torch.stack(wanted)
    solution = torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution
    return (design @ solution - target[:, None]).square().sum()


def test_mean_and_constant():
    parts, full = calls("shared"), whole(calls("shared"))
    found = LayerStatistics.of(parts, IMAGES)
    assert_close("mean key", fit_heads(found, "mean", None, [1]).key, full.key.mean(0)[[1]])
    constant = constant_map(found, [1, 0])
    maps = full.maps_of(constant.logits(full.query[:, [1, 0]]).flip(1))[0]
    assert_close("mean map", maps, full.maps()[0].mean(0).expand_as(maps))
    assert not constant.key.any()


def by_scipy(full, head, bias):
    """The least divergence, from torch's own derivatives of the formula."""
    query, mask = full.query[:, head], full.mask
    mask = 0.0 if mask is None else mask[:, head if mask.shape[1] > 1 else 0]
    maps = full.maps()[0][:, head]
    sizes = {None: 0, "key": TOKENS, "map": TOKENS**2}

    def value(point):
        x = torch.tensor(point, requires_grad=True)
        logits = query @ x[: TOKENS * WIDTH].view(TOKENS, WIDTH).mT + mask
        if bias is not None:
            rest = x[TOKENS * WIDTH :]
            logits = logits + (rest if bias == "key" else rest.view(TOKENS, TOKENS))
        terms = torch.where(maps > 0, maps * (maps.log() - logits.log_softmax(-1)), 0.0)
        loss = terms.sum() / (IMAGES * TOKENS)
        loss.backward()
        return loss.item(), x.grad.numpy()

    start = np.zeros(TOKENS * WIDTH + sizes[bias])
    options = {"maxiter": 5000, "maxfun": 10000, "ftol": 1e-15, "gtol": 1e-9}
    return minimize(value, start, jac=True, method="L-BFGS-B", options=options).fun


@pytest.mark.parametrize("mask", [None, "shared", "each"])
@pytest.mark.parametrize("bias", BIASES)
def test_the_divergence_is_as_small_as_another_solver_makes_it(bias, mask):
    parts, full = calls(mask), whole(calls(mask))
    found = LayerStatistics.of(parts, IMAGES)
    for head in range(HEADS):
        start = (torch.zeros(TOKENS, WIDTH, dtype=torch.float64), None)
        tight = fit_divergence(found.sample(), head, [start], bias, tolerance=1e-12)
        least = by_scipy(full, head, bias)
        assert divergence(found.sample(), head, tight, bias) == pytest.approx(least, rel=1e-5)
        usual = fit_heads(found, "kl", bias, [head])
        added = usual.key_bias if bias == "key" else usual.map_bias
        numbers = (usual.key[0], None if added is None else added[0])
        assert divergence(found.sample(), head, numbers, bias) <= least * 1.005


@pytest.mark.parametrize("bias", BIASES)
def test_divergence_is_what_the_errors_report(bias):
    """The fit's own number, on the images it was fitted on, is the mean of the maps' divergences."""
    parts = calls("each")
    found = LayerStatistics.of(parts, IMAGES)
    keys = fit_heads(found, "kl", bias, [0, 1])
    errors = head_errors(parts, keys)
    for head in range(HEADS):
        added = keys.key_bias if bias == "key" else keys.map_bias
        numbers = (keys.key[head], None if added is None else added[head])
        assert divergence(found.sample(), head, numbers, bias) == pytest.approx(float(errors.kl[head]), rel=1e-9)


def test_errors_are_those_of_the_formulas():
    parts, full = calls(), whole(calls())
    keys = HeadKeys(torch.randn(HEADS, TOKENS, WIDTH, dtype=torch.float64))
    errors = head_errors(parts, keys)
    own, static = full.query @ full.key.mT, full.query @ keys.key.mT
    maps, others = own.softmax(-1), static.softmax(-1)
    own, static = (logits - logits.mean(-1, keepdim=True) for logits in (own, static))
    out, other = maps @ full.value, others @ full.value
    for head in range(HEADS):
        mine = (own[:, head] - static[:, head]).square().sum() / own[:, head].square().sum()
        assert_close("explained", errors.explained[head], 1 - mine)
        kl = (maps * (maps / others).log())[:, head].sum(-1).mean()
        assert_close("kl", errors.kl[head], kl)
        assert_close(
            "output", errors.output[head], (out - other)[:, head].square().sum() / out[:, head].square().sum()
        )


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("fit", ["mean", "lstsq", "kl"])
def test_a_head_that_is_static_is_found_exactly(fit, bias):
    parts = calls(noise=0.0)
    keys = fit_heads(LayerStatistics.of(parts, IMAGES), fit, bias, [0, 1])
    errors = head_errors(parts, keys)
    assert errors.kl.abs().max() < 1e-7
    assert errors.output.max() < 1e-7
    assert (errors.explained - 1).abs().max() < 1e-6


def test_a_bias_only_helps_and_the_distribution_is_nearer_than_logits():
    parts = calls(images=60, batches=(60,))
    found = LayerStatistics.of(parts, 60)
    kl = {
        (fit, bias): float(head_errors(parts, fit_heads(found, fit, bias, [0, 1])).kl.mean())
        for fit, bias in [("mean", None), ("lstsq", None), ("constant", "map"), *(("kl", bias) for bias in BIASES)]
    }
    assert kl["kl", "map"] <= kl["kl", "key"] <= kl["kl", None] <= kl["lstsq", None]
    assert kl["kl", "map"] <= kl["constant", "map"]
    assert all(math.isfinite(value) and value >= 0 for value in kl.values())


def test_queries_of_fewer_directions_than_numbers_are_no_obstacle():
    parts = calls()
    for part in parts:
        part.query[..., -1] = 0
    found = LayerStatistics.of(parts, IMAGES)
    for bias in BIASES:
        keys = fit_heads(found, "kl", bias, [0, 1])
        assert keys.key.isfinite().all()
        assert float(head_errors(parts, keys).kl.max()) < float(
            head_errors(parts, fit_heads(found, "mean", None, [0, 1])).kl.max()
        )
