"""Numbers of JSON, exactly: as decimals, never by way of floats.

0.07 is a multiple of 0.01, and 1e999 is a number like any other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any


def read_decimal(text: str) -> Decimal:
    """Return a number of JSON, exactly; one whose exponent no computer holds as infinity or 0."""
    try:
        return Decimal(text)
    except ArithmeticError:
        head, _, exponent = text.lower().partition("e")
        sign = -1 if head.startswith("-") else 1
        zero = exponent.startswith("-") or not head.strip("-0.")
        return Decimal(0) if zero else sign * Decimal("Infinity")


def exact_numbers(value: Any) -> Any:
    """Return the same with decimals for floats, each the number that its shortest text says.

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
    """Return True if `number` is a whole multiple of `of`, exactly, whatever their exponents
    are."""
    if not Decimal(number).is_finite() or not Decimal(of).is_finite():
        return False
    (digits, exponent, length), (unit, unit_exponent, _) = _scaled(number), _scaled(of)
    power = exponent - unit_exponent
    if digits == 0 or unit == 0:
        return digits == 0
    if power >= 0:
        return digits * pow(10, power, abs(unit)) % unit == 0
    # 10**n does not divide a number of fewer digits; so it need not be made for a huge n.
    return -power < length and digits % (unit * 10**-power) == 0


def _scaled(number: int | Decimal) -> tuple[int, int, int]:
    """Return the number as a whole number times a power of ten, and how many digits it has."""
    sign, digits, exponent = Decimal(number).as_tuple()
    assert isinstance(exponent, int)
    return int(Decimal((sign, digits, 0))), exponent, len(digits)
