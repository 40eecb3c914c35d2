"""Parser of printed numbers: a number is read exactly, with its rounding error, or refused.

`2.5000`, `1e-05`, `nan`, and `1,010` as a step are unambiguous. `2,5000` (a comma for the point?),
`1,234` as a loss (1234 or 1.234?), `1k`, `2.5%`, `1 010` and `1'010` are not: they raise `Doubt`,
which a reader turns into an error with the line.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

PLAIN = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
GROUPED = re.compile(r"[-+]?[0-9]{1,3}(?:,[0-9]{3})+(?P<decimals>\.[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?(?:nan|inf(?:inity)?)", re.IGNORECASE)
# The end of a number; a comma ends it only if no digit follows.
END = re.compile(r"[\s|;\[\](){}\"]|,(?![0-9])")
SPACED_GROUP = re.compile(r"[ \u00a0\u2009\u202f][0-9]{3}(?![0-9.,%/])")
EXPECTED = (
    "expected digits with a decimal point, such as 2.5 or 1e-05, and commas in thousands of a step "
    "alone"
)


class Doubt(ValueError):
    """Error for a text with digits that could mean several numbers, or none."""


def printed_at(line: str, start: int, *, whole: bool = False) -> str | None:
    """Return the text of the number at a position in a line, without commas in thousands.

    Args:
        start: after the number's name and its separator.
        whole: an integer is expected, in which commas can only separate thousands.

    Returns:
        None if there is no number at this position.

    Raises:
        Doubt: the text at this position has digits and is ambiguous.
    """
    end = END.search(line, start)
    stop = len(line) if end is None else end.start()
    token = line[start:stop].rstrip(".:!") if not whole else line[start:stop].rstrip(".:!/")
    if NOT_FINITE.fullmatch(token) and not whole:
        return token
    if not any(map(str.isdigit, token)):
        if token == "tensor":
            raise Doubt(line[start : stop + 12].split()[0])
        return None
    if whole:
        token = token.partition("/")[0]
        sure = re.fullmatch(r"[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+", token) is not None
    else:
        grouped = GROUPED.fullmatch(token)
        sure = PLAIN.fullmatch(token) is not None or bool(grouped and grouped["decimals"])
    short = re.fullmatch(r"[-+]?[0-9]{1,3}", token) is not None
    if not sure or (short and SPACED_GROUP.match(line, start + len(token))):
        raise Doubt(line[start:stop] if not sure else line[start : stop + 4])
    return token.replace(",", "")


def half_digits(texts: Sequence[str | None], least_digits: int) -> list[float | None]:
    """Return the rounding error of each number in a printed column: half a unit of its last digit.

    A column is printed with a fixed number of decimals or of digits, and zeros at the end may be
    cut off. Which of the two it is need not be known: the larger of both halves is right for both,
    with the most decimals and the most digits that the column shows.
    """
    numbers = [_decimal(text) for text in texts]
    finite = [number for number in numbers if number is not None]
    most = max([least_digits, *(len(number.as_tuple().digits) for number in finite)])
    exponents = [e for n in finite if isinstance(e := n.as_tuple().exponent, int)]
    scientific = any("e" in text.lower() for text in texts if text and _decimal(text) is not None)
    fixed = 0.0 if scientific or not exponents else 0.5 * 10.0 ** min(*exponents, 0)
    halves: list[float | None] = []
    for number in numbers:
        if number is None:
            halves.append(None)
        elif number == 0:
            halves.append(fixed)
        else:
            halves.append(max(fixed, 0.5 * 10.0 ** (number.adjusted() - most + 1)))
    return halves


def is_exact(text: str) -> bool:
    """Return True for a number printed like a Python float, in full and without rounding."""
    return text == repr(float(text)) or text.isdecimal()


def _decimal(text: str | None) -> Decimal | None:
    try:
        number = Decimal(text or "nan")
    except InvalidOperation:
        return None
    return number if math.isfinite(float(number)) else None  # also of 1e400
