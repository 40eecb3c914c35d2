"""A tokenized text: its ids, and the characters that each token covers."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers


class Encoded:
    """Ids, and spans [start, end) of characters in ascending order.

    If a tokenizer splits a character into several tokens, the span of each is the whole character.
    """

    ids: list[int]

    def span(self, index: int) -> tuple[int, int]:
        """Return the characters that this token covers."""
        raise NotImplementedError

    def before(self, position: int) -> int:
        """Return the number of tokens that end at or before this character."""
        low, high = 0, len(self.ids)
        while low < high:
            middle = (low + high) // 2
            if self.span(middle)[1] <= position:
                low = middle + 1
            else:
                high = middle
        return low

    def cut(self, position: int) -> int | None:
        """Return the number of tokens before this character; None if a token crosses it."""
        count = self.before(position)
        clean = count == len(self.ids) or self.span(count)[0] >= position
        return count if clean else None


class LibraryEncoded(Encoded):
    """A text encoded by the tokenizers library."""

    def __init__(self, encoding: tokenizers.Encoding) -> None:
        self.ids = encoding.ids
        self._encoding = encoding

    def span(self, index: int) -> tuple[int, int]:
        # One span at a time: listing all offsets of a data set costs as much as encoding it.
        span = self._encoding.token_to_chars(index)
        assert span is not None, "special tokens are never added here"
        return span


class JoinedEncoded(Encoded):
    """Tokens concatenated from several texts."""

    def __init__(self, ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> None:
        self.ids, self._spans = list(ids), spans

    def span(self, index: int) -> tuple[int, int]:
        return self._spans[index]
