import time

import numpy as np
import pytest
from scipy import stats

from statickey.compare import holm, paired_difference, paired_differences, t_interval
from statickey.compare.statistics import joint_half_width, joint_p_value
from statickey.errors import StaticKeyError
from statickey.tasks.accuracy import Accuracy


def scored(right):
    """Evidence of a network that got these images right."""
    right = np.asarray(right)
    return Accuracy(right.astype(int), np.ones(len(right), int))


def seeds_of(*rights):
    return {seed: scored(right) for seed, right in enumerate(rights)}


def test_accuracy_takes_weights_as_counts():
    run = Accuracy(np.array([0, 1, 2, 1]), np.array([0, 1, 1, 0]))
    assert run.value() == 50
    assert run.value(np.array([3.0, 0, 1, 0])) == 75
    assert run.num_images == 4
    assert Accuracy(**run.arrays()).value() == 50
    with pytest.raises(StaticKeyError, match=r"predicted \(4,\) and truth \(3,\) must both be"):
        Accuracy(run.predicted, run.truth[:3])
    with pytest.raises(StaticKeyError, match=r"must both be \(N,\), N > 0"):
        Accuracy(np.array([]), np.array([]))


def test_t_interval_golden():
    # mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.302653
    low, high = t_interval([1.0, 2.0, 3.0])
    assert low == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-5)
    assert high == pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-5)
    assert t_interval([1.0]) is None
    assert t_interval([1.0, 1.0]) is None


def test_rounding_is_no_spread():
    equal = [0.1 + 0.2, 0.3, 0.3]
    assert np.std(equal) > 0
    assert t_interval(equal) is None


def test_image_interval_covers_the_mean_at_the_expected_width():
    rng = np.random.default_rng(0)
    difference = paired_difference("mhsa", seeds_of(rng.random(4000) < 0.5), seeds_of(rng.random(4000) < 0.5))
    low, high = difference.image_interval
    assert low < difference.mean < high
    assert high - low == pytest.approx(2 * 1.96 * 100 * (0.5 / 4000) ** 0.5, rel=0.1)
    certain = paired_difference("mhsa", seeds_of([False] * 10), seeds_of([True] * 10))
    assert certain.image_interval == (100.0, 100.0)


def test_difference_pairs_seeds_and_images():
    rng = np.random.default_rng(0)
    base = {s: rng.random(2000) < 0.6 for s in (0, 1, 2)}
    better = {s: base[s] | (rng.random(2000) < 0.1) for s in (1, 2)} | {9: rng.random(2000) < 0.5}
    theirs, ours = ({s: scored(right) for s, right in runs.items()} for runs in (base, better))
    result = paired_difference("mhsa", theirs, ours)
    assert result.seeds == (1, 2)
    assert result.mean == pytest.approx(100 * np.mean([(better[s].mean() - base[s].mean()) for s in (1, 2)]))
    assert result.image_interval[0] > 0
    assert paired_difference("mhsa", theirs, {9: ours[9]}) is None


def test_one_interval_counts_seeds_and_images():
    """By the bootstrap as by the exact mean squares of the table of seeds and images."""
    rng = np.random.default_rng(3)
    hard = rng.random(1500)
    base, other = ([rng.random(1500) < hard + lift for _ in range(4)] for lift in (0.0, 0.05))
    found = paired_difference("mhsa", seeds_of(*base), seeds_of(*other))
    table = 100.0 * (np.array(other, float) - np.array(base, float))
    seeds, images = table.shape
    left = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0) + table.mean()
    residual = (left**2).sum() / ((seeds - 1) * (images - 1)) / (seeds * images)
    of_seeds = max(table.mean(axis=1).var(ddof=1) / seeds, residual)
    of_images = table.mean(axis=0).var(ddof=1) / images - residual
    half = np.sqrt(stats.t.isf(0.025, seeds - 1) ** 2 * of_seeds + 1.96**2 * max(of_images, 0))
    low, high = found.interval
    assert found.mean == pytest.approx(table.mean())
    assert (low + high) / 2 == pytest.approx(found.mean)
    assert (high - low) / 2 == pytest.approx(half, rel=0.04)


@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_false_verdicts_are_at_most_five_and_a_half_percent(seeds):
    """Without a difference, whatever the shares of seeds, images and residual in the variance of the mean."""
    rng = np.random.default_rng(seeds)
    worst = 0.0
    for of_seeds in (0, 0.1, 0.3, 1, 3, 10, 1000):
        for residual in (0, 0.2, 0.5, 0.8, 1):
            mean = rng.normal(size=50_000) * np.sqrt(1 + of_seeds)
            spread = np.sqrt((of_seeds + residual) * rng.chisquare(seeds - 1, 50_000) / (seeds - 1))
            half = joint_half_width(spread, 1.0, np.sqrt(residual), seeds)
            worst = max(worst, 100 * np.mean(np.abs(mean) > half))
    assert 4.5 < worst <= 5.5


@pytest.mark.parametrize("seed_effect", [0.0, 0.5])
def test_false_verdicts_of_right_and_wrong(seed_effect):
    rng = np.random.default_rng(0)
    shape = (1500, 2, 3, 200)
    skill = rng.normal(0, seed_effect, (*shape[:3], 1)) + rng.normal(0, 1, (1500, 2, 1, 200))
    right = (rng.random(shape) < 1 / (1 + np.exp(-skill))).astype(float)
    difference = right[:, 0] - right[:, 1]
    per_seed, per_image, mean = difference.mean(2), difference.mean(1), difference.mean((1, 2))
    left = difference - per_seed[..., None] - per_image[:, None] + mean[:, None, None]
    residual = np.sqrt((left**2).sum((1, 2)) / (2 * 199) / (3 * 200))
    half = joint_half_width(stats.sem(per_seed, axis=1), stats.sem(per_image, axis=1), residual, 3)
    assert 100 * np.mean(np.abs(mean) > half) <= 5.5


def test_p_value_inverts_the_interval():
    errors = (0.5, 0.3, 0.2)
    for level in (0.3, 0.05, 0.001):
        edge = float(joint_half_width(*errors, 4, level))
        assert joint_p_value(edge, *errors, 4) == pytest.approx(level, rel=1e-6)
        assert joint_p_value(-edge, *errors, 4) == pytest.approx(level, rel=1e-6)
    assert joint_p_value(0.0, *errors, 4) == 1
    assert joint_p_value(1e300, *errors, 4) == 1e-100


def test_holm_golden():
    # 3 x 0.01, 2 x 0.02, 1 x 0.03 raised to the one before; never above one
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_decided_counts_seeds_and_images():
    wins = np.ones(1000, bool)
    wins[:300] = False
    rng = np.random.default_rng(1)
    clear = [wins | (rng.random(1000) < 0.3) for _ in range(3)]
    base = seeds_of(wins, wins, wins)
    assert paired_difference("mhsa", base, seeds_of(*clear)).decided is True
    one = paired_difference("mhsa", {0: base[0]}, seeds_of(clear[0]))
    assert (one.decided, one.interval, one.p_value) == (None, None, None)
    assert one.image_interval[0] > 0
    shaky = [clear[0], *(wins ^ (rng.random(1000) < 0.02) for _ in range(2))]
    assert paired_difference("mhsa", base, seeds_of(*shaky)).decided is False
    assert paired_difference("mhsa", base, base).decided is None


def test_seeds_that_happen_to_agree_decide_nothing():
    """Each seed is right at 12 other images of 1,000: the same accuracy, of chance."""
    base = np.arange(1000) >= 500
    ours = [base | ((np.arange(1000) >= 12 * s) & (np.arange(1000) < 12 * (s + 1))) for s in range(3)]
    found = paired_difference("mhsa", seeds_of(base, base, base), seeds_of(*ours))
    assert found.mean == pytest.approx(1.2)
    assert found.seed_interval is None
    assert found.image_interval[0] > 0
    assert found.interval[1] - found.interval[0] > 1.4 * (found.image_interval[1] - found.image_interval[0])
    assert found.interval[0] < 1.2 - 0.8


def test_a_table_corrects_for_all_of_its_mixers():
    rng = np.random.default_rng(5)
    base = [rng.random(3000) < 0.5 for _ in range(5)]
    mixers = {"mhsa": seeds_of(*base)}
    for name, lift in (("much", 0.3), ("some", 0.06), ("none", 0.0), ("nil", 0.0)):
        mixers[name] = seeds_of(*[b ^ (rng.random(3000) < 0.05) | (rng.random(3000) < lift) for b in base])
    found = paired_differences("mhsa", mixers)
    assert list(found) == ["much", "some", "none", "nil"]
    assert [d.adjusted_p for d in found.values()] == holm([d.p_value for d in found.values()])
    assert found["much"].adjusted_p == pytest.approx(4 * found["much"].p_value)
    alone = paired_difference("mhsa", mixers["mhsa"], mixers["some"])
    assert alone.p_value == alone.adjusted_p == found["some"].p_value < found["some"].adjusted_p
    assert found["much"].decided
    assert not found["none"].decided
    mixers["some"] = {0: mixers["some"][0]}
    fewer = paired_differences("mhsa", mixers)
    assert fewer["some"].decided is None
    assert fewer["much"].adjusted_p == pytest.approx(3 * found["much"].p_value)


def test_scores_of_other_images_are_refused():
    with pytest.raises(StaticKeyError, match=r"different images \(mhsa seed 0 of 10, .* seed 0 of 12\)"):
        paired_difference("mhsa", seeds_of([True] * 10), seeds_of([True] * 12))


def test_a_table_of_ten_thousand_images_takes_seconds():
    rng = np.random.default_rng(0)
    mixers = {name: seeds_of(*(rng.random((3, 10_000)) < 0.6)) for name in ("a", "b", "c", "d")}
    start = time.process_time()
    paired_differences("a", mixers)
    assert time.process_time() - start < 5
