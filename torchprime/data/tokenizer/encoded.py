"""A text after tokenization: its ids, and which of its characters each token stands for."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers


class Encoded:
    """Ids, and spans [start, end) of characters that never go back.

    Where a tokenizer cuts a character into several tokens, each of them spans it whole.
    """

    ids: list[int]

    def span(self, index: int) -> tuple[int, int]:
        """The characters that this token stands for."""
        raise NotImplementedError

    def before(self, position: int) -> int:
        """How many tokens end at or before this character."""
        low, high = 0, len(self.ids)
        while low < high:
            middle = (low + high) // 2
            if self.span(middle)[1] <= position:
                low = middle + 1
            else:
                high = middle
        return low

    def cut(self, position: int) -> int | None:
        """How many tokens lie before this character; None if one stands for both its sides."""
        count = self.before(position)
        clean = count == len(self.ids) or self.span(count)[0] >= position
        return count if clean else None


class LibraryEncoded(Encoded):
    """What the tokenizers library made of a text."""

    def __init__(self, encoding: tokenizers.Encoding) -> None:
        self.ids = encoding.ids
        self._encoding = encoding

    def span(self, index: int) -> tuple[int, int]:
        # One span at a time: listing all offsets of a data set costs as much as encoding it.
        span = self._encoding.token_to_chars(index)
        assert span is not None, "special tokens are never added here"
        return span


class JoinedEncoded(Encoded):
    """Tokens put together from several texts."""

    def __init__(self, ids: Sequence[int], spans: Sequence[tuple[int, int]]) -> None:
        self.ids, self._spans = list(ids), spans

    def span(self, index: int) -> tuple[int, int]:
        return self._spans[index]
