"""Counts and intervals: against Wilson's equation, an exact coverage and simulations."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from torchprime.evaluation import intervals
from torchprime.evaluation.intervals import Score, score


def graded(passed: int, count: int) -> Score:
    found = score([1.0] * passed + [0.0] * (count - passed))
    assert found is not None
    return found


# Published in a table of 95% Wilson intervals by Newcombe (1998), table I.
@pytest.mark.parametrize(
    ("passed", "count", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_is_the_tables(passed: int, count: int, low: float, high: float) -> None:
    found = graded(passed, count)
    assert found.interval == "wilson"
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_s_ends_solve_his_equation(case: tuple[int, int]) -> None:
    """(value - p)^2 = z^2 p (1 - p) / n, which no closed formula takes part in."""
    passed, count = case
    found = graded(passed, count)
    z = float(stats.norm.ppf(0.975))
    assert (found.value, found.count) == (passed / count, count)
    assert 0 <= found.low <= found.value <= found.high <= 1
    for end in (found.low, found.high):
        left, right = (found.value - end) ** 2, z * z * end * (1 - end) / count
        assert math.isclose(left, right, rel_tol=1e-9, abs_tol=1e-14)
    # Two different solutions, so one is each end.
    assert found.low < found.high


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipy_s(case: tuple[int, int]) -> None:
    found = graded(*case)
    wanted = stats.binomtest(*case).proportion_ci(0.95, method="wilson")
    assert np.allclose((found.low, found.high), wanted, rtol=1e-9, atol=1e-12)


def test_all_passed_and_none_passed_reach_the_ends_exactly() -> None:
    assert graded(0, 7).low == 0.0
    assert graded(7, 7).high == 1.0
    assert graded(7, 7).low == pytest.approx(1 - graded(0, 7).high, abs=1e-15)


def test_nothing_that_counts_is_no_score() -> None:
    assert score([]) is None
    assert score([None, None]) is None


def test_what_does_not_apply_is_not_counted() -> None:
    assert score([1.0, None, 0.0, None, None]) == score([1.0, 0.0])


def test_true_and_false_are_passes_and_fails() -> None:
    assert score([True, False, True]) == score([1.0, 0.0, 1.0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_grade_that_is_no_number_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        score([1.0, bad])


# Bootstrap ----------------------------------------------------------------------------------------


def test_a_measure_gets_its_mean_and_the_bootstrap() -> None:
    found = score([3.0, 4.0, None, 8.0])
    assert found is not None
    assert (found.value, found.count, found.interval) == (5.0, 3, "bootstrap")
    assert 3.0 <= found.low < 5.0 < found.high <= 8.0


def test_one_value_beside_0_and_1_makes_it_a_measure() -> None:
    found = score([0.0, 1.0, 0.5])
    assert found is not None and found.interval == "bootstrap"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_the_same_grades_in_any_order_give_the_same_score(
    values: list[float], shuffle: random.Random
) -> None:
    mixed: list[float | None] = [*values, None]
    shuffle.shuffle(mixed)
    assert score(mixed) == score(values)


def test_drawing_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [float(i % 13) for i in range(100)]
    whole = score(values)
    monkeypatch.setattr(intervals, "DRAWS_AT_ONCE", 100 * 300 + 7)  # 300 resamples at once
    assert score(values) == whole


def test_equal_values_have_no_width() -> None:
    found = score([2.5] * 9)
    assert found is not None
    assert (found.low, found.value, found.high) == (2.5, 2.5, 2.5)


def test_the_bootstrap_is_scipy_s_up_to_its_random_numbers() -> None:
    values = stats.expon(scale=40).rvs(200, random_state=1)
    found = score(values.tolist())
    wanted = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert found is not None
    # The error of a 2.5% quantile of 2,000 draws is about a sixth of a standard error of the mean.
    tolerance = 0.25 * float(stats.sem(values))
    assert abs(found.low - wanted.low) < tolerance
    assert abs(found.high - wanted.high) < tolerance


# Coverage: how often the interval holds the true value --------------------------------------------


@pytest.mark.parametrize(("share", "count"), [(0.02, 200), (0.3, 50), (0.7, 200), (0.95, 100)])
def test_wilson_holds_the_true_share_about_95_times_in_100(share: float, count: int) -> None:
    draws = np.random.default_rng(3).binomial(count, share, 4000)
    spans = [graded(int(passed), count) for passed in draws]
    held = np.mean([span.low <= share <= span.high for span in spans])
    assert 0.93 <= held <= 0.975


def test_the_bootstrap_holds_the_true_mean_about_95_times_in_100() -> None:
    """Lengths of answers are skewed; 100 of them are enough for the interval to be fair."""
    draws = np.random.default_rng(4).gamma(2.0, 30.0, (600, 100))
    spans = [score(row.tolist()) for row in draws]
    held = np.mean([span is not None and span.low <= 60.0 <= span.high for span in spans])
    assert 0.92 <= held <= 0.97


def test_a_measure_is_no_share_even_where_it_is_0_or_1() -> None:
    found = score([0.0, 1.0, 1.0, 1.0], measure=True)
    assert found is not None and found.interval == "bootstrap" and found.value == 0.75
