"""The structure of a conversation: everything that a chat template can base a decision on.

Comparing a server's input for a turn with the whole text costs a rendering for each turn. But a
template decides by less than the contents that it writes: roles, keys, neighbours, the last
question, and constant texts that it looks for. Turns that are alike in these begin at the same
places, so one comparison covers them all. The source shows the constants. If a template decides by
anything else (the length of a content, two contents compared), there is no structure and each turn
is compared separately.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import nodes

from torchprime.data.templates.source import tree_of, variables_of

STRING_METHODS = frozenset(
    ("startswith", "endswith", "split", "rsplit", "strip", "lstrip", "rstrip", "replace")
)
OTHER_METHODS = frozenset(("get", "items", "keys", "values", "append", "update"))
FILTERS = frozenset(
    ("trim", "tojson", "string", "list", "first", "last", "reverse", "join", "map", "items")
    + ("selectattr", "rejectattr", "default", "d", "safe", "upper", "lower", "indent", "dictsort")
    + ("replace", "capitalize", "title", "int", "select", "reject")
)
LENGTHS = frozenset(("length", "count"))
TESTS = frozenset(
    ("defined", "undefined", "none", "string", "mapping", "iterable", "sequence", "boolean")
    + ("number", "integer", "true", "false", "in", "eq", "equalto", "ne", "odd", "even", "sameas")
)
# Lists whose lengths and slices are part of the structure.
LISTS = frozenset(("messages", "tools", "tool_calls", "documents"))
IDS = frozenset(("id", "tool_call_id"))  # some templates require nine characters


class Structure:
    """The kinds of a conversation's messages, for one template.

    Attributes:
        kinds: for each message, everything by which the template can distinguish it.
    """

    def __init__(
        self,
        pattern: re.Pattern[str],
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
    ) -> None:
        self.kinds = [_features(message, pattern) for message in messages]
        self.tools = bool(tools)
        self._users = [i for i, message in enumerate(messages) if message.get("role") == "user"]
        self._questions = [
            i for i in self._users if not pattern.search(str(messages[i].get("content")))
        ]

    def before(self, turn: int) -> Hashable:
        """Return a key for the messages before a turn.

        It has every pattern of neighbours among them, and the side of the last question on which
        each stands: in the whole conversation, and in the part that a server has seen by then.
        """
        kinds, seen = [None, *self.kinds, None], set()
        last = [max(i, default=-1) for i in (self._users, self._questions)]
        last += [
            max((i for i in found if i < turn), default=-1)
            for found in (self._users, self._questions)
        ]
        for i in range(turn):
            sides = tuple((i > each) - (i < each) for each in last)
            seen.add((kinds[i], kinds[i + 1], kinds[i + 2], i == turn - 1, sides))
        return self.tools, self.kinds[turn], turn == len(self.kinds) - 1, frozenset(seen)


def structure_of(
    text: str, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> Structure | None:
    """Return the structure of a conversation; None if this template may decide by more.

    Args:
        text: the template's source.
    """
    pattern = _looked_for(text)
    return None if pattern is None else Structure(pattern, messages, tools)


# Written, never inspected.
OPAQUE = frozenset(("arguments", "parameters", "name"))


def _features(value: Any, pattern: re.Pattern[str], key: str = "") -> Hashable:
    """Return a value's constants and empty parts, by which a template can distinguish it."""
    if key == "role":
        return value
    if isinstance(value, str):
        if key in IDS:
            return len(value)
        pieces = pattern.split(value)
        return tuple(p if i % 2 else _outline(p) for i, p in enumerate(pieces))
    if key in OPAQUE:
        return type(value), bool(value)
    if isinstance(value, Mapping):
        return tuple((name, _features(item, pattern, name)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(_features(item, pattern) for item in value)
    return value if value is None or isinstance(value, bool) else type(value)


def _outline(piece: str) -> tuple[bool, bool, bool]:
    """Return (is not empty, begins with white space, ends with white space)."""
    return bool(piece), piece[:1].isspace(), piece[-1:].isspace()


# Keys that a template tests for -------------------------------------------------------------------


@lru_cache(maxsize=32)
def _looked_for(text: str) -> re.Pattern[str] | None:
    """Return a pattern of the constants in a template's decisions; None for other decisions."""
    tree = tree_of(text)
    lists = LISTS | _aliases(tree)
    objects = {
        loop.target.name
        for loop in tree.find_all(nodes.For)
        if isinstance(loop.target, nodes.Name) and _name(_inner(loop.iter)) in lists
    }
    options = variables_of(text) - lists
    constants: set[str] = set()
    for node in _all(tree):
        if not _is_known(node, lists, options):
            return None
        constants |= _constants(node, objects)
    longest_first = sorted(constants - {""}, key=lambda c: (-len(c), c))
    return (
        re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else NONE
    )


NONE = re.compile("((?!))")  # matches nowhere


def _all(tree: nodes.Node) -> Iterator[nodes.Node]:
    yield tree
    for child in tree.iter_child_nodes():
        yield from _all(child)


def _aliases(tree: nodes.Node) -> set[str]:
    """Return names that a template assigns to the messages or to a part of them."""
    found = set()
    for node in tree.find_all(nodes.Assign):
        if isinstance(node.target, nodes.Name) and _name(_inner(node.node)) in LISTS:
            found.add(node.target.name)
    return found


def _inner(node: nodes.Node) -> nodes.Node:
    """Return a list expression without the filters and slices around it."""
    while isinstance(node, nodes.Filter) or (
        isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
    ):
        if node.node is None:
            break
        node = node.node
    return node


def _is_known(node: nodes.Node, lists: frozenset[str], options: frozenset[str]) -> bool:
    if isinstance(node, nodes.Filter):
        return node.name in FILTERS or (node.name in LENGTHS and _name(node.node) in lists | IDS)
    if isinstance(node, nodes.Test):
        return node.name in TESTS
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        written = isinstance(node.node, nodes.Filter) and node.node.name == "tojson"
        return written or _name(node.node) in lists
    if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        return node.node.attr in STRING_METHODS | OTHER_METHODS
    if isinstance(node, nodes.Compare):
        return any(_is_plain(each, options) for each in (node.expr, *(o.expr for o in node.ops)))
    return not isinstance(node, nodes.CallBlock | nodes.Include | nodes.Import) or _is_mark(node)


def _is_plain(node: nodes.Node, options: frozenset[str]) -> bool:
    """Return True for a constant, a choice or list of them, a number counted here, or an option."""
    if isinstance(node, nodes.CondExpr):
        choices = [node.expr1, *([node.expr2] if node.expr2 is not None else [])]
        return all(_is_plain(each, options) for each in choices)
    if isinstance(node, nodes.List | nodes.Tuple):
        return all(_is_plain(item, options) for item in node.items)
    if isinstance(node, nodes.Getattr) and isinstance(node.node, nodes.Name):
        return node.node.name in ("loop", "ns", "namespace")
    if isinstance(node, nodes.Name):
        return node.name in options
    return isinstance(node, nodes.Const | nodes.BinExpr | nodes.UnaryExpr | nodes.Compare)


def _is_mark(node: nodes.Node) -> bool:
    return isinstance(node, nodes.CallBlock) and "_generation_support" in repr(node.call)


def _name(node: nodes.Node | None) -> str:
    """Return the last name in `messages`, `message.tool_calls` or `message['tool_calls']`."""
    if isinstance(node, nodes.Name):
        return node.name
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return str(node.arg.value)
    return ""


def _constants(node: nodes.Node, objects: set[str]) -> set[str]:
    """Yield texts that a node compares with, looks for or splits at, but no names of roles or keys.

    Args:
        objects: names of messages, in which a template looks up keys.
    """
    if isinstance(node, nodes.Compare):
        given = [node.expr, *(operand.expr for operand in node.ops)]
        if any(_name(each) == "role" or _name(each) in objects for each in given):
            return set()
    elif isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr):
        given = list(node.args) if node.node.attr in STRING_METHODS else []
    elif isinstance(node, nodes.Filter | nodes.Test):
        given = list(node.args)
    else:
        return set()
    consts = (c for each in given for c in (each, *each.find_all(nodes.Const)))
    return {c.value for c in consts if isinstance(c, nodes.Const) and isinstance(c.value, str)}
