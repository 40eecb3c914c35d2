"""Exact JSON numbers: parsed as decimals, never as floats.

0.07 is a multiple of 0.01, and 1e999 is an ordinary number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any


def read_decimal(text: str) -> Decimal:
    """Return a JSON number exactly; an exponent that is too large for a decimal gives infinity or
    0."""
    try:
        return Decimal(text)
    except ArithmeticError:
        head, _, exponent = text.lower().partition("e")
        sign = -1 if head.startswith("-") else 1
        zero = exponent.startswith("-") or not head.strip("-0.")
        return Decimal(0) if zero else sign * Decimal("Infinity")


def exact_numbers(value: Any) -> Any:
    """Return the value with decimals for floats, each the number of the float's shortest text.

    Raises:
        ValueError: NaN or an infinity.
    """
    if isinstance(value, Mapping):
        return {name: exact_numbers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [exact_numbers(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no number of JSON")
    return Decimal(repr(value)) if isinstance(value, float) else value


def is_multiple(number: int | Decimal, of: int | Decimal) -> bool:
    """Return True if `number` is an integer multiple of `of`, exactly, for any exponents."""
    if not Decimal(number).is_finite() or not Decimal(of).is_finite():
        return False
    (digits, exponent, length), (unit, unit_exponent, _) = _scaled(number), _scaled(of)
    power = exponent - unit_exponent
    if digits == 0 or unit == 0:
        return digits == 0
    if power >= 0:
        return digits * pow(10, power, abs(unit)) % unit == 0
    # 10**n does not divide a number of fewer digits, so a huge power is never computed.
    return -power < length and digits % (unit * 10**-power) == 0


def _scaled(number: int | Decimal) -> tuple[int, int, int]:
    """Return the number as an integer times a power of ten, and the count of its digits."""
    sign, digits, exponent = Decimal(number).as_tuple()
    assert isinstance(exponent, int)
    return int(Decimal((sign, digits, 0))), exponent, len(digits)
