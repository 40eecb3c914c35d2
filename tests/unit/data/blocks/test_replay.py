"""The order under a schedule of replay: its shares, its passes, and what it depends on."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from torchprime.config.sections.dataset import ReplayShape
from torchprime.data.blocks.replay import ReplayOrder, ReplaySchedule

OWN, REPLAY = 60, 25
IS_REPLAY = np.arange(OWN + REPLAY) % 85 >= OWN
TOKENS = np.random.default_rng(3).integers(1, 200, OWN + REPLAY)
CONSTANT = ReplaySchedule(0.15, 0.15, "constant")


def order(
    schedule: ReplaySchedule = CONSTANT, *, seed: int = 5, size: int = 4, steps: int = 80
) -> ReplayOrder:
    return ReplayOrder(
        TOKENS, IS_REPLAY, schedule, seed=seed, global_batch_size=size, total_steps=steps
    )


def flat(made: ReplayOrder) -> list[int]:
    return [block for step in range(made.total_steps) for block in made.blocks(step).tolist()]


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        (CONSTANT, [0.15] * 5),
        (ReplaySchedule(0.2, 0.04, "linear"), [0.2, 0.16, 0.12, 0.08, 0.04]),
        (
            ReplaySchedule(0.2, 0.0, "cosine"),
            [0.1 * (1 + math.cos(math.pi * part / 4)) for part in range(5)],
        ),
    ],
)
def test_the_share_goes_from_the_first_step_to_the_last(
    schedule: ReplaySchedule, shares: list[float]
) -> None:
    assert [schedule.share(step, 5) for step in range(5)] == pytest.approx(shares)
    assert schedule.share(0, 1) == schedule.start


@pytest.mark.parametrize("seed", [0, 7, 2**62])
@pytest.mark.parametrize(
    ("start", "end", "shape"),
    [
        (0.2, 0.05, "linear"),
        (0.05, 0.6, "cosine"),
        (0.1, 0.1, "constant"),
        (0.0, 0.9, "linear"),
        (0.01, 0.0, "linear"),
    ],
)
def test_every_window_has_its_share_within_one_block(
    start: float, end: float, shape: ReplayShape, seed: int
) -> None:
    """Counted in fractions over every window of blocks, of all lengths and places."""
    schedule = ReplaySchedule(start, end, shape)
    made = order(schedule, seed=seed)
    shares = [Fraction(schedule.share(step, 80)) for step in range(80) for _ in range(4)]
    error, sums = Fraction(0), [Fraction(0)]
    for block, share in zip(flat(made), shares, strict=True):
        tokens = int(TOKENS[block])
        error += share * tokens - (tokens if IS_REPLAY[block] else 0)
        sums.append(error)
    limit = int(TOKENS.max()) + Fraction(1, 1000)  # a share is rounded to 10**-9
    assert max(sums) - min(sums) < limit, "a window is the difference of two sums"
    assert max(map(abs, sums)) <= limit / 2


def test_each_kind_is_seen_once_in_each_of_its_own_passes() -> None:
    made = order(ReplaySchedule(0.5, 0.2, "linear"), steps=100)
    blocks = flat(made)
    for kind, count in ((False, OWN), (True, REPLAY)):
        mine = [block for block in blocks if IS_REPLAY[block] == kind]
        passes = [mine[first : first + count] for first in range(0, len(mine), count)]
        assert len(passes) > 2
        assert all(Counter(one) == Counter(passes[0]) for one in passes[:-1])
        assert max(Counter(passes[-1]).values()) == 1
        assert all(one != other for one, other in pairwise(passes[:-1]))
    own = sum(not IS_REPLAY[block] for block in blocks[: 30 * 4])
    assert made.own_passes(30) == own / OWN and made.own_passes(0) == 0.0


def test_the_order_depends_on_the_seed_and_neither_on_the_batch_size_nor_the_length() -> None:
    assert flat(order()) == flat(order())
    assert flat(order()) == flat(order(size=8, steps=40)) == flat(order(size=1, steps=320))
    assert flat(order(steps=50)) == flat(order())[:200]
    assert flat(order(seed=6)) != flat(order())
    shorter = flat(order(ReplaySchedule(0.3, 0.1, "linear"), steps=50))
    assert shorter != flat(order(ReplaySchedule(0.3, 0.1, "linear")))[:200]


def test_the_plan_counts_what_the_steps_hold() -> None:
    made = order(ReplaySchedule(0.3, 0.1, "linear"))
    blocks = np.array(flat(made))
    replayed = blocks[IS_REPLAY[blocks]]
    plan = made.plan()
    assert plan["share"] == TOKENS[replayed].sum() / TOKENS[blocks].sum()
    assert plan["share"] == pytest.approx(0.2, abs=0.01)
    assert (plan["blocks"], plan["passes"]) == (REPLAY, len(replayed) / REPLAY)
    assert plan["own_passes"] == (len(blocks) - len(replayed)) / OWN
    assert made.steps_per_epoch == round(80 / plan["own_passes"])


def test_a_run_too_short_for_an_own_block_has_an_epoch_all_the_same() -> None:
    made = order(ReplaySchedule(0.9, 0.9, "constant"), size=1, steps=1)
    assert IS_REPLAY[made.blocks(0)].all()
    assert (made.own_passes(1), made.steps_per_epoch) == (0.0, OWN)
    short = order(CONSTANT, steps=4)
    assert short.steps_per_epoch == round(4 / short.own_passes(4)) > short.total_steps
