"""Positions of characters among tokens, against a scan of all spans."""

from __future__ import annotations

import pytest

from torchprime.data.tokenizer.encoded import JoinedEncoded

# Two tokens of one character (3, 4), and a gap between tokens, as where blanks are dropped.
SPANS = [(0, 1), (1, 3), (3, 4), (3, 4), (6, 9)]
ENCODED = JoinedEncoded([5, 6, 7, 8, 9], SPANS)


@pytest.mark.parametrize("position", range(11))
def test_tokens_before_a_character_are_those_that_end_by_it(position: int) -> None:
    before = sum(end <= position for _, end in SPANS)
    assert ENCODED.before(position) == before
    crossed = any(start < position < end for start, end in SPANS)
    assert ENCODED.cut(position) == (None if crossed else before)


def test_a_text_without_tokens_has_none_before_anything() -> None:
    empty = JoinedEncoded([], [])
    assert empty.before(3) == 0 == empty.cut(3)
