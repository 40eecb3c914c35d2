"""Conversion of one record to a Row, or to a Rejection with the reason.

    prompt_completion  {prompt, completion}           strings unchanged; or two lists of messages
    question_answer    {question, answer}             the question inside QUESTION_PROMPT
    alpaca             {instruction, input?, output}  inside the prompts of the original Alpaca
    messages           {messages, tools?}             [{role, content, tool_calls?, weight?, ...}]
    sharegpt           {conversations, tools?}        [{from, value}], made messages
    text               {text}                         no prompt; everything is completion
    preference         {prompt?, chosen, rejected}    the chosen answer (preferences.py)
    tree               {message_tree_id, ...}         the best ways through a tree (trees.py)

All kinds accept a `system` prompt, a `history` (context.py) and a `weight`. Messages of all forms
are converted to one form (messages/read.py). The reason of a rejection is one of REASONS
(shared/fields.py), its detail is specific to the record. Unread keys are reported (keys.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torchprime.data.files.record import Rejection
from torchprime.data.messages.json_fields import objects_of_text, turns_of_text
from torchprime.data.messages.read import (
    CALL_ROLES,
    ROLES,
    Message,
    message_keys,
    read_messages,
)
from torchprime.data.messages.tool_calls import tools_of
from torchprime.data.rows import exchanges
from torchprime.data.rows.answer_form import KINDS_WITH_ANSWERS, THINK_ANSWER, think_answer
from torchprime.data.rows.context import (
    history_pairs,
    read_history,
    read_system,
    with_context,
)
from torchprime.data.rows.exchanges import Exchange
from torchprime.data.rows.formats import rename
from torchprime.data.rows.keys import CHAT, FLAT_TREE, PLAIN, RecordKeys
from torchprime.data.rows.preferences import dialogue_messages, read_preference
from torchprime.data.rows.row import PLAIN_READING, Row, RowReading
from torchprime.data.rows.trees import ID as TREE_ID
from torchprime.data.rows.trees import Tree
from torchprime.data.shared.fields import (
    ALL_OFF,
    ANSWER_WEIGHTS_DIFFER,
    FIELD_EMPTY,
    FIELD_NOT_LIST,
    FIELD_UNSUPPORTED,
    MASK_UNCLEAR,
    MIXED_FORMS,
    NO_ASSISTANT,
    ONLY_LAST,
    ROW_WEIGHT,
    Unusable,
    decimal,
    field_of,
    group_of,
    key_weight_of,
    show,
    string_of,
    time_of,
    type_name,
    weight_of,
)
from torchprime.data.shared.notes import RowFindings, RowNotes

HALVES = (("prompt", "completion"), ("completion", "prompt"))
HALF_JSON = "{} is JSON text of messages, {} is not: both are trained as the text they are"


def read_row(
    row_id: str,
    record: Mapping[str, Any],
    kind: str,
    reading: RowReading = PLAIN_READING,
    source: str = "",
    notes: RowNotes | None = None,
) -> Row | Rejection:
    """Return a record as a Row, or its Rejection. `kind` is one of FIELDS, but no tree."""
    return RowReader(kind, reading, source, notes).read(row_id, record)


class RowReader:
    """A reader for the records of one source, all of one kind."""

    def __init__(
        self,
        kind: str,
        reading: RowReading = PLAIN_READING,
        source: str = "",
        notes: RowNotes | None = None,
    ) -> None:
        self.kind, self.reading, self.source = kind, reading, source
        self.notes = RowNotes() if notes is None else notes
        self.keys = RecordKeys(kind, reading)
        self._columns = reading.columns or {}
        self._body = _BODIES.get(kind)
        self._found = RowFindings()  # replaced only after something was found
        self._think = reading.answer_form == THINK_ANSWER and kind in KINDS_WITH_ANSWERS

    def read(self, row_id: str, record: Mapping[str, Any]) -> Row | Rejection:
        """Return a record as a Row, or its Rejection."""
        assert self._body is not None, "trees have no row a record"
        found = self._found
        if found.unused or found.noticed or found.tools:
            found = self._found = RowFindings()
        try:
            fields = rename(record, self.reading.columns)
            body = self._body(fields, self._columns, found)
            if isinstance(body, Exchange):
                body = self._exchange(body, fields, found)
            elif self._think:
                think_answer("")  # raises the reason why these have no such answer
            row = self._row(row_id, record, fields, body)
        except Unusable as unusable:
            return Rejection(row_id, unusable.reason, unusable.detail)
        found.unused += self.keys.unused(record, CHAT if row.messages else PLAIN)
        if found.unused or found.noticed:
            found.add_to(self.notes, row_id)
        return row

    def _row(
        self, row_id: str, record: Mapping[str, Any], fields: dict[str, Any], body: dict[str, Any]
    ) -> Row:
        given, reading = fields.get("weight"), self.reading
        weight = 1.0 if given is None else weight_of(decimal(given), ROW_WEIGHT, "")
        return Row(
            row_id,
            **body,
            weight=weight * key_weight_of(record, reading.weight_key),
            source=self.source,
            group=None if reading.group_key is None else group_of(record, reading.group_key),
            time=None if reading.time_key is None else time_of(record, reading.time_key),
        )

    def _exchange(
        self, exchange: Exchange, fields: dict[str, Any], found: RowFindings
    ) -> dict[str, Any]:
        """Read a question and its answer, as text or as turns."""
        if self._think:
            exchange = exchange._replace(completion=think_answer(exchange.completion))
        if not self.reading.as_messages:
            return _as_text(exchange, fields, self._columns, found)
        messages = [
            Message({"role": "user", "content": exchange.question()}),
            Message({"role": "assistant", "content": exchange.completion}),
        ]
        if exchange.kind == "preference":
            messages = dialogue_messages(exchange) or messages
        return _conversation(messages, fields, self._columns, found, exchange.kind)

    def read_tree(self, tree: Tree) -> Iterator[Row | Rejection]:
        """Read the rows of one tree: `file.jsonl:17`, `file.jsonl:17/2` and so on."""
        if isinstance(tree.result, Rejection):
            yield tree.result
            return
        rows: list[Row] = []
        try:
            fields = rename(tree.record, self.reading.columns)
            shared = {} if tree.is_flat else fields  # a message's record has no keys for the rest
            for number, messages in enumerate(tree.result, start=1):
                body = _conversation(messages, shared, self._columns, tree.found, "tree")
                row_id = tree.row_id if number == 1 else f"{tree.row_id}/{number}"
                row = self._row(row_id, tree.record, fields, body)
                group = row.group if self.reading.group_key else str(fields[TREE_ID])
                rows.append(replace(row, group=group))
        except Unusable as unusable:
            yield Rejection(tree.row_id, unusable.reason, unusable.detail)
            return
        for record in tree.members:
            tree.found.unused += self.keys.unused(record, FLAT_TREE if tree.is_flat else CHAT)
        tree.found.add_to(self.notes, tree.row_id)
        yield from rows


def _as_text(
    exchange: Exchange, fields: dict[str, Any], columns: Mapping[str, str], found: RowFindings
) -> dict[str, Any]:
    prompt = exchange.prompt
    if exchange.opening or fields.get("system") is not None or fields.get("history") is not None:
        history = history_pairs(read_history(fields, columns, found))
        prompt = exchange.prompt_after(read_system(fields, columns), history)
    return {"kind": exchange.kind, "prompt": prompt, "completion": exchange.completion}


def _prompt_completion(
    fields: dict[str, Any], columns: Mapping[str, str], found: RowFindings
) -> Exchange | dict[str, Any]:
    prompt, completion = (field_of(fields, name, columns) for name in ("prompt", "completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        turns = turns_of_text(prompt), turns_of_text(completion)
        if turns[0] is None or turns[1] is None:
            found.noticed += [(HALF_JSON.format(*HALVES[turns[0] is None]), 1)] * any(turns)
            return exchanges.prompt_completion(fields, columns)
        prompt, completion = turns
    elif isinstance(prompt, list) and isinstance(completion, str):
        completion = turns_of_text(completion) or completion
    elif isinstance(prompt, str) and isinstance(completion, list):
        prompt = turns_of_text(prompt) or prompt
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return exchanges.prompt_completion(fields, columns)  # reports which of them is no string
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise Unusable(
            MIXED_FORMS, f"prompt: {type_name(prompt)}, completion: {type_name(completion)}"
        )
    if not completion:
        raise Unusable(FIELD_EMPTY.format("completion"))
    context = read_messages(prompt, message_keys(columns, "prompt"), found, off=True)
    keys = message_keys(columns, "completion")
    answers = read_messages(completion, keys, found, first=len(prompt) + 1)
    if context and context[-1].role == "assistant" and completion[0].get(keys.role) in CALL_ROLES:
        raise Unusable(ANSWER_WEIGHTS_DIFFER, "the prompt ends in a turn that continues with calls")
    return _conversation([*context, *answers], fields, columns, found)


def _question_answer(
    fields: dict[str, Any], columns: Mapping[str, str], found: RowFindings
) -> Exchange:
    return exchanges.question_answer(fields, columns)


def _alpaca(fields: dict[str, Any], columns: Mapping[str, str], found: RowFindings) -> Exchange:
    return exchanges.alpaca(fields, columns)


def _text(fields: dict[str, Any], columns: Mapping[str, str], found: RowFindings) -> dict[str, Any]:
    text = string_of(fields, "text", columns)
    if fields.get("history") is not None and read_history(fields, columns, found):
        raise Unusable(FIELD_UNSUPPORTED.format("history"), "write such rows as messages")
    system = read_system(fields, columns)
    prompt = "" if not system or system in text else system + exchanges.BETWEEN
    return {"kind": "text", "prompt": prompt, "completion": text}


def _preference(
    fields: dict[str, Any], columns: Mapping[str, str], found: RowFindings
) -> Exchange | dict[str, Any]:
    chosen = read_preference(fields, columns, found)
    if isinstance(chosen, Exchange):
        return chosen
    return _conversation(chosen, fields, columns, found, "preference")


def _messages(
    fields: dict[str, Any], columns: Mapping[str, str], found: RowFindings
) -> dict[str, Any]:
    turns = _turns(fields, "messages", columns)
    messages = read_messages(turns, message_keys(columns, "messages"), found)
    return _conversation(messages, fields, columns, found)


def _sharegpt(
    fields: dict[str, Any], columns: Mapping[str, str], found: RowFindings
) -> dict[str, Any]:
    turns = _turns(fields, "conversations", columns)
    keys = message_keys(columns, "conversations", "from", "value")
    return _conversation(read_messages(turns, keys, found), fields, columns, found, "sharegpt")


Body = Callable[
    [dict[str, Any], Mapping[str, str], RowFindings],
    "Exchange | dict[str, Any]",
]
_BODIES: dict[str, Body] = {
    "prompt_completion": _prompt_completion,
    "question_answer": _question_answer,
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "text": _text,
    "preference": _preference,
}


def _conversation(
    messages: list[Message],
    fields: dict[str, Any],
    columns: Mapping[str, str],
    found: RowFindings,
    kind: str = "messages",
) -> dict[str, Any]:
    """Return the body of a row of messages, at least one turn of which carries loss."""
    if fields.get("system") is not None or fields.get("history") is not None:
        messages = with_context(messages, fields, columns, found)
    if fields.get("only_last") is not None or fields.get("mask") is not None:
        messages = _switched(messages, fields)
    weights = [message.weight for message in messages if message.role == "assistant"]
    if not weights:
        raise Unusable(NO_ASSISTANT, f"{len(messages)} turns")
    if not any(weights):
        raise Unusable(ALL_OFF, f"{len(weights)} assistant turns")
    return {"kind": kind, "messages": tuple(messages), "tools": tools_of(fields, found.tools)}


def _switched(messages: list[Message], fields: dict[str, Any]) -> list[Message]:
    """Apply a row's own loss switches to its messages.

    They are `only_last` (Mistral) and `mask` (NeMo: the role whose turns carry no loss).
    """
    mask, only_last = fields.get("mask"), fields.get("only_last")
    masked = ROLES.get(mask.lower()) if isinstance(mask, str) else None
    if mask is not None and masked not in ("user", "system", "tool"):
        raise Unusable(MASK_UNCLEAR, f"of a row: {show(mask)}; put masked: true into the messages")
    if only_last is None:
        return messages
    if not isinstance(only_last, bool | int) or only_last not in (0, 1):
        raise Unusable(ONLY_LAST, show(only_last))
    last = max((n for n, m in enumerate(messages) if m.role == "assistant"), default=0)
    off = range(last if only_last else 0)
    return [replace(m, weight=0.0) if n in off else m for n, m in enumerate(messages)]


def _turns(fields: dict[str, Any], name: str, columns: Mapping[str, str]) -> list[Any]:
    value = field_of(fields, name, columns)
    if isinstance(value, str):
        value = objects_of_text(value)
        if value is None:
            raise Unusable(FIELD_NOT_LIST.format(name), "a text that is no JSON list of objects")
    if not isinstance(value, list):
        raise Unusable(FIELD_NOT_LIST.format(name), type_name(value))
    if not value:
        raise Unusable(FIELD_EMPTY.format(name))
    return value
