"""Fonts for the names of runs, which may be in any script, so that no glyph is missing in a figure.

matplotlib takes each character from the first font of a list that has it. It warns and draws a box
if none does. So the list is made for the text: DejaVu Sans, which comes with matplotlib, then
installed fonts that have the rest. A character that no font has is written as its escape.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font

FIRST = "DejaVu Sans"
WEIGHTS = ("normal", "bold")
# Fonts with boxes for every character, and mathematical fonts with symbols at the places of others.
UNFIT = ("Last Resort", "STIX", "cm", "DejaVu Math")


def families_for(texts: Iterable[str]) -> tuple[list[str], set[str]]:
    """Return the font families to set the texts in, and the characters that none of them has."""
    wanted = {char for text in texts for char in text}
    missing = {char for char in wanted if not char.isprintable()}
    wanted -= missing | _has(FIRST, wanted)
    families = [FIRST]
    for family in sorted({entry.name for entry in fontManager.ttflist} - {FIRST}):
        if not wanted:
            break
        if not family.startswith(UNFIT) and (found := _has(family, wanted)):
            families.append(family)
            wanted -= found
    return families, missing | wanted


@contextmanager
def quiet_fonts() -> Iterator[None]:
    """Suppress matplotlib's warning that a family has no bold face: it uses another face."""
    logger = logging.getLogger("matplotlib.font_manager")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def legible(text: str, missing: set[str]) -> str:
    """Replace the characters that no font has by their escapes."""
    return "".join(_escape(char) if char in missing else char for char in text)


def _has(family: str, chars: set[str]) -> set[str]:
    """Return the characters that the family has in every weight that is used."""
    found = set(chars)
    for weight in WEIGHTS:
        path = findfont(FontProperties(family=family, weight=weight), fallback_to_default=False)
        charmap = get_font(path).get_charmap()
        found = {char for char in found if ord(char) in charmap}
    return found


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
