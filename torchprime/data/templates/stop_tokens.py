"""Special tokens in a conversation's text: those that end a turn and those that begin a message."""

from __future__ import annotations

import re
from functools import lru_cache

from torchprime.data.templates.render import (
    ChatTemplate,
    TemplateRefusal,
    generation_prompt,
    render,
)
from torchprime.data.tokenizer.load import Tokenizer

SENTINEL = "zqSentinel{}Qz"  # a word that no text has


class Stops:
    """A finder of special tokens where a turn could end."""

    def __init__(self, texts: frozenset[str]) -> None:
        self.texts = tuple(sorted(texts, key=len, reverse=True))
        self._pattern = re.compile(r"\s*(" + "|".join(map(re.escape, self.texts)) + ")")

    def after(self, text: str, position: int) -> tuple[int, int] | None:
        """Return the special token at this position; white space may precede it."""
        match = self._pattern.match(text, position) if self.texts else None
        return match.span(1) if match else None

    def at_end(self, text: str) -> tuple[int, int] | None:
        """Return the special token at the end of a text; white space may follow it."""
        body = text.rstrip()
        if not body.endswith(self.texts):
            return None
        longest = next(stop for stop in self.texts if body.endswith(stop))
        return len(body) - len(longest), len(body)


@lru_cache(maxsize=16)
def stops_of(texts: frozenset[str]) -> Stops:
    """Return the finder of these special tokens."""
    return Stops(texts)


@lru_cache(maxsize=16)
def openers(template: ChatTemplate, texts: frozenset[str]) -> frozenset[str]:
    """Return special tokens that begin a message: found after an answer, they do not end it.

    These are the tokens before a user's text or in the generation prompt, except tokens that also
    close that text and except EOS (some tokenizers use it as BOS too).
    """
    word = SENTINEL.format("")
    try:
        before, _, after = render(template, [{"role": "user", "content": word}]).partition(word)
    except TemplateRefusal:
        return frozenset()
    opening = before + generation_prompt(template)
    return frozenset(
        text for text in texts if text in opening and text not in after + template.eos_token
    )


def reserved_texts(template: ChatTemplate, tokenizer: Tokenizer) -> frozenset[str]:
    """Return texts that only the template may write: special tokens and family markers."""
    own = {template.bos_token, template.eos_token, *template.markers} - {""}
    return tokenizer.special_tokens | own
