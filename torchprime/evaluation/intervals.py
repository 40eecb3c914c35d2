"""The mean of many grades, with its count and a 95% confidence interval.

A metric without them misleads: 70% of 20 answers is anything from 48% to 85%. Passes and fails get
Wilson's score interval (1927), which keeps its coverage for small counts and near 0 and 1. Other
measures get the percentile bootstrap (Efron 1979), whose random numbers are fixed, so that the same
grades always give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 2_000
SEED = 1979
DRAWS_AT_ONCE = 1 << 22  # 32 MiB of indices


@dataclass(frozen=True)
class Score:
    """The mean of a grader over the answers it applies to, with its 95% interval."""

    value: float
    count: int  # answers that were graded
    low: float
    high: float
    interval: Literal["wilson", "bootstrap"]


def score(values: Sequence[float | None], *, measure: bool = False) -> Score | None:
    """Return the score of one grader's values over all answers, in any order.

    Args:
        values: a finite number per answer; None where the grader did not apply.
        measure: whether they measure something, and are 0 or 1 by chance only.

    Returns:
        None if the grader applied to no answer. Where all values are 0 or 1 the interval is
        Wilson's, otherwise the bootstrap's; one value alone then is its own interval.

    Raises:
        ValueError: a value is NaN or infinite.
    """
    counted = sorted(float(value) for value in values if value is not None)
    if not counted:
        return None
    if not all(map(math.isfinite, counted)):
        raise ValueError("a grade is NaN or infinite")
    mean = math.fsum(counted) / len(counted)
    if not measure and all(value in (0.0, 1.0) for value in counted):
        low, high = _wilson(counted.count(1.0), len(counted))
        return Score(mean, len(counted), low, high, "wilson")
    low, high = _bootstrap(np.asarray(counted))
    return Score(mean, len(counted), low, high, "bootstrap")


def _wilson(passed: int, count: int) -> tuple[float, float]:
    """Return the shares p for which `passed` of `count` is within z standard errors of p."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, spread = passed / count, z * z / count
    middle = share + spread / 2
    reach = z * math.sqrt((share * (1 - share) + spread / 4) / count)
    low, high = (middle - reach) / (1 + spread), (middle + reach) / (1 + spread)
    # Rounding would put 0 of n slightly above 0, outside of its own interval.
    return (0.0 if passed == 0 else low), (1.0 if passed == count else high)


def _bootstrap(values: np.ndarray) -> tuple[float, float]:
    """Return percentiles of the means of many resamples, drawn with replacement."""
    random = np.random.default_rng(SEED)
    at_once = max(1, DRAWS_AT_ONCE // len(values))
    means = [
        values[random.integers(0, len(values), (min(at_once, RESAMPLES - start), len(values)))]
        .mean(axis=1)
        for start in range(0, RESAMPLES, at_once)
    ]  # fmt: skip
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)
