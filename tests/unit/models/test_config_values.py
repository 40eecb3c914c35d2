"""Typed access to a foreign config.json: every wrong value is refused by its key."""

from __future__ import annotations

import math
from typing import Any

import pytest

from torchprime.errors import CheckpointError
from torchprime.models.config_values import ConfigValues


def values(**content: Any) -> ConfigValues:
    return ConfigValues(content, "the config")


@pytest.mark.parametrize("given", [True, "8", 8.0, 0, -1, 2**20 + 1, [8], {}, math.nan])
def test_an_integer_is_one_in_its_range(given: Any) -> None:
    with pytest.raises(CheckpointError, match=r"the config: n is .*, expected a whole number"):
        values(n=given).integer("n")


def test_integers_have_a_default_and_inclusive_ends() -> None:
    assert [values(n=n).integer("n", least=0, most=9) for n in (0, 9)] == [0, 9]
    assert values(n=None).integer("n", 5) == values().integer("n", 5) == 5
    with pytest.raises(CheckpointError, match="n is missing, expected a whole number from 1 to"):
        values(n=None).integer("n")


@pytest.mark.parametrize("given", [True, "1", 0, -1.0, math.nan, math.inf, 10**400, [1.0]])
def test_a_number_is_finite_and_above_its_bound(given: Any) -> None:
    with pytest.raises(CheckpointError, match="x is .*, expected a number above 0"):
        values(x=given).number("x")


def test_numbers_have_a_default_and_may_equal_their_bound() -> None:
    assert values(x=1e-6).number("x") == 1e-6 and values(x=3).number("x") == 3.0
    assert isinstance(values(x=3).number("x"), float)
    assert values(x=2).number("x", above=2, equal=True) == 2.0
    assert values().number("x", 7.5) == 7.5
    with pytest.raises(CheckpointError, match="expected a number of at least 2"):
        values(x=1).number("x", above=2, equal=True)


@pytest.mark.parametrize("given", [0, 1, "true", [], {}])
def test_a_flag_is_true_or_false(given: Any) -> None:
    with pytest.raises(CheckpointError, match="b is .*, expected true or false"):
        values(b=given).flag("b")
    assert values(b=True).flag("b") and not values(b=None).flag("b")
    assert values().flag("b", default=True)


def test_an_object_inside_has_its_path_in_messages() -> None:
    inner = values(rope={"factor": "x"}).inner("rope")
    assert inner is not None and inner.get("factor") == "x"
    with pytest.raises(CheckpointError, match="the config: rope.factor is 'x'"):
        inner.number("factor")
    assert values(rope={}).inner("rope") is values(rope=None).inner("rope") is None
    with pytest.raises(CheckpointError, match="rope is .*, expected an object or null"):
        values(rope=[1]).inner("rope")


def test_null_counts_as_absent_and_long_values_are_cut() -> None:
    assert "a" not in values(a=None) and "a" in values(a=0)
    assert len(str(values(a="x" * 1000).fault("a", "less"))) < 200
