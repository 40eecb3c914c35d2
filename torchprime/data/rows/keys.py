"""Unread keys of records (law 9: each key is used, or named in the report).

Most records of one source have the same keys, so the result is computed once for each set of keys.
If a dotted column reaches into an object, only the named key is used: with
`dataset.columns={answer: meta.solution}` a record's `meta.source` is reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torchprime.data.rows.formats import FIELDS
from torchprime.data.rows.row import Row, RowReading

# The forms a record can take: its fields besides those that its kind needs.
PLAIN, CHAT, FLAT_TREE = "plain", "chat", "flat tree"
OF_ALL = ("system", "history", "weight")
OF_SHAPE = {
    PLAIN: OF_ALL,
    CHAT: (*OF_ALL, "tools", "functions", "only_last", "mask"),
    FLAT_TREE: ("message_id", "parent_id", "text", "role", "rank", "deleted", "weight"),
}
OF_KIND = {"alpaca": ("input",), "preference": ("prompt",), "tree": ("prompt",)}
MOST_PLANS = 1000

# A column that looks like input has long texts, mostly different ones.
LONG, DISTINCT, FILLED, FEWEST = 40, 0.8, 0.5, 2

Inside = dict[str, "Inside"]  # the parts of dotted paths as a tree; {} is the end of a path


class Unread(NamedTuple):
    """A key that is not read, or an object of which only some keys are read."""

    path: str
    key: str
    inside: Inside | None  # the keys that are read, by the next part of their path


class RecordKeys:
    """A finder of the unread keys in a source's records."""

    def __init__(self, kind: str, reading: RowReading) -> None:
        self._columns = dict(reading.columns or {})
        keys = (reading.id_key, reading.group_key, reading.time_key, reading.weight_key)
        self._keys = [key for key in keys if key]
        needed = FIELDS[kind]
        self._fields = {
            shape: (*needed, *OF_KIND.get(kind, ()), *fields) for shape, fields in OF_SHAPE.items()
        }
        self._fields[FLAT_TREE] = (*needed, *OF_SHAPE[FLAT_TREE])
        self._plans: dict[tuple[str, tuple[str, ...]], tuple[Unread, ...]] = {}

    def unused(self, record: Mapping[str, Any], shape: str) -> Sequence[tuple[str, Any]]:
        """Return (path, value) of the non-null values that this `shape` does not read."""
        names = tuple(record)
        plan = self._plans.get((shape, names))
        if plan is None:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            plan = self._plans[shape, names] = tuple(self._plan(names, shape))
        if not plan:
            return ()
        return [pair for unread in plan for pair in _values(record, unread)]

    def _plan(self, names: tuple[str, ...], shape: str) -> Iterator[Unread]:
        used: set[str] = set()
        inside: Inside = {}
        for path in self._paths(shape):
            if path in names:
                used.add(path)
            elif "." in path:
                place = inside
                for part in path.split("."):
                    place = place.setdefault(part, {})
        for name in names:
            if name not in used:
                yield Unread(name, name, inside.get(name))

    def _paths(self, shape: str) -> Iterator[str]:
        """Return the columns that are read, dotted or not; mapped fields are read there only."""
        taken = set(self._columns.values())
        for name in self._fields[shape]:
            if name in self._columns:
                yield self._columns[name]
            elif name not in taken:
                yield name
        yield from self._keys


def _values(record: Mapping[str, Any], unread: Unread) -> Iterator[tuple[str, Any]]:
    value = record[unread.key]
    if value is None:
        return
    if not unread.inside or not isinstance(value, Mapping):
        yield unread.path, value
        return
    for key in value:
        deeper = unread.inside.get(key)
        if deeper is None or deeper:  # an empty one is the end of a path: all of it is read
            yield from _values(value, Unread(f"{unread.path}.{key}", key, deeper))


# Columns that are left out -----------------------------------------------------------------------


class Unused(NamedTuple):
    """The values of an unread column, each with the text of its row."""

    values: list[Any]
    rows: list[str]

    def looks_like_input(self, count: int) -> bool:
        """Return True if most of `count` rows have a long text here that looks like input.

        Such texts are mostly different ones, and are not part of the row's own text.
        """
        pairs = [pair for pair in zip(*self, strict=True) if _is_prose(pair[0])]
        if len(pairs) < max(FEWEST, FILLED * count):
            return False
        texts = [text for text, _ in pairs]
        if sum(map(len, texts)) < LONG * len(texts) or len(set(texts)) < DISTINCT * len(texts):
            return False
        return sum(text.strip() in row for text, row in pairs) < FILLED * len(pairs)


def _is_prose(value: Any) -> bool:
    """Return True for words, False for a hash or an address."""
    return isinstance(value, str) and (len(value.split()) > 1 or not value.isascii())


def unused_columns(
    sample: Iterable[tuple[Mapping[str, Any], Row | None]], keys: RecordKeys
) -> dict[str, Unused]:
    """Return the unread columns of these records, by path.

    Args:
        sample: records with their rows; a record of a tree has no row of its own.
    """
    columns: dict[str, Unused] = {}
    for record, row in sample:
        shape = (CHAT if row.messages else PLAIN) if row else shape_of_tree(record)
        said = "" if row is None else _said(row)
        for path, value in keys.unused(record, shape):
            found = columns.setdefault(path, Unused([], []))
            found.values.append(value)
            found.rows.append(said)
    return columns


def shape_of_tree(record: Mapping[str, Any]) -> str:
    """Return the shape of a whole tree's record, or of one message's."""
    return CHAT if isinstance(record.get("prompt"), Mapping) else FLAT_TREE


def _said(row: Row) -> str:
    return "\n".join([row.prompt, row.completion, *(message.content for message in row.messages)])
