"""Conversations from trees of messages, in OpenAssistant's two forms.

    {message_tree_id, prompt: {text, role, rank, replies: [{...}, ...]}}    nested: a whole tree
    {message_tree_id, message_id, parent_id, text, role, rank}              flat: one message of it

Of the assistant's replies to a message only the best is used (the lowest rank, then the first); of
the prompter's all are. Each path from the first message to an assistant's turn without a reply is a
conversation. A turn that is in several conversations carries loss in the first one only. Deleted
messages are left out together with their replies. Everything left out is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import Any, NamedTuple

from torchprime.data.files.record import Rejection
from torchprime.data.messages.read import ROLES, Message, message_keys, read_message
from torchprime.data.rows.formats import rename
from torchprime.data.shared.fields import (
    BAD_RANK,
    BAD_TREE,
    FIELD_MISSING,
    FIELD_NOT_STRING,
    NO_ASSISTANT,
    NO_PARENT,
    TREE_AGAIN,
    TWO_ROOTS,
    Unusable,
    decimal,
    scalar_of,
    show,
    type_name,
)
from torchprime.data.shared.notes import RowFindings

ID = "message_tree_id"
NODE_KEYS = frozenset(("message_id", "parent_id", "text", "role", "rank", "deleted", "replies", ID))
DELETED = "message of a tree left out: deleted, or a reply to a deleted one"
NOT_BEST = "message of a tree left out: not the best reply, or below one that is not"
UNANSWERED = "message of a tree left out: no assistant's reply"
KEYS = message_keys({}, "tree", "role", "text")
Fields = Mapping[str, Any]


@dataclass(eq=False)
class Node:
    """One message and the replies to it, in their order."""

    given: Fields
    number: int  # index in the tree, from 1
    replies: list[Node] = field(default_factory=list)
    message: Message | None = None

    @property
    def is_assistant(self) -> bool:
        role = self.given.get("role")
        return isinstance(role, str) and ROLES.get(role) == "assistant"


class Tree(NamedTuple):
    """One tree: its conversations, or the reason why there are none.

    Attributes:
        record: the tree's, or that of its first message.
        members: all its records, to account for their keys.
    """

    row_id: str
    record: Fields
    members: list[Fields]
    is_flat: bool
    result: list[list[Message]] | Rejection
    found: RowFindings


def read_trees(
    records: Iterable[tuple[str, Fields | Rejection]], columns: Mapping[str, str] | None
) -> Iterator[Tree | Rejection]:
    """Yield the trees of a source in order, and rejections for the records that belong to none."""
    flat: list[tuple[str, Fields]] = []
    current: str | None = None
    seen: set[bytes] = set()
    for row_id, record in records:
        if isinstance(record, Rejection):
            yield record
            continue
        try:
            name = scalar_of(rename(record, columns), ID, FIELD_MISSING, FIELD_NOT_STRING)
        except Unusable as unusable:
            yield Rejection(row_id, unusable.reason, unusable.detail)
            continue
        nested = isinstance(rename(record, columns).get("prompt"), Mapping)
        if flat and (nested or name != current):
            yield _flat_tree(flat, columns)
            flat = []
        if not flat:
            digest = blake2b(name.encode("utf-8"), digest_size=16).digest()
            if digest in seen:
                yield Rejection(row_id, TREE_AGAIN, show(name))
                continue
            seen.add(digest)
        if nested:
            yield _nested_tree(row_id, record, columns)
        else:
            current = name
            flat.append((row_id, record))
    if flat:
        yield _flat_tree(flat, columns)


# Building ----------------------------------------------------------------------------------------


def _nested_tree(row_id: str, record: Fields, columns: Mapping[str, str] | None) -> Tree:
    found = RowFindings()
    result: list[list[Message]] | Rejection
    try:
        result = _conversations(_nested_nodes(rename(record, columns)["prompt"], found), found)
    except Unusable as unusable:
        result = Rejection(row_id, unusable.reason, unusable.detail)
    return Tree(row_id, record, [record], False, result, found)


def _nested_nodes(prompt: Any, found: RowFindings) -> list[Node]:
    """Return all nodes, each after the one it replies to."""
    nodes: list[Node] = []
    waiting: list[tuple[Any, Node | None]] = [(prompt, None)]
    while waiting:
        given, parent = waiting.pop()
        node = Node(_checked(given, len(nodes) + 1), len(nodes) + 1)
        nodes.append(node)
        if parent is not None:
            parent.replies.append(node)
        replies = given.get("replies") or []
        if not isinstance(replies, list):
            raise Unusable(BAD_TREE, f"message {node.number}: replies is {type_name(replies)}")
        waiting += [(reply, node) for reply in reversed(replies)]
        found.unused += [
            (f"prompt.{key}", value)
            for key, value in given.items()
            if key not in NODE_KEYS and value is not None
        ]
    return nodes


def _flat_tree(records: list[tuple[str, Fields]], columns: Mapping[str, str] | None) -> Tree:
    found = RowFindings()
    row_id, first = records[0]
    members = [record for _, record in records]
    result: list[list[Message]] | Rejection
    try:
        result = _conversations(_flat_nodes([rename(r, columns) for r in members]), found)
    except Unusable as unusable:
        result = Rejection(row_id, unusable.reason, unusable.detail)
    return Tree(row_id, first, members, True, result, found)


def _flat_nodes(members: list[dict[str, Any]]) -> list[Node]:
    """Return all nodes, each after the one it replies to, whatever their order in the file."""
    by_id: dict[Any, Node] = {}
    for number, given in enumerate(members, start=1):
        name = given.get("message_id")
        if not isinstance(name, str | int) or name in by_id:
            told = "a second message" if isinstance(name, str | int) else "message"
            raise Unusable(BAD_TREE, f"{told} with message_id {show(name)}")
        by_id[name] = Node(_checked(given, number), number)
    roots: list[Node] = []
    for node in by_id.values():
        parent = node.given.get("parent_id")
        if parent is None or parent == "":
            roots.append(node)
        elif not isinstance(parent, str | int) or parent not in by_id:
            raise Unusable(NO_PARENT, f"message {node.number}: parent_id {show(parent)}")
        else:
            by_id[parent].replies.append(node)
    if len(roots) > 1:
        raise Unusable(TWO_ROOTS, f"messages {roots[0].number} and {roots[1].number}")
    nodes = _below(roots)
    if len(nodes) < len(by_id):
        raise Unusable(NO_PARENT, "messages that reply to one another in a circle")
    return nodes


def _checked(given: Any, number: int) -> Fields:
    if not isinstance(given, Mapping):
        raise Unusable(BAD_TREE, f"message {number}: {type_name(given)}")
    if not isinstance(given.get("text"), str) and not given.get("deleted"):
        raise Unusable(BAD_TREE, f"message {number}: text is {type_name(given.get('text'))}")
    return given


def _below(nodes: list[Node]) -> list[Node]:
    """Return these nodes and all below them, each after the one it replies to."""
    found: list[Node] = []
    waiting = list(reversed(nodes))
    while waiting:
        node = waiting.pop()
        found.append(node)
        waiting += reversed(node.replies)
    return found


# Choosing ----------------------------------------------------------------------------------------


def _conversations(nodes: list[Node], found: RowFindings) -> list[list[Message]]:
    """Return the conversations of a tree; its nodes are in the order of `_below`."""
    root = [node for node in nodes[:1] if not node.given.get("deleted")]
    for node in nodes:
        node.replies = [reply for reply in node.replies if not reply.given.get("deleted")]
    left = _notice_left_out(nodes, root, DELETED, found)
    for node in left:
        answers = [reply for reply in node.replies if reply.is_assistant]
        best = min(answers, key=_rank, default=None)
        node.replies = [r for r in node.replies if not r.is_assistant or r is best]
    left = _notice_left_out(left, root, NOT_BEST, found)
    answered: set[int] = set()
    for node in reversed(left):  # replies come after their parents
        node.replies = [reply for reply in node.replies if id(reply) in answered]
        if node.is_assistant or node.replies:
            answered.add(id(node))
    root = [node for node in root if id(node) in answered]
    left = _notice_left_out(left, root, UNANSWERED, found)
    if not left:
        raise Unusable(NO_ASSISTANT, f"a tree of {len(nodes)} messages")
    for node in left:
        turn = {"role": node.given.get("role"), "text": node.given["text"]}
        node.message = read_message(turn, node.number, KEYS, found)
    return list(_ways(root[0]))


def _notice_left_out(
    before: list[Node], root: list[Node], text: str, found: RowFindings
) -> list[Node]:
    after = _below(root)
    if len(after) < len(before):
        found.noticed.append((text, len(before) - len(after)))
    return after


def _rank(node: Node) -> tuple[bool, float]:
    """Return a sort key with the best first; a message without a rank comes last."""
    rank = decimal(node.given.get("rank"))
    if rank is None or rank != rank:  # pandas writes null as NaN
        return True, 0.0
    if isinstance(rank, bool) or not isinstance(rank, int | float):
        raise Unusable(BAD_RANK, f"message {node.number}: {show(rank)}")
    return False, rank


def _ways(root: Node) -> Iterator[list[Message]]:
    above: dict[int, Node] = {}
    trained: set[int] = set()
    for node in _below([root]):
        above |= {id(reply): node for reply in node.replies}
        if node.replies:
            continue
        way = [node]
        while (parent := above.get(id(way[-1]))) is not None:
            way.append(parent)
        yield [_message(each, trained) for each in reversed(way)]


def _message(node: Node, trained: set[int]) -> Message:
    assert node.message is not None
    if not node.is_assistant:
        return node.message
    if id(node) in trained:
        return replace(node.message, weight=0.0)
    trained.add(id(node))
    return node.message
