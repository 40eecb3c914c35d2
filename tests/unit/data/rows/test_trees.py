"""Trees of messages: the best ways through them, each turn trained once, nothing lost silently.

`by_rules` says a second time, recursively and slowly, which ways there are.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from torchprime.data.files.record import Rejection
from torchprime.data.files.source import SourceSpec
from torchprime.data.rows.formats import decide_format
from torchprime.data.rows.read import Row, RowReading, open_rows
from torchprime.data.rows.row import PLAIN_READING
from torchprime.data.shared.notes import RowNotes

Open = Callable[..., tuple[list[Row | Rejection], RowNotes]]


def node(said: str, *replies: dict, **more: Any) -> dict[str, Any]:
    """A message whose role is told by its text: `p...` of the prompter, `a...` of the assistant."""
    role = "prompter" if said.startswith("p") else "assistant"
    return {"message_id": said, "text": said, "role": role, "replies": list(replies)} | more


def tree(prompt: dict[str, Any], name: str = "t1", **more: Any) -> dict[str, Any]:
    return {"message_tree_id": name, "prompt": prompt} | more


def flat(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The same tree as a record a message, in the order of a walk."""
    found: list[dict[str, Any]] = []

    def walk(message: dict[str, Any], parent: str | None) -> None:
        plain = {key: value for key, value in message.items() if key != "replies"}
        found.append(plain | {"parent_id": parent, "message_tree_id": record["message_tree_id"]})
        for reply in message["replies"]:
            walk(reply, message["message_id"])

    walk(record["prompt"], None)
    return found


@pytest.fixture
def read(write_rows: Callable[..., Path]) -> Open:
    def read_file(*records: Any, **reading: Any) -> tuple[list[Row | Rejection], RowNotes]:
        notes = RowNotes()
        source = SourceSpec(file_dataset_path=str(write_rows(*records)))
        decision, rows = open_rows(source, RowReading(**reading), notes=notes)
        assert decision.kind == "tree"
        return list(rows), notes

    return read_file


def told(rows: list[Row | Rejection]) -> list[tuple[str, str]]:
    """(id, texts); an assistant's turn without loss in brackets."""
    found = []
    for row in rows:
        assert isinstance(row, Row), row
        texts = [
            f"({m.content})" if m.role == "assistant" and m.weight == 0 else m.content
            for m in row.messages
        ]
        found.append((row.row_id, " ".join(texts)))
    return found


GONE: dict[str, Any] = {"deleted": True, "rank": 0, "text": None}
EXAMPLE = tree(
    node(
        "p1",
        node("a worse", node("p lost", node("a lost")), rank=1),
        node(
            "a best",
            node("p2", node("a2", rank=None), node("a2 ranked", rank=3)),
            node("p unanswered"),
            node("p3", node("a3 gone", node("a4 gone"), **GONE), node("a3", rank=2)),
            rank=0,
        ),
        node("a null"),
    )
)
WAYS = [
    ("rows.jsonl:1", "p1 a best p2 a2 ranked"),
    ("rows.jsonl:1/2", "p1 (a best) p3 a3"),
]


def test_the_best_ways_through_a_tree(read: Open) -> None:
    rows, notes = read(EXAMPLE)
    assert told(rows) == WAYS
    assert {text: noted.count for text, noted in notes.noticed.items()} == {
        "message of a tree left out: deleted, or a reply to a deleted one": 2,
        "message of a tree left out: not the best reply, or below one that is not": 5,
        "message of a tree left out: no assistant's reply": 1,
    }
    assert all(isinstance(row, Row) and row.group == "t1" for row in rows)
    assert all(isinstance(row, Row) and row.kind == "tree" for row in rows)
    assert [m.role for m in rows[0].messages] == ["user", "assistant"] * 2  # type: ignore[union-attr]


def test_a_record_a_message_is_the_same_tree(read: Open) -> None:
    records = flat(EXAMPLE)
    assert told(read(*records)[0]) == WAYS
    for record in records:  # what an exporter without nulls writes
        for key in [key for key, value in record.items() if value is None]:
            del record[key]
    assert told(read(*records)[0]) == WAYS
    # A tree begins where the one before ends; replies may come before what they reply to.
    second = flat(tree(node("p", node("a"), node("b a"))) | {"message_tree_id": "t2"})
    rows, _ = read(*records, *reversed(second))
    assert told(rows) == [*WAYS, (f"rows.jsonl:{len(records) + 1}", "p b a")]


def by_rules(message: dict[str, Any], above: list[str]) -> Iterator[list[str]]:
    """The ways below a message, as lists of texts."""
    here = [*above, message["text"]]
    replies = [reply for reply in message["replies"] if not reply.get("deleted")]
    answers = [reply for reply in replies if reply["role"] == "assistant"]
    if answers:
        ranked = [a for a in answers if a.get("rank") is not None] or answers
        best = sorted(ranked, key=lambda a: a.get("rank") or 0)[0]
        replies = [r for r in replies if r["role"] != "assistant" or r is best]
    below = [way for reply in replies for way in by_rules(reply, here)]
    yield from below or ([here] if message["role"] == "assistant" else [])


def grown(chance: random.Random, depth: int, role: str, names: Iterator[int]) -> dict[str, Any]:
    other = {"p": "a", "a": "p"}[role]
    count = chance.choice([0, 1, 1, 2, 3]) if depth else 0
    replies = [
        grown(chance, depth - 1, chance.choice(other * 9 + role), names) for _ in range(count)
    ]
    rank = chance.choice([None, 0, 1, 1, 2])
    return node(f"{role}{next(names)}", *replies, rank=rank, deleted=chance.random() < 0.1)


def test_grown_trees(read: Open) -> None:
    chance = random.Random(7)
    trees = [tree(grown(chance, 6, "p", iter(range(999))), f"t{n}") for n in range(60)]
    wanted = [list(by_rules(t["prompt"], [])) * (not t["prompt"]["deleted"]) for t in trees]
    assert sum(map(len, wanted)) > 60 and [] in wanted
    flat_records = [record for t in trees for record in flat(t)]
    for records in (trees, flat_records):
        rows, _ = read(*records, format="tree")
        ways = [way for each in wanted for way in each]
        found = [[m.content for m in row.messages] for row in rows if isinstance(row, Row)]
        assert found == ways
        rejected = [row for row in rows if isinstance(row, Rejection)]
        assert len(rejected) == wanted.count([])
        assert {row.reason for row in rejected} == {"no assistant turn to learn from"}
        trained = [
            (row.group, m.content)
            for row in rows
            if isinstance(row, Row)
            for m in row.messages
            if m.role == "assistant" and m.weight
        ]
        assert len(trained) == len(set(trained))  # each turn once
        every = {
            (row.group, m.content)
            for row in rows
            if isinstance(row, Row)
            for m in row.messages
            if m.role == "assistant"
        }
        assert set(trained) == every


def test_deep_trees(read: Open) -> None:
    """A chain longer than Python's stack."""
    names = [f"{'pa'[n % 2]}{n}" for n in range(3000)]
    parents = [None, *names]
    records = [
        {"message_tree_id": "t", "message_id": name, "parent_id": parent, "text": name}
        | {"role": "prompter" if name[0] == "p" else "assistant"}
        for name, parent in zip(names, parents, strict=False)
    ]
    (row,) = read(*records)[0]
    assert isinstance(row, Row) and len(row.messages) == 3000


# Keys of the record ------------------------------------------------------------------------------


def test_group_time_weight_and_id(read: Open) -> None:
    first = tree(node("p", node("a", node("p2", node("a2")), node("p3", node("a3")))), "t1")
    second = tree(node("p", node("a")), "t2", weight=2, thread="x", at="2024-01-01")
    rows, _ = read(
        first | {"thread": "x", "at": 5}, second | {"at": 6}, group_key="thread", time_key="at"
    )
    assert [(row.group, row.time, row.weight) for row in rows] == [  # type: ignore[union-attr]
        ("x", 5.0, 1.0),
        ("x", 5.0, 1.0),
        ("x", 6.0, 2.0),
    ]
    rows, _ = read(first | {"hard": 3}, second, weight_key="hard")
    assert [row.weight for row in rows[:2]] == [3.0, 3.0]  # type: ignore[union-attr]
    assert isinstance(rows[2], Rejection) and rows[2].reason == "weight_key hard is missing"
    rows, _ = read(first | {"id": 1}, second | {"id": 1}, id_key="id")
    assert [row.row_id for row in rows] == ["rows.jsonl:1", "rows.jsonl:1/2", "rows.jsonl:2"]
    assert isinstance(rows[2], Rejection) and rows[2].reason == "duplicated id"
    named = {"tree": "t", "message_id": "p", "text": "p", "role": "prompter"}
    answer = named | {"message_id": "a", "parent_id": "p", "role": "assistant", "text": "a"}
    assert told(read(named, answer, columns={"message_tree_id": "tree"})[0]) == [
        ("rows.jsonl:1", "p a")
    ]


def test_unused_keys_are_reported(read: Open) -> None:
    record = tree(node("p", node("a", lang="en"), lang="en", emojis=None), tree_state="ready")
    _, notes = read(record)
    assert {path: noted.count for path, noted in notes.unused.items()} == {
        "prompt.lang": 2,
        "tree_state": 1,
    }
    records = [message | {"lang": "en", "system": "s"} for message in flat(record)]
    rows, notes = read(*records)
    assert told(rows) == [("rows.jsonl:1", "p a")]
    assert {path: n.count for path, n in notes.unused.items()} == {"lang": 2, "system": 2}
    rows, notes = read(record | {"system": "s", "tools": [{"name": "f"}]})
    assert told(rows) == [("rows.jsonl:1", "s p a")] and rows[0].tools  # type: ignore[union-attr]


# Rejections --------------------------------------------------------------------------------------


def messages(**changes: Any) -> list[dict[str, Any]]:
    records = flat(tree(node("p", node("a"))))
    return [records[0], records[1] | changes]


@pytest.mark.parametrize(
    ("records", "reason"),
    [
        (messages(parent_id="x"), "tree message without its parent"),
        (messages(parent_id="a"), "tree message without its parent"),  # itself
        (messages(parent_id=None), "tree with more than one first message"),
        (messages(message_id="p"), "tree message is not an object with text and role"),
        (messages(message_id=["p"]), "tree message is not an object with text and role"),
        (messages(message_id=None), "tree message is not an object with text and role"),
        (messages(text=None), "tree message is not an object with text and role"),
        (messages(text=""), "message content is empty"),
        (messages(role="narrator"), "no assistant turn to learn from"),
        (messages(rank="best"), "tree message rank is not a number"),
        ([tree(node("p", node("a", text=3)))], "tree message is not an object with text and role"),
        ([tree(node("p") | {"replies": "x"})], "tree message is not an object with text and role"),
        (
            [tree(node("p") | {"replies": ["x"]})],
            "tree message is not an object with text and role",
        ),
        ([tree(node("p"))], "no assistant turn to learn from"),
        (
            [tree(node("p", node("a")), deleted=None, weight=11)],
            "row weight is not a number from 0 to 10",
        ),
        ([tree(node("p", node("a", role="x")))], "no assistant turn to learn from"),
        ([tree(node("p", node("a")) | {"role": "narrator"})], "unknown role"),
    ],
)
def test_rejected_trees(read: Open, records: list, reason: str) -> None:
    good = tree(node("p", node("a")), "good")
    rows, notes = read(*records, good, format="tree")
    assert [row.reason for row in rows if isinstance(row, Rejection)] == [reason]
    assert rows[0].row_id == "rows.jsonl:1"
    assert told(rows[1:]) == [(f"rows.jsonl:{len(records) + 1}", "p a")]
    assert not notes.unused and not notes.noticed


def test_a_tree_that_comes_again(read: Open) -> None:
    one, two = (flat(tree(node("p", node("a")), name)) for name in ("t1", "t2"))
    rows, _ = read(*one, *two, *one)
    assert told(rows[:2]) == [("rows.jsonl:1", "p a"), ("rows.jsonl:3", "p a")]
    assert [(row.row_id, row.reason) for row in rows[2:] if isinstance(row, Rejection)] == [
        (f"rows.jsonl:{n}", "tree id comes again after another tree") for n in (5, 6)
    ]
    rows, _ = read(EXAMPLE, EXAMPLE)
    assert isinstance(rows[2], Rejection) and rows[2].reason.startswith("tree id comes again")


def test_records_of_no_tree(read: Open, tmp_path: Path) -> None:
    one = flat(tree(node("p", node("a"))))
    rows, _ = read(one[0], {"text": "x"}, one[1], format="tree")
    assert [row.row_id for row in rows] == ["rows.jsonl:2", "rows.jsonl:1"]
    assert isinstance(rows[0], Rejection) and rows[0].reason == "field message_tree_id is missing"
    path = tmp_path / "broken.jsonl"
    path.write_text(json.dumps(EXAMPLE) + "\n{\n")
    _, stream = open_rows(SourceSpec(str(path)), RowReading())
    assert [row.row_id for row in stream] == [
        "broken.jsonl:1",
        "broken.jsonl:1/2",
        "broken.jsonl:2",
    ]


def test_auto_knows_a_tree() -> None:
    for sample in ([EXAMPLE], flat(EXAMPLE), [EXAMPLE, Rejection("f:2", "malformed JSON")]):
        assert decide_format(sample, PLAIN_READING, SourceSpec()).kind == "tree"
    marked = {"text": "t", "message_id": 1}
    assert decide_format([marked], PLAIN_READING, SourceSpec()).kind == "text"
    pair = {"prompt": "p", "completion": "c", "message_tree_id": 1}
    assert decide_format([pair], PLAIN_READING, SourceSpec()).kind == "prompt_completion"
