"""Special tokens in the text of a message or a tool, which would look like a turn's border.

A tokenizer turns such a text into one control token wherever it occurs. `answers` allows a run's
own special tokens in the assistant's text, but never those that begin or end a message.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torchprime.data.rows.read import Row
from torchprime.data.templates.render import (
    ChatTemplate,
    TemplateRefusal,
    as_served,
    generation_prompt,
    render,
)
from torchprime.data.tokenizer.load import Tokenizer

ANSWERS = "answers"
THINK = ("<think>", "</think>")


class Spelled:
    """A finder of reserved texts in rows.

    Args:
        reserved: texts that only the template may write.
        in_answers: allow those that are no border of a message in the assistant's text.
    """

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer: Tokenizer,
        reserved: frozenset[str],
        in_answers: bool,
    ) -> None:
        self._pattern = _any_of(reserved)
        borders = reserved & _borders(template, tokenizer) if in_answers else reserved
        self._in_answer = _any_of(borders)
        # By identity, for rows that outlive this object: conversations share their tools.
        self._in_tools: dict[int, str] = {}

    def in_row(self, row: Row) -> str:
        """Return a description of the first one's place, "" if there is none."""
        if id(row.tools) not in self._in_tools:
            self._in_tools[id(row.tools)] = self._in_values("tool", row.tools)
        messages = as_served([message.template for message in row.messages])
        return self._in_values("message", messages) or self._in_tools[id(row.tools)]

    def _in_values(self, place: str, values: Sequence[Mapping[str, Any]]) -> str:
        for number, value in enumerate(values, start=1):
            pattern = self._in_answer if value.get("role") == "assistant" else self._pattern
            if pattern is None:
                continue
            for text in _texts(value):
                match = pattern.search(text)
                if match:
                    return f"{place} {number}: {match.group()}"
        return ""


def _borders(template: ChatTemplate, tokenizer: Tokenizer) -> frozenset[str]:
    """Return texts that begin or end messages, found around the words of a short conversation."""
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
    frames = [generation_prompt(template)]
    for messages in (said, [{"role": "system", "content": "s"}, *said]):
        try:
            frames.append(render(template, messages))
        except TemplateRefusal:
            continue
    ends = [
        tokenizer.token_text(i) or "" for i in (*tokenizer.generation_eos_ids, tokenizer.pad_id)
    ]
    own = {template.bos_token, template.eos_token, *template.markers, *ends}
    frame = "".join(frames)
    found = {text for text in tokenizer.special_tokens if text in frame and text not in THINK}
    return frozenset((found | own) - {""})


@lru_cache(maxsize=16)
def _any_of(texts: frozenset[str]) -> re.Pattern[str] | None:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if texts else None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
