"""Shingles for the comparison of texts: runs of words or characters, as 64-bit hashes.

    text -> normalized -> units (words, or characters) -> runs of SHINGLE units -> hashes

Frequent shingles, which more than 2% of the rows contain (a system prompt, the frame of a
template), can be found first and left out.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import NamedTuple

import numpy as np

TextRow = tuple[str, str, "str | None"]  # row id, text, group

SHINGLE = 5  # words, or characters for a script without spaces
CHUNK_ROWS = 2000
# A shingle is frequent when more than this share of the rows, and this many rows, contain it.
FREQUENT_SHARE, FREQUENT_ROWS = 0.02, 100
SAMPLE_SHINGLES = 1_000_000
_CACHED_WORDS = 500_000

# Scripts written without spaces between words: Thai, Lao, Burmese, Khmer, kana and Han.
_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]"
)
# Between digits these are arithmetic; without them 7-2 and 7/2 would be one problem. As
# mathematical symbols they survive the removal of punctuation.
_OPERATORS = {"-": "\u2212", "*": "\u00d7", "/": "\u00f7", ".": "\u22c5"}
_BETWEEN_DIGITS = re.compile(r"(?<=\d)(?:\s*([-*/])\s*|(\.))(?=\d)")
_SIGN = re.compile(r"(?<![\w)])-(?=\d)")
_PERCENT = re.compile(r"(?<=\d)\s?%")


class _Plain(dict[int, "str | None"]):
    """A translation table: each character becomes itself, a space, nothing, or a separate word."""

    def __missing__(self, code: int) -> str | None:
        category = unicodedata.category(chr(code))
        if category == "Cf":  # invisible: soft hyphens, joiners, marks of direction
            plain = None
        elif category[0] in "PZ" or category in ("Cc", "Sk"):
            plain = " "
        else:
            plain = f" {chr(code)} " if category[0] == "S" else chr(code)
        self[code] = plain
        return plain


_PLAIN = _Plain()


def normalize(text: str) -> str:
    """Normalize a text so that case, spacing and punctuation make no difference.

    Apply NFKC and case folding; punctuation and controls become spaces. Symbols (+, =, $, emoji)
    become separate words, and so do -, *, / and the point between digits, a sign and a percentage.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    if not text.isascii():
        # case folding can produce sequences that NFKC composes
        text = unicodedata.normalize("NFKC", text)
    text = _BETWEEN_DIGITS.sub(lambda found: _OPERATORS[found[1] or found[2]], text)
    text = _PERCENT.sub(" percent ", _SIGN.sub(_OPERATORS["-"], text))
    return " ".join(text.translate(_PLAIN).split())


def shingle_units(normalized: str) -> list[str]:
    """Split a text into units: words, or characters if spaces do not separate its words.

    Characters are used if 3 in 10 are of a script written without spaces, or if there are more than
    20 to a word.
    """
    words = normalized.split()
    joined = normalized.replace(" ", "")
    if len(joined) > 20 * len(words):
        return list(joined)
    if not joined.isascii() and len(_SPACELESS.findall(joined)) >= 0.3 * len(joined):
        return list(joined)
    return words


def _hash(text: str) -> int:
    """Return a 64-bit hash that is the same in every process."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class _UnitHashes(dict[str, int]):
    """A cache of word hashes, emptied when it has too many."""

    def __missing__(self, unit: str) -> int:
        value = self[unit] = _hash(unit)
        return value


_UNIT_HASHES = _UnitHashes()


class Shingles(NamedTuple):
    """The shingles of some rows, one after the other; those of row i begin at starts[i]."""

    keys: np.ndarray  # uint64 [rows]: equal for rows with equal normalized texts
    values: np.ndarray  # uint64 [shingles]
    starts: np.ndarray  # int64 [rows + 1]

    def sets(self) -> list[np.ndarray]:
        """Return each row's set of shingles, sorted."""
        return [np.unique(part) for part in np.split(self.values, self.starts[1:-1])]


def shingle(texts: list[str], frequent: np.ndarray) -> Shingles:
    """Hash every run of SHINGLE units of each text, or the whole text where it is shorter.

    Args:
        frequent: sorted uint64, shingles to leave out, except in rows that have no others.
    """
    plain = [normalize(text) for text in texts]
    units = [shingle_units(text) for text in plain]
    if len(_UNIT_HASHES) > _CACHED_WORDS:
        _UNIT_HASHES.clear()
    hashes = np.fromiter(map(_UNIT_HASHES.__getitem__, chain.from_iterable(units)), np.uint64)
    # A text that normalizes to nothing is compared unchanged; two such texts may differ.
    keys = [_hash(p or "\0" + t) for p, t in zip(plain, texts, strict=True)]
    lengths = np.fromiter(map(len, units), np.int64, len(units))
    values, starts = _runs(hashes, lengths)
    if len(frequent):
        values, starts = _without(values, starts, frequent)
    return Shingles(np.array(keys, np.uint64), values, starts)


def _runs(hashes: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Hash every SHINGLE consecutive unit hashes of a row; a shorter row is padded with 0."""
    padded = np.where(lengths > 0, np.maximum(lengths, SHINGLE), 0)
    begins = np.cumsum(padded) - padded  # index of the rows in the padded array
    line = np.zeros(padded.sum() + SHINGLE, np.uint64)
    shifts = begins - (np.cumsum(lengths) - lengths)
    line[np.arange(len(hashes)) + np.repeat(shifts, lengths)] = hashes
    mixed = np.zeros(padded.sum(), np.uint64)
    for i in range(SHINGLE):  # order matters: every position has another factor
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + line[i : i + len(mixed)]
    counts = np.where(padded > 0, padded - SHINGLE + 1, 0)
    starts = np.concatenate([[0], np.cumsum(counts)])
    places = np.arange(starts[-1]) + np.repeat(begins - starts[:-1], counts)
    return mix(mixed[places]), starts


def _without(
    values: np.ndarray, starts: np.ndarray, frequent: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Leave out frequent shingles, except in rows that have no others."""
    counts = np.diff(starts)
    rows = np.repeat(np.arange(len(counts)), counts)
    kept = frequent[np.searchsorted(frequent, values).clip(max=len(frequent) - 1)] != values
    bare = np.bincount(rows[kept], minlength=len(counts)) == 0
    kept |= bare[rows]
    left = np.bincount(rows[kept], minlength=len(counts))
    return values[kept], np.concatenate([[0], np.cumsum(left)])


def mix(values: np.ndarray) -> np.ndarray:
    """Spread every bit of a uint64 over all of them, reversibly (MurmurHash3's last step)."""
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        values = (values ^ (values >> np.uint64(33))) * np.uint64(factor)
    return values ^ (values >> np.uint64(33))


def frequent_shingles(rows: Iterable[TextRow]) -> np.ndarray:
    """Return shingles that more than FREQUENT_SHARE of the different texts contain, sorted uint64.

    Few rows are all counted. Of many rows a half, a quarter, ... is drawn by a hash of the index:
    every 4th row of interleaved sources could be of one source.
    """
    share, sample = 1, dict[int, tuple[int, np.ndarray]]()  # by key: a repeated row counts once
    nothing = np.empty(0, np.uint64)
    for first, chunk in in_chunks(rows):
        draws = mix(np.arange(first + 1, first + 1 + len(chunk), dtype=np.uint64)).tolist()
        drawn = [(d, row[1]) for d, row in zip(draws, chunk, strict=True) if d % share == 0]
        found = shingle([text for _, text in drawn], nothing)
        for key, values, (draw, _) in zip(found.keys.tolist(), found.sets(), drawn, strict=True):
            sample.setdefault(key, (draw, values))
        while len(sample) > FREQUENT_ROWS and _num_shingles(sample) > SAMPLE_SHINGLES:
            share *= 2
            sample = {key: item for key, item in sample.items() if item[0] % share == 0}
    if len(sample) <= FREQUENT_ROWS:
        return nothing
    every = np.concatenate([values for _, values in sample.values()])
    values, counts = np.unique(every, return_counts=True)
    return values[counts > max(FREQUENT_ROWS, FREQUENT_SHARE * len(sample))]


def _num_shingles(sample: dict[int, tuple[int, np.ndarray]]) -> int:
    return sum(len(values) for _, values in sample.values())


def in_chunks(rows: Iterable[TextRow]) -> Iterator[tuple[int, list[TextRow]]]:
    """Yield the rows in lists of CHUNK_ROWS, with the index of each list's first row."""
    iterator, first = iter(rows), 0
    while chunk := list(islice(iterator, CHUNK_ROWS)):
        yield first, chunk
        first += len(chunk)


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Return the Jaccard similarity of two sorted arrays without repetitions."""
    both = np.sort(np.concatenate([one, other]))
    common = int((both[1:] == both[:-1]).sum())
    return common / (len(both) - common) if len(both) else 0.0
