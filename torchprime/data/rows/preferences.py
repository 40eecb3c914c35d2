"""Preference rows; their chosen answer is trained.

    {prompt: text, chosen: text, rejected: text}      prompt and completion
    {prompt?: turns, chosen: turns, rejected: turns}  a conversation
    {chosen: text, rejected: text}                    texts that both begin with the same dialogue,
                                                      "\\n\\nHuman: ...\\n\\nAssistant: ..."

In a conversation the turns of `prompt` and the turns that chosen and rejected share at the start
are context; the last turn never is. The rejected answer has no other use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from os.path import commonprefix
from typing import Any

from torchprime.data.messages.json_fields import turns_of_text
from torchprime.data.messages.read import Keys, Message, keys_found, read_messages
from torchprime.data.rows.exchanges import Exchange
from torchprime.data.shared.fields import (
    CHOSEN_ELSEWHERE,
    FIELD_EMPTY,
    FIELD_NOT_STRING,
    Unusable,
    field_of,
    string_of,
    type_name,
)
from torchprime.data.shared.notes import RowFindings

NOTICE = "preference rows: chosen is trained, rejected is not used"
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
SPEAKER = re.compile(r"\n\n(Human|Assistant):")
ROLES = {"Human": "user", "Assistant": "assistant"}


def read_preference(
    fields: dict[str, Any], columns: Mapping[str, str], found: RowFindings
) -> Exchange | list[Message]:
    """Return the chosen answer after its prompt: texts, or turns."""
    found.noticed.append((NOTICE, 1))
    chosen = _turns(field_of(fields, "chosen", columns))
    rejected = _turns(fields.get("rejected"))
    if chosen is not None:
        return _conversation(fields, columns, chosen, rejected or [], found)
    completion = string_of(fields, "chosen", columns)
    if fields.get("prompt") is not None:
        prompt = string_of(fields, "prompt", columns)
        return Exchange("preference", prompt, prompt, completion)
    if not completion.startswith(HUMAN) or ASSISTANT not in completion:
        string_of(fields, "prompt", columns)  # reports that it is missing
    prompt, completion = _split_dialogue(completion, fields.get("rejected"))
    return Exchange("preference", prompt, prompt, completion)


def _turns(value: Any) -> list[Any] | None:
    """Read a list of messages, one message, or the JSON text of a list; None for a plain text."""
    if isinstance(value, Mapping):
        return [value]
    if isinstance(value, str):
        return turns_of_text(value)
    return value if isinstance(value, list) else None


# Conversations -----------------------------------------------------------------------------------


def _conversation(
    fields: dict[str, Any],
    columns: Mapping[str, str],
    chosen: list[Any],
    rejected: list[Any],
    found: RowFindings,
) -> list[Message]:
    if not chosen:
        raise Unusable(FIELD_EMPTY.format("chosen"))
    keys = keys_found(columns, "chosen", chosen)
    prompt = fields.get("prompt")
    before = _turns(prompt)
    if before is None and prompt is not None:
        if not isinstance(prompt, str):
            raise Unusable(FIELD_NOT_STRING.format("prompt"), type_name(prompt))
        known = not prompt.strip() or _asks(chosen, prompt, keys)
        before = [] if known else [{"role": "user", "content": prompt}]
        if before and _role(chosen[0], keys) != "assistant":
            raise Unusable(CHOSEN_ELSEWHERE, "its first turns do not say what prompt says")
    before = before or []
    prompt_keys = keys_found(columns, "prompt", before)
    context = read_messages(before, prompt_keys, found, off=True)
    shared = 0
    if _begins_with(chosen, before, keys, prompt_keys):
        shared, before, context = len(before), [], []
    offset = len(before) if _begins_with(rejected, before, keys, prompt_keys) else 0
    while shared < min(len(chosen), len(rejected) - offset):
        if not _same(chosen[shared], rejected[offset + shared], keys, keys):
            break
        shared += 1
    shared = min(shared, len(chosen) - 1)
    first = len(before) + 1
    context += read_messages(chosen[:shared], keys, found, off=True, first=first)
    answers = read_messages(chosen[shared:], keys, found, first=first + shared)
    return [*context, *answers]


def _role(turn: Any, keys: Keys) -> Any:
    return turn.get(keys.role) if isinstance(turn, Mapping) else None


def _asks(turns: list[Any], prompt: str, keys: Keys) -> bool:
    """Return True if a turn repeats the prompt's text, which is then in the conversation."""
    said = (turn.get(keys.content) for turn in turns if isinstance(turn, Mapping))
    return any(isinstance(text, str) and text.strip() == prompt.strip() for text in said)


def _begins_with(turns: list[Any], first: list[Any], keys: Keys, first_keys: Keys) -> bool:
    return (
        bool(first)
        and len(turns) > len(first)
        and all(_same(a, b, keys, first_keys) for a, b in zip(turns, first, strict=False))
    )


def _same(one: Any, other: Any, keys: Keys, other_keys: Keys) -> bool:
    if not isinstance(one, Mapping) or not isinstance(other, Mapping):
        return False
    pairs = [(keys.role, other_keys.role), (keys.content, other_keys.content)]
    pairs += [(key, key) for key in ("tool_calls", "function_call")]
    return all(one.get(a) == other.get(b) for a, b in pairs)


# Dialogues as text -------------------------------------------------------------------------------


def _split_dialogue(chosen: str, rejected: Any) -> tuple[str, str]:
    """Return the dialogue up to the last shared "Assistant:", and the chosen answer."""
    same = commonprefix([chosen, rejected]) if isinstance(rejected, str) else chosen
    at = same.rfind(ASSISTANT)
    if at < 0:
        raise Unusable(CHOSEN_ELSEWHERE, "chosen and rejected begin with different dialogues")
    prompt, completion = chosen[: at + len(ASSISTANT)], chosen[at + len(ASSISTANT) :]
    if not completion.strip():
        raise Unusable(FIELD_EMPTY.format("chosen"))
    if HUMAN in completion:
        raise Unusable(CHOSEN_ELSEWHERE, "they differ in more than the last answer")
    return prompt, completion


def dialogue_messages(exchange: Exchange) -> list[Message]:
    """Return the turns of a dialogue that is written as text; none if the prompt is no dialogue."""
    nothing, *pieces = SPEAKER.split(exchange.prompt)
    if nothing or len(pieces) < 4 or pieces[-2:] != ["Assistant", ""]:
        return []
    said = zip(pieces[:-2:2], pieces[1:-2:2], strict=True)
    turns = [{"role": ROLES[speaker], "content": text.strip()} for speaker, text in said]
    answer = {"role": "assistant", "content": exchange.completion.strip()}
    return [*(Message(turn, 0.0) for turn in turns), Message(answer)]
