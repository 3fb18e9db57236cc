import numpy as np
import pytest

from statickey.compare import bootstrap_interval, paired_difference, t_interval


def test_t_interval_golden():
    # mean 2, standard error 1/sqrt(3), t(0.975, 2) = 4.302653
    low, high = t_interval([1.0, 2.0, 3.0])
    assert low == pytest.approx(2 - 4.302653 / 3**0.5, abs=1e-5)
    assert high == pytest.approx(2 + 4.302653 / 3**0.5, abs=1e-5)
    assert t_interval([1.0]) is None
    assert t_interval([1.0, 1.0]) is None


def test_bootstrap_covers_the_mean_at_the_expected_width():
    values = np.random.default_rng(0).normal(0.3, 1.0, 4000)
    low, high = bootstrap_interval(values)
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 / 4000**0.5, rel=0.1)
    assert bootstrap_interval(np.ones(10)) == (1.0, 1.0)


def test_difference_pairs_seeds_and_images():
    rng = np.random.default_rng(0)
    base = {s: rng.random(2000) < 0.6 for s in (0, 1, 2)}
    better = {s: base[s] | (rng.random(2000) < 0.1) for s in (1, 2)} | {9: rng.random(2000) < 0.5}
    result = paired_difference("mhsa", base, better)
    assert result.seeds == (1, 2)
    assert result.mean == pytest.approx(100 * np.mean([(better[s].mean() - base[s].mean()) for s in (1, 2)]))
    assert result.image_interval[0] > 0
    assert paired_difference("mhsa", base, {9: better[9]}) is None


def test_decided_needs_both_intervals():
    wins = np.ones(1000, bool)
    wins[:300] = False
    base = {s: wins.copy() for s in range(3)}
    rng = np.random.default_rng(1)
    clear = {s: base[s] | (rng.random(1000) < 0.3) for s in range(3)}
    assert paired_difference("mhsa", base, clear).decided is True
    assert paired_difference("mhsa", {0: base[0]}, {0: clear[0]}).decided is None
    shaky = {s: base[s] ^ (rng.random(1000) < 0.02) for s in range(3)}
    shaky[0] = clear[0]
    assert paired_difference("mhsa", base, shaky).decided is False
