"""Every key of a row and of a message is used, or named in the report as not used (law 9).

The keys are those of docs/data.md: for each kind of row a row with every one of them. Another value
of a key gives another row (or a rejection by name), or the key is reported. A key that the page
does not name is reported.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from torchprime.data.files.record import Rejection
from torchprime.data.messages.read import CALLS, MESSAGE_STRINGS
from torchprime.data.messages.turn_loss import SWITCHES
from torchprime.data.rows.formats import FIELDS
from torchprime.data.rows.keys import OF_ALL, OF_KIND, OF_SHAPE
from torchprime.data.rows.reader import RowReader
from torchprime.data.rows.row import RowReading
from torchprime.data.rows.trees import read_trees
from torchprime.data.shared.notes import RowNotes

PAGE = Path(__file__).resolve().parents[2] / "docs" / "data.md"
USER = {"role": "user", "content": "u"}
BOT = {"role": "assistant", "content": "b"}
HUMAN, GPT = {"from": "human", "value": "u"}, {"from": "gpt", "value": "b"}
CALL = {"name": "f", "arguments": {}}
TREE = {"text": "p", "role": "prompter", "replies": [{"text": "a", "role": "assistant"}]}
FLAT = [
    {"message_tree_id": "t", "message_id": "p", "text": "p", "role": "prompter"},
    {"message_tree_id": "t", "message_id": "a", "parent_id": "p", "text": "a", "role": "assistant"},
]


def table(heading: str, page: str) -> dict[str, list[str]]:
    """First cell to the code words of the second, of the table with this heading."""
    body = page.split(heading, 1)[1].split("\n\n", 1)[0]
    rows = [line.split("|")[1:-1] for line in body.splitlines()[2:]]
    return {cells[0].strip(): re.findall(r"`([a-z_]+)`", cells[1]) for cells in rows}


def keys_by_kind() -> dict[str, list[str]]:
    """The keys that the page names for rows of each kind."""
    found = table("| `dataset.format` | Keys of its rows | Becomes |", PAGE.read_text("utf-8"))
    of_all, of_chats = found.pop("all kinds"), found.pop("conversations")
    kinds = {kind.strip("`"): keys for kind, keys in found.items()}
    return {kind: [*keys, *of_all, *of_chats] for kind, keys in kinds.items()}


def message_keys() -> list[str]:
    body = PAGE.read_text("utf-8").split("| Key of a message | What becomes of it |", 1)[1]
    lines = body.split("\n\n", 1)[0].splitlines()[2:]
    return [key for line in lines for key in re.findall(r"`([a-z_]+)`", line.split("|")[1])]


# Two values of each key, between which a row can tell.
VALUES: dict[str, tuple[Any, Any]] = {
    "prompt": ("p", "q"),
    "completion": ("c", "d"),
    "question": ("q", "r"),
    "answer": ("a", "b"),
    "instruction": ("i", "j"),
    "input": ("n", ""),
    "output": ("o", "p"),
    "messages": ([USER, BOT], [USER, BOT, USER, BOT]),
    "conversations": ([HUMAN, GPT], [HUMAN, GPT, HUMAN, GPT]),
    "text": ("t", "u"),
    "chosen": ([USER, BOT, USER, BOT], [USER, BOT]),
    "rejected": ([USER, USER], [USER, BOT, USER, USER]),
    "message_tree_id": ("t", "u"),
    "system": ("s", ""),
    "history": ([], [["u", "b"]]),
    "weight": (1, 2),
    "tools": ([{"name": "f"}], []),
    "functions": ([{"name": "f"}], []),
    "only_last": (False, True),
    "mask": ("user", "assistant"),
}
OF_TREE = {"prompt": (TREE, TREE | {"text": "q"})}
OF_PREFERENCE = {"prompt": ([USER], [USER, BOT, USER])}
# Rows of a kind that is text in its usual form, as a conversation.
IN_CHAT = {
    "prompt_completion": {"prompt": ([USER], [BOT, USER]), "completion": ([BOT], [BOT, USER, BOT])}
}
PLAIN = ("prompt_completion", "question_answer", "alpaca", "text")
NEVER_CHAT = ("text",)


def read(record: dict[str, Any], kind: str, as_messages: bool = False) -> tuple[Any, set[str]]:
    """Return the rows that a record gives, or its error, and the keys that are reported."""
    notes = RowNotes()
    reading = RowReading(as_messages=as_messages)
    reader = RowReader(kind, reading, notes=notes)
    if kind == "tree":
        (tree,) = read_trees([("f:1", record)], None)
        rows = [tree] if isinstance(tree, Rejection) else list(reader.read_tree(tree))
        return rows, set(notes.unused)
    return reader.read("f:1", copy.deepcopy(record)), set(notes.unused)


def cases() -> list[tuple[str, bool, str]]:
    chats = {kind: [False] if kind not in PLAIN else [False, True] for kind in FIELDS}
    return [
        (kind, as_messages, key)
        for kind, keys in keys_by_kind().items()
        for as_messages in chats[kind]
        for key in keys
        if kind not in NEVER_CHAT or not as_messages
    ]


def whole_row(kind: str, chat: bool) -> dict[str, Any]:
    """The fields that a kind's rows need."""
    values = VALUES | {"tree": OF_TREE, "preference": OF_PREFERENCE}.get(kind, {})
    names = [*FIELDS[kind], *OF_KIND.get(kind, ())]
    if kind == "messages":  # two answers, so that only_last shows
        return {"messages": [USER, BOT, USER, BOT]}
    if kind == "sharegpt":
        return {"conversations": [HUMAN, GPT, HUMAN, GPT]}
    if kind in IN_CHAT and chat:
        return {"prompt": [USER], "completion": [BOT, USER, BOT]}
    if kind == "tree":
        answers = [{"text": "p2", "role": "prompter", "replies": [{"text": "a2", "role": "gpt"}]}]
        reply = {"text": "a", "role": "assistant", "replies": answers}
        return {"message_tree_id": "t", "prompt": TREE | {"replies": [reply]}}
    return {name: values[name][0] for name in names}


def values_of(key: str, kind: str, chat: bool) -> tuple[Any, Any]:
    own = {"tree": OF_TREE, "preference": OF_PREFERENCE}.get(kind, {})
    own = own | (IN_CHAT.get(kind, {}) if chat else {})
    return own.get(key, VALUES[key])


def test_the_page_names_what_the_code_reads() -> None:
    found = keys_by_kind()
    assert list(found) == list(FIELDS)
    for kind, keys in found.items():
        assert keys == [*dict.fromkeys(keys)], kind
        needed = {*FIELDS[kind], *OF_KIND.get(kind, ()), *OF_ALL, *OF_SHAPE["chat"]}
        assert set(keys) == needed, kind
    keys = message_keys()
    known = {*("role", "content", "from", "value"), *MESSAGE_STRINGS, *CALLS, *SWITCHES}
    assert {*keys, "from", "value"} == known
    flat = PAGE.read_text("utf-8").split("### Trees", 1)[1]
    assert all(f"`{key}`" in flat for key in OF_SHAPE["flat tree"] if key != "weight")


@pytest.mark.parametrize(("kind", "as_messages", "key"), cases())
def test_every_key_of_a_row_is_used_or_reported(kind: str, as_messages: bool, key: str) -> None:
    # With as_messages a question and its answer are a conversation; only_last needs two answers.
    base = whole_row(kind, as_messages)
    if key == "only_last" and as_messages:
        base |= {"history": [["u", "b"]]}
    first, second = (base | {key: value} for value in values_of(key, kind, as_messages))
    (one, reported), (other, _) = read(first, kind, as_messages), read(second, kind, as_messages)
    assert not isinstance(one, Rejection) and one, one
    assert (one != other) != (key in reported), (one, other, reported)
    assert reported <= {key}
    with_unknown = first | {"unknown": 1, "nothing": None}
    again, reported_then = read(with_unknown, kind, as_messages)
    assert again == one and reported_then == reported | {"unknown"}


MESSAGE_VALUES: dict[str, tuple[Any, Any]] = {
    "role": ("assistant", "bot x"),
    "content": ("b", "c"),
    **{key: ("x", "y") for key in MESSAGE_STRINGS},
    "tool_calls": ([CALL], [CALL, CALL]),
    "function_call": (CALL, CALL | {"name": "g"}),
    **dict.fromkeys(("weight", "loss_weight", "loss_scale"), (2, 0)),
    **dict.fromkeys(("loss", "train", "training", "trainable"), (True, False)),
    "masked": (False, True),
    "mask": (None, 1),
    **dict.fromkeys(
        ("train_detail", "training_detail"),
        (None, [{"begin_offset": 0, "end_offset": 0, "train": False}]),
    ),
}
LISTS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "messages": ("messages", [USER]),
    "conversations": ("sharegpt", [HUMAN]),
    "completion": ("prompt_completion", []),
    "chosen": ("preference", [USER]),
    "history": ("messages", [USER]),
}


@pytest.mark.parametrize("key", message_keys())
@pytest.mark.parametrize("place", LISTS)
def test_every_key_of_a_message_is_used_or_reported(place: str, key: str) -> None:
    kind, before = LISTS[place]
    sharegpt = place == "conversations"
    names = {"role": "from", "content": "value"} if sharegpt else {}
    last = GPT if sharegpt else BOT

    def row_with(value: Any, **more: Any) -> tuple[Any, set[str]]:
        turn = last | {names.get(key, key): value} | more
        record: dict[str, Any] = {place: [*before, turn, *before, last]}
        if place == "completion":
            record |= {"prompt": [USER]}
        if place == "history":
            record = {place: [*before, turn], "messages": [USER, BOT]}
        return read(record, kind)

    (one, reported), (other, _) = (row_with(value) for value in MESSAGE_VALUES[key])
    assert not isinstance(one, Rejection), one
    assert one != other and not reported
    again, reported = row_with(MESSAGE_VALUES[key][0], unknown=1, nothing=None)
    assert again == one and reported == {f"{place}.unknown"}


def test_every_key_of_a_flat_tree_is_used_or_reported() -> None:
    def rows(change: dict[str, Any]) -> tuple[Any, set[str]]:
        notes = RowNotes()
        reader = RowReader("tree", RowReading(), notes=notes)
        records = [FLAT[0] | {"weight": change.pop("weight", 1)}, FLAT[1] | {"rank": 1} | change]
        records.append(FLAT[1] | {"message_id": "b", "text": "b", "rank": 2})
        trees = read_trees([(f"f:{n}", record) for n, record in enumerate(records)], None)
        found = [t if isinstance(t, Rejection) else list(reader.read_tree(t)) for t in trees]
        return found, set(notes.unused)

    changes = {
        "message_tree_id": "u",
        "message_id": "b",
        "parent_id": "x",
        "text": "changed",
        "role": "prompter",
        "rank": 3,
        "deleted": True,
        "weight": 2,
    }
    assert set(changes) == {*OF_SHAPE["flat tree"], "message_tree_id"}
    plain, reported = rows({})
    assert not reported
    for key, value in changes.items():
        assert rows({key: value})[0] != plain, key
    assert rows({"unknown": 1}) == (plain, {"unknown"})
