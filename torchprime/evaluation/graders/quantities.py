r"""Final answers as quantities: one exact number and its unit.

    "**$1,234.50** per day."  ->  quantity  ->  Quantity(Fraction(2469, 2), "$/day")

Numbers are parsed into exact fractions by way of decimals, never into floats: 0.1 + 0.2 must equal
0.3, and 10**17 must differ from 10**17 + 1. A text is a quantity only if every part of it is
understood. A text that could mean two numbers ("1,5", "5k", "18!"), or has a letter, a power or a
scale that is not understood ("2x", "4\pi", "5i", "5²", "5 hundredths"), is no quantity and is
compared as a text. So a wrong grade is 0, which a person finds among the samples, rather than 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

import regex

LONGEST = 200  # characters; a longer text comes from a model that repeats a digit

# After a number these multiply it.
SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "lakh": 10**5, "lakhs": 10**5,
    "million": 10**6,
    "crore": 10**7, "crores": 10**7,
    "billion": 10**9,
    "trillion": 10**12,
}  # fmt: skip
# Words that change the number before them, or may: they are no units. Not among them: "second",
# "times".
NO_UNITS = {
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety",
    "half", "halves", "third", "thirds", "quarter", "quarters", "fourth", "fourths", "fifth",
    "fifths", "sixth", "sixths", "seventh", "sevenths", "eighth", "eighths", "ninth", "ninths",
    "tenth", "tenths",
    "once", "twice", "thrice", "double", "triple", "quadruple", "fold", "dozen", "dozens",
    "score", "scores", "gross", "grand", "thou", "mil", "bil", "tril", "myriad", "googol",
    "infinity", "inf", "nan", "tausend", "hundert", "mille", "mila", "cien", "ciento", "kilo",
    "mega", "giga", "tera", "peta", "milli", "micro", "nano", "pico", "centi", "deci",
    "and", "or", "to", "plus", "minus", "over", "less", "than", "negative", "below", "least",
    "most", "point", "base", "binary", "octal", "hexadecimal", "hex", "remainder", "modulo",
    "mod", "approx", "approximately", "roughly", "about", "around", "recurring", "repeating",
    "squared", "cubed", "power", "powers", "root", "sqrt", "factorial", "choose", "percentile",
    "not", "divided", "multiplied", "itself", "reciprocal", "inverse",
    # scales of other languages, and short ones
    "mio", "mln", "mld", "mrd", "tsd", "tys", "tusen", "tysk", "duizend", "tisic", "ribu", "juta",
    "milhão", "milhões", "milhao", "milhoes", "millón", "billón", "miljoen", "duzend",
    "dutzend", "docena", "docenas", "douzaine",
    "alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa",
    "lambda", "omicron", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega", "sin",
    "cos", "tan", "cot", "csc", "log", "exp", "lim", "int", "sum", "prod",
}  # fmt: skip
# As a part of any word: 5 hundredths, 5 quadrillion, 5 twentieths.
SCALED = regex.compile("hundred|thousand|illi|teenth|ieth|elfth|dozen|lakh|crore")
# Units of two letters, and all units that may follow the digits without a space.
SHORT_UNITS = {
    "km", "cm", "mm", "kg", "mg", "lb", "oz", "ft", "yd", "hr", "ml", "kph", "mph", "lbs", "hrs",
    "min", "mins", "sec", "secs",
}  # fmt: skip
# Words that may join others in a unit.
LINKS = {"a", "an", "the", "of", "in", "on", "at", "by", "for", "per", "each"}
CURRENCIES = {
    "dollar": "$", "dollars": "$", "usd": "$", "buck": "$", "bucks": "$",
    "euro": "€", "euros": "€", "eur": "€", "£": "pound", "gbp": "pound",
    "yen": "¥", "jpy": "¥", "rupee": "₹", "rupees": "₹", "inr": "₹", "¢": "cent",
    "percent": "%", "pct": "%",
}  # fmt: skip
IRREGULAR = {"feet": "foot", "ft": "foot", "hrs": "hr", "lbs": "lb", "mins": "min", "secs": "sec"}

GROUP_SPACE = "[ \u00a0\u2009\u202f]"
NUMBER = regex.compile(
    rf"""
    (?P<sign>[-+\u2212])? \s* (?P<currency>\\?\p{{Sc}})? \s* (?P<inner_sign>[-+\u2212])? \s*
    (?:
        (?: (?P<whole>[0-9]+) [ ]+ (?=[1-9]) )?  (?P<over>[0-9]+) \s? / \s? (?P<under>[0-9]+)
      |
        (?P<digits>
            (?: [0-9]{{1,3}} (?:,[0-9]{{2,3}})* ,[0-9]{{3}}  # 1,234,567, and 12,34,567 of India
              | [0-9]{{1,3}} (?:{GROUP_SPACE}[0-9]{{3}})+
              | [0-9]+
            ) (?:\.[0-9]+)?
          | \.[0-9]+
        )
    ) (?![0-9])
    """,
    regex.VERBOSE,
)
# Markdown marks, except between two letters or digits.
MARKS = regex.compile(r"(?<![\p{L}\p{N}*_`])[*_`]++|(?<![*_`])[*_`]++(?![\p{L}\p{N}])")
PART = regex.compile(
    r"""(?P<gap>\s*) (?:
        \\? (?P<sign>[\p{Sc}%])
      | (?P<degree>\u00b0[CF]?)
      | (?P<word>\p{Latin}+(?:['\u2019]\p{Latin}+)*) (?P<power>[\u00b2\u00b3])?
      | (?P<link>[/()-])
    )""",
    regex.VERBOSE,
)


@dataclass(frozen=True)
class Quantity:
    """A number and its unit; `unit` is "" if none is given."""

    number: Fraction
    unit: str = ""

    def agrees(self, other: Quantity) -> bool:
        """Return True if the numbers are equal and the units too, or one is missing: 18 is 18 eggs,
        but 5 m² is not 5 m³."""
        same_unit = self.unit == other.unit or not (self.unit and other.unit)
        return self.number == other.number and same_unit


def number(text: str) -> Fraction | None:
    """Return the number of `quantity`."""
    found = quantity(text)
    return None if found is None else found.number


def quantity(text: str) -> Quantity | None:
    """Return the one quantity that a text is; None if it is none, or is not fully understood.

    Around the number may stand: a sign, a currency sign, commas or spaces between groups of three
    digits, Markdown's marks, a full stop, and a unit after it in words without digits. "hundred"
    to "trillion", "lakh" and "crore" after it multiply; "%" is a unit. "1/2" and "2 1/2" are
    fractions.
    """
    if len(text.strip()) > LONGEST:
        return None
    text = MARKS.sub("", text).strip()
    text = text.removesuffix(".").rstrip()
    found = NUMBER.match(text)
    if found is None or (found["sign"] and found["inner_sign"]):
        return None
    size = _size(found)
    scaled = _unit(text[found.end() :], found["currency"] or "")
    if size is None or scaled is None:
        return None
    factor, unit = scaled
    negative = (found["sign"] or found["inner_sign"] or "+") != "+"
    return Quantity(-size * factor if negative else size * factor, unit)


def _size(found: regex.Match[str]) -> Fraction | None:
    if found["digits"] is not None:
        return Fraction(Decimal(regex.sub(rf",|{GROUP_SPACE}", "", found["digits"])))
    over, under = int(found["over"]), int(found["under"])
    if under == 0:
        return None
    if found["whole"] is None:
        return Fraction(over, under)
    # "2 5/3" is no mixed number, so its value is ambiguous.
    return int(found["whole"]) + Fraction(over, under) if over < under else None


# Units --------------------------------------------------------------------------------------------


def _unit(rest: str, currency: str) -> tuple[int, str] | None:
    """Parse the factor and the unit after a number; return None if a part of it is unknown."""
    parts = _parts(rest)
    if parts is None:
        return None
    factor, words = 1, [_singular(currency.removeprefix("\\"))] if currency else []
    while parts and (name := parts[0]["word"] or "").casefold() in SCALES and parts[0]["gap"]:
        factor *= SCALES[name.casefold()]
        parts.pop(0)
    if not _in_order(parts, attached=factor == 1 and not currency):
        return None
    if currency and any(part["sign"] or part["degree"] for part in parts):
        return None
    for part in parts:
        word = _understood(part)
        if word is None:
            return None
        words += [word] if word else []
    unit = " ".join(words).replace("per cent", "%")
    unit = regex.sub(r" ?([/-]) ?", r"\1", regex.sub(" per (?:an? )?", "/", unit))
    # "$18 dollars" repeats the unit; "$18 euros" contradicts it.
    money = [word for word in words if regex.fullmatch(r"\p{Sc}|pound|cent", word)]
    if currency and len(money) > 1:
        return (factor, unit.replace(f"{money[0]} ", "", 1)) if len(set(money)) == 1 else None
    return factor, unit


def _parts(rest: str) -> list[regex.Match[str]] | None:
    """Return the words and signs of a text; None if anything else is in it."""
    parts, at = [], 0
    while at < len(rest):
        part = PART.match(rest, at)
        if part is None:
            return None if rest[at:].strip() else parts
        parts.append(part)
        at = part.end()
    return parts


def _in_order(parts: list[regex.Match[str]], *, attached: bool) -> bool:
    """Return True if words, links, brackets and signs are in an order that a unit can have.

    Args:
        attached: the first word may follow the digits without a space.
    """
    kinds = ["s" if part["sign"] or part["degree"] else part["link"] or "w" for part in parts]
    words = r"w(?:[/-]?w)*"
    shape = rf"(?:s(?:/?{words})?|-?{words})?(?:\({words}\))?"
    if not regex.fullmatch(shape, "".join(kinds)):
        return False
    for part, next_part in zip(parts, [*parts[1:], None], strict=False):
        tight = part["link"] == "-" or (next_part is not None and next_part["link"] == "-")
        if tight and (next_part is None or next_part["gap"] or (part["link"] and part["gap"])):
            return False
        link = (part["word"] or "").casefold() in LINKS
        if link and (next_part is None or not next_part["word"]):
            return False
    first = parts[0] if parts else None
    if first is None or first["gap"] or not first["word"]:
        return True
    return attached and first["word"].casefold() in SHORT_UNITS  # 5kg, and not 2xy


def _understood(part: regex.Match[str]) -> str | None:
    """Return the part's text in the unit, in one spelling; None if it may be no unit."""
    if part["link"]:
        return "" if part["link"] in "()" else part["link"]
    if part["sign"] or part["degree"]:
        return _singular(part["sign"] or part["degree"])
    word = part["word"].casefold().replace("\u2019", "'")
    if word in LINKS:
        return word if not part["power"] else None
    short = len(word) < 3 and word not in SHORT_UNITS
    if short or word in NO_UNITS or SCALED.search(word):
        return None
    return _singular(word) + (part["power"] or "")


def _singular(word: str) -> str:
    """Return one spelling for a word's singular and plural."""
    if word in CURRENCIES or word in IRREGULAR:
        return CURRENCIES.get(word) or IRREGULAR[word]
    if regex.search("(?:ch|sh|x|ss|z)es$", word):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word
