"""Reasoning beside an answer: a template's handling of it, and a run's policy.

A message may carry reasoning in a separate field (`reasoning_content`, `reasoning`, `thinking`).
Some templates write it, some write it only for the last turns, some never do; then a run has to
choose between dropping it and writing it into the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from torchprime.config.sections.dataset import Reasoning
from torchprime.data.files.record import Rejection
from torchprime.data.messages.read import Message
from torchprime.data.rows.read import Row
from torchprime.data.templates.render import (
    ChatTemplate,
    TemplateRefusal,
    generation_prompt,
    render,
)

FIELDS = ("reasoning_content", "reasoning", "thinking")
ERROR, DROP, INLINE = "error", "drop", "inline"
REASON_NO_PLACE = "the chat template has no place for the reasoning"
INLINE_FORM = "<think>\n{reasoning}\n</think>\n\n{content}"


def reasoning_of(message: Mapping[str, Any]) -> str:
    """Return a message's reasoning, "" if it has none; fields are tried in transformers' order."""
    for name in ("reasoning_content", "thinking", "reasoning"):
        if message.get(name) is not None:
            return message[name]
    return ""


def place_reasoning(row: Row, template: ChatTemplate, policy: Reasoning) -> Row | Rejection:
    """Return the row with its reasoning placed as the policy requires.

    Args:
        policy: `error` rejects a row whose answers have reasoning that the template never writes;
            `inline` writes it in front of such an answer, inside <think>; `drop` takes all
            reasoning away. Turns without loss stay as they are: a server sees no reasoning there.
    """
    if not any(reasoning_of(message.template) for message in row.messages):
        return row
    if policy == DROP:
        return replace(row, messages=tuple(map(_without, row.messages)))
    if writes_reasoning(template.for_tools(row.tools)):
        return row
    if policy == INLINE:
        return replace(row, messages=tuple(map(_inline, row.messages)))
    for i, message in enumerate(row.messages):
        if message.weight > 0 and reasoning_of(message.template):
            return Rejection(row.row_id, REASON_NO_PLACE, f"message {i + 1}")
    return row


def _without(message: Message) -> Message:
    kept = {key: value for key, value in message.template.items() if key not in FIELDS}
    return replace(message, template=kept)


def _inline(message: Message) -> Message:
    reasoning = reasoning_of(message.template).strip("\n")
    if message.role != "assistant" or message.weight == 0 or not reasoning:
        return message
    content = INLINE_FORM.format(reasoning=reasoning, content=message.content)
    moved = len(content) - len(message.content)
    return replace(
        message,
        template={**_without(message).template, "content": content},
        masked=tuple((start + moved, end + moved) for start, end in message.masked),
    )


# The template's own ways --------------------------------------------------------------------------


@lru_cache(maxsize=16)
def writes_reasoning(template: ChatTemplate) -> bool:
    """Return True if the template writes the last turn's reasoning, or refuses to render it."""
    kept = _kept(template, lambda i: {"reasoning_content": f"why{i}", "content": f"say{i}"})
    return kept is None or kept[1]


def reasoning_policy(template: ChatTemplate) -> str:
    """Describe the template's handling of think blocks, tested on a conversation of two turns."""
    field = _kept(template, lambda i: {"reasoning_content": f"why{i}", "content": f"say{i}"})
    inline = _kept(template, lambda i: {"content": f"<think>\nwhy{i}\n</think>\n\nsay{i}"})
    if field is None or inline is None:
        return "The template refuses a probe of two turns: what it does with reasoning is unknown."
    if field == inline:
        first = f"Reasoning (as reasoning_content or in <think> in the content) is {FATES[field]}"
    else:
        first = (
            f"Reasoning as reasoning_content is {FATES[field]}; in <think> in the content it is "
            f"{FATES[inline]}"
        )
    return f"{first}. {_added(template)}."


FATES = {
    (True, True): "kept in every turn",
    (False, True): "kept in the last turn and dropped from earlier ones",
    (True, False): "dropped from the last turn and kept in earlier ones",
    (False, False): "dropped",
}


def _probe(answer: Callable[[int], dict[str, str]]) -> list[dict[str, str]]:
    return [
        message
        for i in (1, 2)
        for message in ({"role": "user", "content": f"ask{i}"}, {"role": "assistant", **answer(i)})
    ]


def _kept(
    template: ChatTemplate, answer: Callable[[int], dict[str, str]]
) -> tuple[bool, bool] | None:
    """Return for each of two turns True if its reasoning is kept; None if the template refuses."""
    try:
        text = render(template, _probe(answer))
    except TemplateRefusal:
        return None
    return "why1" in text, "why2" in text


def _added(template: ChatTemplate) -> str:
    """Return the think blocks that the template writes for turns without reasoning."""
    text = render(template, _probe(lambda i: {"content": f"say{i}"}))
    first, _, rest = text.partition("say1")
    added = ["earlier turns"] if "<think>" in first else []
    added += ["the last turn"] if "<think>" in rest.partition("say2")[0] else []
    where = (
        f"gets an empty think block in {' and '.join(added)}" if added else "gets no think block"
    )
    asked = generation_prompt(template)
    opened = "; the generation prompt opens one" if "<think>" in asked else ""
    return f"A conversation without reasoning {where}{opened}"
