"""Means, spreads and paired differences, with intervals from seeds, from images, and from both together.

The model: at seed s and image i a difference is mean + seed effect + image effect + residual, all independent.
Then the mean over S seeds has the variance seed/S + image/I + residual/(SI). The spread over seeds estimates the
first and the last term, a bootstrap over images with seeds fixed the last two, and the seeds' deviations in that
bootstrap the last alone. The joint interval is MOVER's, mean ± sqrt(t² seed² + z² (image² - residual²)) in standard
errors, t with S - 1 degrees of freedom, where the seed error is at least the residual one: a spread below it is
chance, so that seeds which happen to agree decide nothing alone. Simulated without any difference, over all shares of
the three variances, 3, 5 and 10 seeds give at most 5.1 % verdicts; docs/results/README.md has the rates of what was
tried besides.

Source: Zou and Donner 2008, Statistics in Medicine 27:1693 (MOVER); Holm 1979, Scand. J. Statist. 6:65.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from ..errors import StaticKeyError
from ..tasks.task import Evidence

Interval = tuple[float, float]
RESAMPLES = 2000
LEVEL = 0.05
_ROUNDING = 1e-9
"""Spread that is rounding, in parts of the largest value."""


@dataclass(frozen=True)
class PairedDifference:
    """How far one mixer's metric is from the baseline's."""

    baseline: str
    mean: float
    seeds: tuple[int, ...]
    """The seeds both have."""
    seed_interval: Interval | None
    """95 % interval of the mean over seeds (t); None below two seeds or without spread."""
    image_interval: Interval
    """95 % interval over images (paired bootstrap), seeds held fixed."""
    interval: Interval | None
    """95 % interval over seeds and images together; None below two seeds or without spread over seeds."""
    p_value: float | None
    """Of no difference, by the joint interval: the level at which it touches zero."""
    adjusted_p: float | None
    """``p_value`` by Holm over all mixers of the table."""

    @property
    def decided(self) -> bool | None:
        """Whether there is a difference, with a chance of 5 % of any false verdict in the table; None: no p value."""
        return None if self.adjusted_p is None else self.adjusted_p < LEVEL


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for the latter below two values."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def t_interval(differences: Sequence[float]) -> Interval | None:
    """95 % interval of the mean of paired differences, by Student's t; None below two or if all are equal."""
    error = _seed_error(differences)
    if error == 0:
        return None
    low, high = stats.t.interval(1 - LEVEL, len(differences) - 1, loc=statistics.fmean(differences), scale=error)
    return float(low), float(high)


def _seed_error(differences: Sequence[float]) -> float:
    """Standard error of the mean over seeds; 0 below two seeds, or if they differ by rounding only."""
    if len(differences) < 2 or np.ptp(differences) <= _ROUNDING * np.max(np.abs(differences)):
        return 0.0
    return float(stats.sem(differences))


def joint_half_width(seed_error: Any, image_error: Any, residual_error: Any, seeds: int, level: float = LEVEL) -> Any:
    """Half of the interval that counts seeds and images together.

    Args:
        seed_error: Standard error of the mean over seeds: their spread by the root of their number. Number or array.
        image_error: Standard error over images, seeds held fixed.
        residual_error: The part of both that is neither the seeds' nor the images' alone.
        seeds: Number of seeds, two at least.
        level: One minus the coverage.
    """
    residual = np.square(residual_error)
    of_seeds = np.maximum(np.square(seed_error), residual)
    of_images = np.maximum(np.square(image_error) - residual, 0)
    t, z = stats.t.isf(level / 2, seeds - 1), stats.norm.isf(level / 2)
    return np.sqrt(t**2 * of_seeds + z**2 * of_images)


def joint_p_value(mean: float, seed_error: float, image_error: float, residual_error: float, seeds: int) -> float:
    """The level at which the joint interval around ``mean`` touches zero, 1e-100 at least."""

    def room(log_level: float) -> float:
        half = joint_half_width(seed_error, image_error, residual_error, seeds, math.exp(log_level))
        return float(half) - abs(mean)

    lowest = math.log(1e-100)
    if mean == 0 or room(lowest) <= 0:
        return 1.0 if mean == 0 else 1e-100
    return math.exp(optimize.brentq(room, lowest, 0.0))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values by Holm's step-down method, in the given order: any false verdict among them counts."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, place in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def paired_difference(
    baseline: str, theirs: Mapping[int, Evidence], ours: Mapping[int, Evidence]
) -> PairedDifference | None:
    """Compare two mixers on the seeds both have run, as if no other were looked at.

    Args:
        baseline: Name of the mixer that ``theirs`` is of.
        theirs: The baseline's evidence at each seed.
        ours: The mixer's.

    Returns:
        The difference, ours minus theirs, or None without a common seed.

    Raises:
        StaticKeyError: They are of different numbers of images.
    """
    other = f"not {baseline}"
    return paired_differences(baseline, {baseline: theirs, other: ours}).get(other)


def paired_differences(baseline: str, evidence: Mapping[str, Mapping[int, Evidence]]) -> dict[str, PairedDifference]:
    """Compare the mixers of a table with one of them, each on the seeds both have run.

    Args:
        baseline: Name of the mixer to compare with.
        evidence: For each mixer, its evidence at each seed, all of the same images.

    Returns:
        For each other mixer that shares a seed with it, the difference, its own minus the baseline's.

    Raises:
        StaticKeyError: They are of different numbers of images.
    """
    resampled = _resampled(evidence)
    found: dict[str, PairedDifference] = {}
    for name, ours in evidence.items():
        seeds = tuple(sorted(set(evidence[baseline]) & set(ours)))
        if name == baseline or not seeds:
            continue
        per_seed = [ours[s].value() - evidence[baseline][s].value() for s in seeds]
        by_resample = np.stack([resampled[name, s] - resampled[baseline, s] for s in seeds], axis=1)
        found[name] = _difference(baseline, seeds, per_seed, by_resample)
    known = {name: d.p_value for name, d in found.items() if d.p_value is not None}
    adjusted = dict(zip(known, holm(list(known.values())), strict=True))
    return {name: replace(difference, adjusted_p=adjusted.get(name)) for name, difference in found.items()}


def _resampled(evidence: Mapping[str, Mapping[int, Evidence]]) -> dict[tuple[str, int], NDArray[np.float64]]:
    """The metric of every mixer and seed over the same resamples of the images, (RESAMPLES,) each."""
    runs = {(name, seed): run for name, of_name in evidence.items() for seed, run in of_name.items()}
    sizes = {run.num_images: f"{name} seed {seed}" for (name, seed), run in runs.items()}
    if len(sizes) > 1:
        different = ", ".join(f"{name} of {size}" for size, name in sizes.items())
        raise StaticKeyError(f"scores of different images ({different}); score all runs on the same ones")
    (size,) = sizes
    values = {key: np.empty(RESAMPLES) for key in runs}
    rng = np.random.default_rng(0)
    for place in range(RESAMPLES):
        weights = np.bincount(rng.integers(size, size=size), minlength=size).astype(np.float64)
        for key, run in runs.items():
            values[key][place] = run.value(weights)
    return values


def _difference(
    baseline: str, seeds: tuple[int, ...], per_seed: Sequence[float], by_resample: NDArray[np.float64]
) -> PairedDifference:
    """One mixer's difference, from those of its seeds over all images and over each resample, (RESAMPLES, S)."""
    mean = statistics.fmean(per_seed)
    low, high = np.quantile(by_resample.mean(axis=1), (LEVEL / 2, 1 - LEVEL / 2)).tolist()
    interval, p_value = None, None
    errors = _errors(per_seed, by_resample) if len(seeds) > 1 else None
    if errors is not None and max(errors[0], errors[2]) > _ROUNDING * abs(mean):
        half = float(joint_half_width(*errors, len(seeds)))
        interval = mean - half, mean + half
        p_value = joint_p_value(mean, *errors, len(seeds))
    return PairedDifference(baseline, mean, seeds, t_interval(per_seed), (low, high), interval, p_value, p_value)


def _errors(per_seed: Sequence[float], by_resample: NDArray[np.float64]) -> tuple[float, float, float]:
    """Standard errors of the mean difference: over seeds, over images, and of what is left."""
    of_seeds = by_resample.mean(axis=1)
    deviations = by_resample - of_seeds[:, None]
    seeds = len(per_seed)
    residual = deviations.var(axis=0, ddof=1).sum() / (seeds * (seeds - 1))
    return _seed_error(per_seed), float(of_seeds.std(ddof=1)), float(np.sqrt(residual))
