"""Exact numbers of JSON, against fractions."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchprime.evaluation.graders.schemas.decimals import (
    exact_numbers,
    is_multiple,
    read_decimal,
)

DECIMALS = st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**9), max_value=10**9)


@given(DECIMALS, DECIMALS)
def test_multiples_are_those_of_fractions(number: Decimal, of: Decimal) -> None:
    expected = number == 0 if of == 0 else (Fraction(number) / Fraction(of)).denominator == 1
    assert is_multiple(number, of) == expected


@pytest.mark.parametrize(
    ("number", "of", "expected"),
    [
        ("0.07", "0.01", True),
        ("1e400", "7e-3", False),
        ("7e400", "7e-3", True),
        ("1e-400", "1", False),
        ("3e99999999", "2", True),
        ("3e-99999999", "2", False),
        ("0", "5", True),
        ("5", "0", False),
        ("Infinity", "1", False),
    ],
)
def test_huge_exponents_are_never_written_out(number: str, of: str, expected: bool) -> None:
    assert is_multiple(Decimal(number), Decimal(of)) == expected


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.1", Decimal("0.1")),
        ("1e999", Decimal("1e999")),
        ("1e99999999999999999999999", Decimal("Infinity")),
        ("-1e99999999999999999999999", Decimal("-Infinity")),
        ("0e99999999999999999999999", Decimal(0)),
        ("1e-99999999999999999999999", Decimal(0)),
    ],
)
def test_a_number_is_read_exactly(text: str, value: Decimal) -> None:
    assert read_decimal(text) == value


def test_floats_become_the_decimals_that_they_show() -> None:
    found = exact_numbers({"a": [0.1, 1, True, None], "b": {"c": 2.5e-7}})
    assert found == {"a": [Decimal("0.1"), 1, True, None], "b": {"c": Decimal("2.5e-7")}}
    assert found["a"][2] is True
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="no number of JSON"):
            exact_numbers([value])
