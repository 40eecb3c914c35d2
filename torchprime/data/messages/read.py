"""Messages of all sources in one form: OpenAI's, ShareGPT's and mixed ones.

Roles become system, developer, user, assistant and tool, and content becomes a string. Tool calls
get the form that servers give to chat templates (tool_calls.py), and the keys that switch a
message's loss become a weight (turn_loss.py). Unused keys are reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from torchprime.data.messages.tool_calls import Call, calls_of, read_calls
from torchprime.data.messages.turn_loss import (
    NO_SWITCH,
    SWITCHES,
    TurnLoss,
    read_turn_loss,
    spans_without_loss,
)
from torchprime.data.shared.fields import (
    ANSWER_WEIGHTS_DIFFER,
    BAD_FUNCTION_CALL,
    BAD_TRAIN_DETAIL,
    CONTENT_EMPTY,
    CONTENT_NOT_TEXT,
    CONTENT_NULL,
    MESSAGE_NO_ROLE,
    MESSAGE_NOT_OBJECT,
    MESSAGE_NOT_STRING,
    MESSAGE_NOT_UNICODE,
    TWO_REASONINGS,
    UNKNOWN_ROLE,
    Unusable,
    check_nested,
    is_unicode,
    printable,
    show,
    type_name,
)
from torchprime.data.shared.notes import RowFindings

# Turns whose content is JSON of tool calls: Swift, LLaMA-Factory.
CALL_ROLES = frozenset(("tool_call", "function_call"))
ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "model", "chatgpt", "bot", *CALL_ROLES), "assistant"),
    **dict.fromkeys(("function", "ipython", "observation"), "tool"),
    **dict.fromkeys(("function_response", "tool_response"), "tool"),
}
# Other fields of a message that a chat template receives; all strings.
MESSAGE_STRINGS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "function_call")
MOST_PLANS = 1000
# Types of content parts, and the keys that hold their text.
TEXT_PARTS = ("text", "input_text", "output_text", "refusal")
TEXT_KEYS = ("text", "value", "refusal")
CALL_PARTS, REASONING, TOOLS = ("tool_call", "tool_calls"), "reasoning", "tools"


@dataclass(frozen=True)
class Message:
    """One turn. `template` holds the fields for the chat template: role, content, tool_calls etc.

    `content` is a string, or None for an assistant that only calls tools. `weight` scales the loss
    of an assistant turn, 0 for a turn that is not trained on. `masked` are character ranges
    [start, end) of the content that carry no loss.
    """

    template: Mapping[str, Any]
    weight: float = 1.0
    masked: tuple[tuple[int, int], ...] = ()

    @property
    def role(self) -> str:
        return self.template["role"]

    @property
    def content(self) -> str:
        return self.template.get("content") or ""


# Keys --------------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """The keys to read of messages that have the same keys."""

    read: tuple[str, ...]  # besides role and content
    switches: tuple[str, ...]
    strings: tuple[str, ...]
    unused: tuple[str, ...]


@dataclass(frozen=True)
class Keys:
    """The keys of a message's role and content, and the field's name in reports."""

    role: str
    content: str
    path: str
    place: str = "message"
    plans: dict[tuple[str, ...], _Plan] = field(default_factory=dict, compare=False, repr=False)

    def plan(self, names: tuple[str, ...]) -> _Plan:
        """Return the plan for messages with these keys, made once for all that have them."""
        if len(self.plans) >= MOST_PLANS:
            self.plans.clear()
        others = [name for name in names if name not in (self.role, self.content)]
        switches = tuple(name for name in others if name in SWITCHES)
        strings = tuple(name for name in MESSAGE_STRINGS if name in others)
        read = tuple(name for name in others if name in (*switches, *strings, *CALLS))
        plan = _Plan(read, switches, strings, tuple(n for n in others if n not in read))
        return self.plans.setdefault(names, plan)

    def where(self, number: int) -> str:
        """Return the beginning of a rejection's detail."""
        return f"{self.place} {number}: "


def message_keys(
    columns: Mapping[str, str], path: str, role: str = "role", content: str = "content"
) -> Keys:
    """Return the source's own names for the keys, or else the kind's: `role` and `content`."""
    given = columns.get(path, path)
    return _keys(columns.get("message.role", role), columns.get("message.content", content), given)


def keys_found(columns: Mapping[str, str], path: str, turns: Iterable[Any]) -> Keys:
    """Return `from` and `value` for a list that has them, else OpenAI's keys."""
    first = next(iter(turns), None)
    sharegpt = isinstance(first, Mapping) and "from" in first and "role" not in first
    return message_keys(columns, path, *(("from", "value") if sharegpt else ()))


@lru_cache(maxsize=256)
def _keys(role: str, content: str, path: str) -> Keys:
    return Keys(role, content, path, "history message" if path == "history" else "message")


# Messages ----------------------------------------------------------------------------------------


def read_messages(
    turns: Iterable[Any], keys: Keys, found: RowFindings, off: bool = False, first: int = 1
) -> list[Message]:
    """Read all turns; a turn of calls is joined to the assistant's turn before it.

    Args:
        off: all turns are context, whatever their loss switches say.
        first: the number of the first turn in messages to a person.
    """
    messages: list[Message] = []
    for number, turn in enumerate(turns, first):
        message = read_message(turn, number, keys, found, off)
        joins = "tool_calls" in message.template and turn[keys.role] in CALL_ROLES
        if joins and messages and messages[-1].role == "assistant":
            message = _joined(messages.pop(), message, keys.where(number))
        messages.append(message)
    return messages


def read_message(
    turn: Any, number: int, keys: Keys, found: RowFindings, off: bool = False
) -> Message:
    """Read one turn; with `off` it is context, whatever its loss switches say."""
    if type(turn) is not dict and not isinstance(turn, Mapping):
        raise Unusable(MESSAGE_NOT_OBJECT, keys.where(number) + type_name(turn))
    names = tuple(turn)
    plan = keys.plans.get(names) or keys.plan(names)
    given = turn.get(keys.role)
    role = ROLES.get(given) if type(given) is str else None
    if role is None:
        raise _no_role(turn, given, keys, number)
    for name in plan.unused:
        if turn[name] is not None:
            found.unused.append((f"{keys.path}.{name}", turn[name]))
    content = turn.get(keys.content)
    if type(content) is not str or given in CALL_ROLES:
        return _read_more(turn, role, plan, keys, keys.where(number), found, off)
    for name in plan.read:
        if turn[name] is not None:  # Arrow gives every message the keys that any message has
            return _read_more(turn, role, plan, keys, keys.where(number), found, off)
    weight = 0.0 if off else 1.0
    if role == "assistant" and weight and (not content or content.isspace()):
        raise Unusable(CONTENT_EMPTY, keys.where(number) + role)
    if not is_unicode(content):
        raise Unusable(MESSAGE_NOT_UNICODE, keys.where(number) + "a lone surrogate")
    return Message({"role": role, "content": content}, weight)


def _no_role(turn: Mapping[str, Any], given: Any, keys: Keys, number: int) -> Unusable:
    if given is not None:
        return Unusable(UNKNOWN_ROLE, keys.where(number) + show(given))
    found = ", ".join(sorted(map(str, turn))) or "nothing"
    where = keys.where(number)
    return Unusable(MESSAGE_NO_ROLE, printable(f"{where}key {keys.role}; found {found}"))


def _read_more(
    turn: Mapping[str, Any],
    role: str,
    plan: _Plan,
    keys: Keys,
    where: str,
    found: RowFindings,
    off: bool,
) -> Message:
    """Read a message that has more than a role and a text."""
    loss = read_turn_loss(turn, plan.switches, where) if plan.switches else NO_SWITCH
    trained = role == "assistant" and not off
    if loss.asking and not trained:
        of = "a context turn" if role == "assistant" else f"a turn of role {role}"
        found.unused += [(f"{keys.path}.{key} on {of}", turn[key]) for key in loss.asking]
    weight = 0.0 if off else loss.weight
    said = _what_is_said(turn, role, keys, where, found)
    if role == "assistant" and weight > 0 and not said.calls and not (said.content or "").strip():
        raise Unusable(CONTENT_EMPTY, where + role)

    template: dict[str, Any] = {"role": role, "content": said.content}
    if said.calls:
        template["tool_calls"] = said.calls
    for name in plan.strings:
        value = turn[name]
        if value is not None:  # Arrow gives every message the keys that any message has
            if not isinstance(value, str):
                raise Unusable(MESSAGE_NOT_STRING.format(name), where + type_name(value))
            template[name] = value
    if said.reasoning and template.setdefault("reasoning_content", said.reasoning) != (
        said.reasoning
    ):
        raise Unusable(TWO_REASONINGS, where.rstrip(": "))
    check_nested(template, MESSAGE_NOT_UNICODE, where.rstrip(": "))
    return Message(template, weight, _masked(turn, loss, trained, keys, where))


def _masked(
    turn: Mapping[str, Any], loss: TurnLoss, trained: bool, keys: Keys, where: str
) -> tuple[tuple[int, int], ...]:
    if not trained or not loss.parts:
        return ()
    content = turn.get(keys.content)
    if not isinstance(content, str) or turn.get(keys.role) in CALL_ROLES:
        raise Unusable(
            BAD_TRAIN_DETAIL.format("train_detail"), f"{where}the content is not a string"
        )
    return spans_without_loss(loss.parts, content, where)


class _Said(NamedTuple):
    """A message's content, its calls, and its reasoning if the content has a reasoning part."""

    content: str | None
    calls: list[Call]
    reasoning: str = ""


def _what_is_said(
    turn: Mapping[str, Any], role: str, keys: Keys, where: str, found: RowFindings
) -> _Said:
    content = turn.get(keys.content)
    if turn.get(keys.role) in CALL_ROLES:
        calls = read_calls(content, BAD_FUNCTION_CALL, where, single=True)
        if not calls:
            raise Unusable(BAD_FUNCTION_CALL, f"{where}no call")
        content = None
        found.unused += [(f"{keys.path}.{key}", turn[key]) for key in CALLS if turn.get(key)]
        return _Said(None, calls)
    calls = []
    if role == "assistant":
        calls = calls_of(turn, where)
    else:
        of = f"on a turn of role {role}"
        found.unused += [(f"{keys.path}.{k} {of}", turn[k]) for k in CALLS if turn.get(k)]
    if isinstance(content, list):
        return _read_parts(content, calls, role, keys, where, found)
    if content is None and calls:
        return _Said(None, calls)
    if content is None:
        raise Unusable(CONTENT_NULL, where.rstrip(": "))
    if not isinstance(content, str):
        raise Unusable(CONTENT_NOT_TEXT, where + type_name(content))
    return _Said(content, calls)


def _joined(text: Message, call: Message, where: str) -> Message:
    """Join an assistant's turn and the turn of calls after it: a server produces both as one."""
    if text.weight != call.weight:
        raise Unusable(ANSWER_WEIGHTS_DIFFER, f"{where}{text.weight:g} and {call.weight:g}")
    calls = [*text.template.get("tool_calls", ()), *call.template["tool_calls"]]
    strings = {key: value for key, value in call.template.items() if key in MESSAGE_STRINGS}
    if any(text.template.get(key, value) != value for key, value in strings.items()):
        raise Unusable(TWO_REASONINGS, where.rstrip(": "))
    template = {**text.template, **strings, "tool_calls": calls}
    return Message(template, text.weight, text.masked)


# Content parts -----------------------------------------------------------------------------------


def _read_parts(
    parts: list[Any], calls: list[Call], role: str, keys: Keys, where: str, found: RowFindings
) -> _Said:
    """Join the texts of content parts; separate LLaMA-Factory v1's reasoning and calls."""
    texts: list[str] = []
    reasoning: list[str] = []
    others = 0
    for part in parts:
        if not isinstance(part, Mapping):
            raise Unusable(CONTENT_NOT_TEXT, f"{where}a list with {type_name(part)}")
        kind = part.get("type")
        if kind in TEXT_PARTS:
            texts.append(_part_value(part, keys, where, found))
        elif kind == REASONING and role == "assistant":
            reasoning.append(_part_value(part, keys, where, found))
        elif kind in CALL_PARTS and role == "assistant":
            value = _part_value(part, keys, where, found)
            calls = [*calls, *read_calls(value, BAD_FUNCTION_CALL, where, single=True)]
            others += 1
        elif kind == TOOLS:
            found.tools.append(_part_value(part, keys, where, found))
        else:
            raise Unusable(
                CONTENT_NOT_TEXT,
                f"{where}content part of type {_shown(kind)}: only text can be trained",
            )
    content = None if calls and others and not texts else "".join(texts)
    return _Said(content, calls, "".join(reasoning))


def _shown(kind: Any) -> str:
    return printable(kind, 60) if isinstance(kind, str) else show(kind)


def _part_value(part: Mapping[str, Any], keys: Keys, where: str, found: RowFindings) -> str:
    key = next((key for key in TEXT_KEYS if isinstance(part.get(key), str)), None)
    if key is None:
        raise Unusable(CONTENT_NOT_TEXT, f"{where}a part of type {part['type']} without one")
    if len(part) > 2:
        found.unused += [
            (f"{keys.path}.{keys.content}.{name}", value)
            for name, value in part.items()
            if name not in ("type", key) and value is not None
        ]
    return part[key]
