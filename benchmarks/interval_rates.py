"""How often does an interval for a paired difference exclude zero without a difference, and how often with one?

    python benchmarks/interval_rates.py

Model: difference at seed s and image i = mean + seed effect + image effect + residual. What enters are the three
variances of the mean over seeds; with thousands of images the last two are known, and only the first is estimated.
For each way to join the intervals over seeds and over images: the highest rate of false verdicts over all variances
below, and the rate of true verdicts, on average, at a difference of 3.24 standard errors (90 % if all were known).
A second table has scores of right and wrong, 500 images a seed.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

from statickey.compare.statistics import joint_half_width

SEED_SHARES = (0, 0.1, 0.3, 1, 3, 10, 100)
"""Variance of the mean from seeds, in parts of that from images and residual."""
RESIDUAL_SHARES = (0, 0.2, 0.5, 0.8, 1)
"""The residual's part of that from images and residual."""
SIMULATIONS = 200_000
Way = Callable[..., Any]
Z = stats.norm.isf(0.025)


def both(seed: Any, image: Any, residual: Any, seeds: int) -> Any:
    """Both intervals exclude zero (what was done before)."""
    return np.maximum(stats.t.isf(0.025, seeds - 1) * seed, Z * image)


def mover(seed: Any, image: Any, residual: Any, seeds: int) -> Any:
    """MOVER of the two intervals as they are: the residual counts twice."""
    return np.sqrt((stats.t.isf(0.025, seeds - 1) * np.maximum(seed, residual)) ** 2 + (Z * image) ** 2)


def satterthwaite(seed: Any, image: Any, residual: Any, seeds: int) -> Any:
    """Crossed random effects, degrees of freedom by Satterthwaite."""
    of_seeds = np.maximum(seed, residual) ** 2
    total = of_seeds + image**2 - residual**2
    freedom = (seeds - 1) * (total / np.maximum(of_seeds, 1e-12)) ** 2
    return stats.t.isf(0.025, freedom) * np.sqrt(total)


WAYS: dict[str, Way] = {
    "both intervals (before)": both,
    "MOVER, residual twice": mover,
    "MOVER, residual once (chosen)": joint_half_width,
    "Satterthwaite": satterthwaite,
}


def rates(way: Way, seeds: int, rng: np.random.Generator) -> tuple[float, float]:
    """Highest rate of false verdicts and mean rate of true ones, in percent."""
    false, true = [], []
    for of_seeds in SEED_SHARES:
        for residual in RESIDUAL_SHARES:
            variance = 1 + of_seeds
            mean = rng.normal(size=SIMULATIONS) * np.sqrt(variance)
            spread = rng.chisquare(seeds - 1, SIMULATIONS) / (seeds - 1)
            half = way(np.sqrt((of_seeds + residual) * spread), 1.0, np.sqrt(residual), seeds)
            false.append(100 * np.mean(np.abs(mean) > half))
            true.append(100 * np.mean(mean + 3.24 * np.sqrt(variance) > half))
    return max(false), float(np.mean(true))


def bernoulli_rate(
    way: Way, seeds: int, of_seeds: float, rng: np.random.Generator, images: int = 500, simulations: int = 4000
) -> float:
    """Rate of false verdicts in percent, both mixers right at an image with a chance of the image and the seed."""
    false = 0
    for _ in range(simulations):
        skill = rng.normal(0, of_seeds, (2, seeds, 1)) + rng.normal(0, 1, (2, 1, images)) + rng.normal(0, 1.5, images)
        right = rng.random((2, seeds, images)) < 1 / (1 + np.exp(-skill))
        difference = right[0].astype(float) - right[1]
        per_seed, per_image, mean = difference.mean(axis=1), difference.mean(axis=0), difference.mean()
        left = difference - per_seed[:, None] - per_image + mean
        residual = np.sqrt((left**2).sum() / (seeds - 1) / (images - 1) / seeds / images)
        false += abs(mean) > way(stats.sem(per_seed), stats.sem(per_image), residual, seeds)
    return 100 * false / simulations


if __name__ == "__main__":
    rng = np.random.default_rng(0)
    print(
        "| false verdicts at most, % (true ones on average, %) | 3 seeds | 5 seeds | 10 seeds |\n|---|---:|---:|---:|"
    )
    for name, way in WAYS.items():
        cells = ("{:.1f} ({:.0f})".format(*rates(way, seeds, rng)) for seeds in (3, 5, 10))
        print(f"| {name} | {' | '.join(cells)} |")
    print("\n| right and wrong, chosen way | 3 seeds | 5 seeds | 10 seeds |\n|---|---:|---:|---:|")
    for of_seeds in (0, 0.05, 0.5):
        cells = (f"{bernoulli_rate(joint_half_width, seeds, of_seeds, rng):.1f}" for seeds in (3, 5, 10))
        print(f"| standard deviation of the seed effect {of_seeds} (logits) | {' | '.join(cells)} |")
