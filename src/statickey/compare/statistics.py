"""Means, spreads and paired differences, with intervals from seeds and from test images."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Interval = tuple[float, float]


@dataclass(frozen=True)
class PairedDifference:
    """How far one mixer's accuracy is from the baseline's, in percentage points."""

    baseline: str
    mean: float
    seeds: tuple[int, ...]
    """The seeds both have."""
    seed_interval: Interval | None
    """95 % interval of the mean over seeds (t); None below two seeds or without spread."""
    image_interval: Interval
    """95 % interval over test images (paired bootstrap), seeds held fixed."""

    @property
    def decided(self) -> bool | None:
        """Whether both intervals leave zero out; None when seeds are too few to tell."""
        if self.seed_interval is None:
            return None
        return all(low > 0 or high < 0 for low, high in (self.seed_interval, self.image_interval))


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None for the latter below two values."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def t_interval(differences: Sequence[float]) -> Interval | None:
    """95 % interval of the mean of paired differences, by Student's t."""
    if len(differences) < 2:
        return None
    mean, error = statistics.fmean(differences), float(stats.sem(differences))
    if error == 0:
        return None
    low, high = stats.t.interval(0.95, len(differences) - 1, loc=mean, scale=error)
    return float(low), float(high)


def bootstrap_interval(differences: NDArray[np.float64], seed: int = 0) -> Interval:
    """95 % percentile interval of the mean over images, 2,000 resamples.

    Args:
        differences: One number per image: what the mixer got right minus what the baseline did.
        seed: Seed of the resampling.
    """
    if np.ptp(differences) == 0:
        return float(differences[0]), float(differences[0])
    result = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=2000,
        batch=100,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def paired_difference(
    baseline: str, theirs: dict[int, NDArray[np.bool_]], ours: dict[int, NDArray[np.bool_]]
) -> PairedDifference | None:
    """Compare two mixers on the seeds both have run.

    Args:
        baseline: Name of the mixer that ``theirs`` is of.
        theirs: For each seed, which test images the baseline got right, (N,).
        ours: The same for the mixer.

    Returns:
        The difference, or None without a common seed.
    """
    seeds = tuple(sorted(set(theirs) & set(ours)))
    if not seeds:
        return None
    per_image = np.stack([100.0 * ours[s].astype(float) - 100.0 * theirs[s].astype(float) for s in seeds])
    per_seed = per_image.mean(axis=1).tolist()
    return PairedDifference(
        baseline,
        statistics.fmean(per_seed),
        seeds,
        t_interval(per_seed),
        bootstrap_interval(per_image.mean(axis=0)),
    )
