"""Each type of a column gives the value that it says; the nulls of a union schema are no content.

References: the datasets library for what it reads, and the JSON Lines that the files were made of.
"""

from __future__ import annotations

import datetime
import io
import json
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from datasets.table import InMemoryTable
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from torchprime.data.files.arrow.read import arrow_records
from torchprime.data.files.arrow.rows import BY_STORAGE, FILLED_IN
from torchprime.data.files.open_source import read_rows
from torchprime.data.files.readers import read_records
from torchprime.data.files.record import BEYOND_PARSER, MALFORMED_JSON, OUT_OF_RANGE, Rejection
from torchprime.data.files.source import SourceSpec
from torchprime.data.rows.read import Row, RowReading, open_rows
from torchprime.data.shared.notes import RowNotes
from torchprime.errors import DataError


def records_of(table: pa.Table, notes: RowNotes | None = None) -> list[Any]:
    """The records of a table whose chunks are its batches."""
    found = arrow_records("t", "t#", table.schema, table.to_batches(), notes)
    return [record for _, record in found]


def through_parquet(table: pa.Table, notes: RowNotes | None = None) -> list[Any]:
    out = io.BytesIO()
    pq.write_table(table, out)
    found = read_records("t.parquet", lambda: io.BytesIO(out.getvalue()), notes=notes)
    return [record for _, record in found]


def removed(notes: RowNotes) -> int:
    return notes.noticed[FILLED_IN].count if FILLED_IN in notes.noticed else 0


def typed(values: list[Any], kind: Any) -> pa.Array:
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))
    return pa.array(values, kind)


# Types ------------------------------------------------------------------------------------------

WHEN = datetime.datetime(2024, 2, 29, 13, 5, 6, 7000)
ID = UUID("12345678-1234-5678-1234-567812345678")

OBJECT = pa.struct({"x": "int8", "y": "int8"})

# An array of one value (or more), and what each is. A null is put before and behind them.
TYPES: dict[str, tuple[pa.Array, list[Any]]] = {
    "string": (typed(["é"], pa.string()), ["é"]),
    "large_string": (typed(["é"], pa.large_string()), ["é"]),
    "string_view": (typed(["é"], pa.string_view()), ["é"]),
    "binary that is text": (typed(["é".encode()], pa.binary()), ["é"]),
    "binary that is none": (typed([b"\xff\x00"], pa.binary()), [b"\xff\x00"]),
    "large_binary": (typed([b"a"], pa.large_binary()), ["a"]),
    "binary_view": (typed([b"a"], pa.binary_view()), ["a"]),
    "fixed_size_binary": (typed([b"ab"], pa.binary(2)), ["ab"]),
    "bool": (typed([True], pa.bool_()), [True]),
    "int8": (typed([-7], pa.int8()), [-7]),
    "uint64": (typed([2**64 - 1], pa.uint64()), [2**64 - 1]),
    "float16": (typed([np.float16(1.5)], pa.float16()), [1.5]),
    "float32": (typed([0.5], pa.float32()), [0.5]),
    "float64": (typed([0.1], pa.float64()), [0.1]),
    "decimal of whole numbers": (typed([Decimal(12)], pa.decimal128(20, 0)), [12]),
    "decimal": (typed([Decimal("1.50")], pa.decimal128(15, 2)), [1.5]),
    "decimal beyond a float": (
        typed([Decimal("0.1234567890123456789")], pa.decimal256(40, 19)),
        ["0.1234567890123456789"],
    ),
    "date32": (typed([WHEN.date()], pa.date32()), ["2024-02-29"]),
    "date64": (typed([WHEN.date()], pa.date64()), ["2024-02-29"]),
    "timestamp[s]": (typed([0], pa.timestamp("s")), ["1970-01-01T00:00:00"]),
    "timestamp[us]": (typed([WHEN], pa.timestamp("us")), [WHEN.isoformat()]),
    "timestamp[ns]": (
        typed([1, -1000, 10**9], pa.timestamp("ns")),
        ["1970-01-01T00:00:00.000000001", "1969-12-31T23:59:59.999999", "1970-01-01T00:00:01"],
    ),
    "timestamp[ns] of a zone": (
        typed([1_500], pa.timestamp("ns", "Europe/Berlin")),
        ["1970-01-01T01:00:00.000001500+01:00"],
    ),
    "timestamp[ms] of a zone": (
        typed([1], pa.timestamp("ms", "UTC")),
        ["1970-01-01T00:00:00.001000+00:00"],
    ),
    "time32": (typed([3_661], pa.time32("s")), ["01:01:01"]),
    "time64": (typed([1_500], pa.time64("ns")), ["00:00:00.0000015"]),
    "duration": (typed([90_000, 1], pa.duration("ms")), [90, 0.001]),
    "interval": (
        pa.array([pa.MonthDayNano([1, 2, 3])]),
        [{"months": 1, "days": 2, "nanoseconds": 3}],
    ),
    "null": (pa.nulls(1), [None]),
    "dictionary": (pa.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
    "dictionary with a null in it": (
        pa.DictionaryArray.from_arrays(pa.array([1, 0], pa.int8()), pa.array(["a", None])),
        [None, "a"],
    ),
    "dictionary of objects": (
        pa.DictionaryArray.from_arrays(
            pa.array([0, 0], pa.int8()), pa.array([{"a": 1, "b": None}, {"a": None, "b": 2}])
        ),
        [{"a": 1}, {"a": 1}],
    ),
    "run-end encoded": (
        pc.run_end_encode(  # pyright: ignore[reportAttributeAccessIssue]
            pa.array(["a", "a", None, "b"])
        ),
        ["a", "a", None, "b"],
    ),
    "json": (
        typed(['{"a": null, "b": [1, null]}', '"text"', "null", "12"], pa.json_()),
        [{"a": None, "b": [1, None]}, "text", None, 12],
    ),
    "json in a dictionary": (
        pa.DictionaryArray.from_arrays(pa.array([0], pa.int8()), typed(["[1]"], pa.json_())),
        [[1]],
    ),
    "uuid": (typed([ID.bytes], pa.uuid()), [str(ID)]),
    "bool8": (typed([1, 0], pa.bool8()), [True, False]),
    "struct": (pa.array([{"a": 1, "b": "x"}]), [{"a": 1, "b": "x"}]),
    "struct without fields": (pa.array([{}], pa.struct([])), [{}]),
    "list": (typed([["a", None], []], pa.list_(pa.string())), [["a", None], []]),
    "large_list": (typed([[1], [2, 3]], pa.large_list(pa.int8())), [[1], [2, 3]]),
    "list_view": (typed([[1], [2, 3]], pa.list_view(pa.int8())), [[1], [2, 3]]),
    "large_list_view": (typed([[1]], pa.large_list_view(pa.int8())), [[1]]),
    "fixed_size_list": (typed([[1, 2], [3, None]], pa.list_(pa.int8(), 2)), [[1, 2], [3, None]]),
    "map": (
        typed([[("a", 1), ("b", None)], []], pa.map_(pa.string(), pa.int8())),
        [{"a": 1, "b": None}, {}],
    ),
    "map of objects": (
        typed([[("a", {"x": 1, "y": None})]], pa.map_("string", OBJECT)),
        [{"a": {"x": 1}}],
    ),
    "map with keys that are objects": (
        typed([[({"x": 1}, "a")]], pa.map_(pa.struct({"x": "int8"}), "string")),
        [[{"key": {"x": 1}, "value": "a"}]],
    ),
    "sparse union": (
        pa.UnionArray.from_sparse(
            pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["a", "b"])]
        ),
        [1, "b"],
    ),
    "dense union": (
        pa.UnionArray.from_dense(
            pa.array([1, 0], pa.int8()),
            pa.array([0, 0], pa.int32()),
            [pa.array([{"a": 1, "b": None}]), pa.array(["x"])],
        ),
        ["x", {"a": 1}],
    ),
}  # fmt: skip
NOT_JOINED = ("union", "run-end", "dictionary")  # nulls of their own, or dictionaries to unify


@pytest.mark.parametrize("name", TYPES)
def test_each_type_alone_in_objects_and_in_lists(name: str) -> None:
    array, expected = TYPES[name]
    assert records_of(pa.table({"x": array})) == [{"x": value} for value in expected]

    # From the middle of a longer array, behind and before nulls.
    if not any(word in name for word in NOT_JOINED):
        nulls = pa.nulls(1, array.type)
        array = pa.concat_arrays([nulls, array, nulls])
        expected = [None, *expected, None]
    for start in range(len(array)):
        rest = pa.table({"x": array.slice(start)})
        assert records_of(rest) == [{"x": value} for value in expected[start:]]

    inside = pa.StructArray.from_arrays([array, pa.array(range(len(array)))], ["x", "n"])
    spoken = name.startswith("json")
    present = array.is_valid().to_pylist()
    objects = [
        {"x": value, "n": n} if value is not None or (spoken and present[n]) else {"n": n}
        for n, value in enumerate(expected)
    ]
    assert records_of(pa.table({"o": inside})) == [{"o": value} for value in objects]

    offsets = pa.array([0, 0, len(array)], pa.int32())
    lists = pa.ListArray.from_arrays(offsets, array)
    assert records_of(pa.table({"l": lists})) == [{"l": []}, {"l": expected}]
    assert records_of(pa.table({"l": lists.slice(1)})) == [{"l": expected}]


NOT_IN_PARQUET = ("interval", "struct without fields", "dictionary with a null in it")
NOT_WRITTEN = ("union", "run-end", "view", "dictionary of", "in a dictionary")


@pytest.mark.parametrize(
    "name",
    [n for n in TYPES if n not in NOT_IN_PARQUET and not any(word in n for word in NOT_WRITTEN)],
)
def test_each_type_through_parquet(name: str) -> None:
    array, expected = TYPES[name]
    assert through_parquet(pa.table({"x": array})) == [{"x": value} for value in expected]


def test_types_that_datasets_reads_are_as_it_reads_them() -> None:
    """All that JSON has a value for; what it has none for (dates, decimals) is ours to write."""
    names = ("string", "large_string", "bool", "int8", "uint64", "float32", "float64", "null")
    nested = ("json", "struct", "list", "large_list", "fixed_size_list", "float16")
    for name in (*names, *nested):
        array, expected = TYPES[name]
        table = pa.table({"x": array})
        assert datasets.Dataset(InMemoryTable(table))["x"][:] == expected, name


def test_an_extension_that_is_not_known_is_read_as_stored_and_said() -> None:
    kind = pa.opaque(pa.int64(), "money", "a bank")
    notes = RowNotes()
    assert records_of(pa.table({"x": typed([1, None], kind)}), notes) == [{"x": 1}, {"x": None}]
    assert notes.noticed[BY_STORAGE].count == 2
    assert "x (arrow.opaque)" in notes.noticed[BY_STORAGE].example
    # One that this version of Arrow does not have is only a note on the field.
    field = pa.field("x", pa.string(), metadata={"ARROW:extension:name": "arrow.json"})
    table = pa.table([pa.array(['{"a": 1}'])], pa.schema([field]))
    assert records_of(table) == [{"x": {"a": 1}}]


def test_features_of_datasets_that_hold_more_than_json() -> None:
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "grid": datasets.Array2D((2, 2), "int32"),
            "label": datasets.ClassLabel(names=["no", "yes"]),
        }
    )
    row = {"image": {"bytes": b"\x89PNG\xff", "path": None}, "grid": [[1, 2], [3, 4]], "label": 1}
    data = datasets.Dataset.from_list([row], features=features)
    (found,) = records_of(data.data.table)
    assert found == {**row, "image": {"bytes": b"\x89PNG\xff"}}


# Nulls ------------------------------------------------------------------------------------------


def test_filled_in_nulls_go_and_are_counted_per_row() -> None:
    rows = [
        {"a": None, "m": [{"x": 1}, {"y": {"p": "1"}}, None]},
        {"a": "b", "m": [{"x": 2, "y": {"p": "1", "q": "2"}}]},
        {"a": "c", "m": None},
        {"a": "c", "m": []},
        {"a": "c", "m": [{}]},
    ]
    notes = RowNotes()
    assert records_of(pa.Table.from_pylist(rows), notes) == rows
    # 1: y of the first; x of the second and q in its y. 5: both.
    assert removed(notes) == 5
    assert notes.noticed[FILLED_IN].row_id == "t#1"


def test_a_null_that_json_says_is_content() -> None:
    kind = pa.struct([("said", pa.json_()), ("other", pa.string())])
    storage = pa.struct([("said", pa.string()), ("other", pa.string())])
    values = [{"said": "null", "other": None}, {"said": None, "other": "x"}]
    plain = pa.array(values, storage)
    said = typed(["null", None], pa.json_())
    table = pa.table({"o": pa.StructArray.from_arrays([said, plain.field(1)], fields=list(kind))})
    notes = RowNotes()
    expected = [{"o": {"said": None}}, {"o": {"other": "x"}}]
    assert records_of(table, notes) == expected
    assert removed(notes) == 2
    assert through_parquet(table) == expected


def test_what_lies_under_a_null_object_is_not_looked_at() -> None:
    """A mask leaves what the children hold: here JSON that is none."""
    child = typed(["[", "[1]"], pa.json_())
    masked = pa.StructArray.from_arrays([child], ["j"], mask=pa.array([True, False]))
    assert records_of(pa.table({"o": masked})) == [{"o": None}, {"o": {"j": [1]}}]


@pytest.fixture
def null_union(shared_dir: Path) -> Path:
    return shared_dir / "cases/data/null_union"


def test_a_union_schema_gives_the_rows_it_was_made_of(null_union: Path, tmp_path: Path) -> None:
    expected = [json.loads(line) for line in (null_union / "rows.jsonl").read_text().splitlines()]
    notes = RowNotes()
    source = SourceSpec(file_dataset_path=str(null_union / "rows.parquet"))
    assert [record for _, record in read_rows(source, notes=notes)] == expected
    stored = json.dumps(pq.read_table(null_union / "rows.parquet").to_pylist())
    assert removed(notes) == stored.count("null") > 0

    # Through the library, from the Parquet file and from the lines, for which it has JSON types.
    for name in ("rows.parquet", "rows.jsonl"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes((null_union / name).read_bytes())
        notes = RowNotes()
        source = SourceSpec(hf_dataset_name=str(folder), cache_dir=str(tmp_path / "cache"))
        assert [record for _, record in read_rows(source, notes=notes)] == expected
        assert removed(notes) == (stored.count("null") if name == "rows.parquet" else 0)


# Objects of lists -------------------------------------------------------------------------------


def test_the_librarys_sequence_of_objects_is_a_list_of_objects() -> None:
    """As it writes one under `messages`; a column of another kind stays as it reads it."""
    strings = datasets.Value("string")
    turn = {"role": strings, "content": strings, "name": strings}
    features = datasets.Features(
        {"messages": datasets.Sequence(turn), "answers": datasets.Sequence({"text": strings})}
    )
    turns = {"role": ["user", "assistant"], "content": ["a", None], "name": [None, "B"]}
    rows = [
        {"messages": turns, "answers": {"text": ["x"]}},
        {"messages": {key: [] for key in turn}, "answers": {"text": []}},
    ]
    data = datasets.Dataset.from_list(rows, features=features)
    notes = RowNotes()
    found = through_parquet(data.data.table, notes)
    read = [{"role": "user", "content": "a"}, {"role": "assistant", "name": "B"}]
    assert [row["messages"] for row in found] == [read, []]
    assert [row["answers"] for row in found] == list(data["answers"])
    assert removed(notes) == 2


def test_objects_of_lists_elsewhere() -> None:
    pairs = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    lists = {"from": ["human", "gpt"], "value": ["a", "b"]}
    calls = [{"id": "1", "function": "f"}]
    rows = [
        {"chat": lists},  # by its keys, whatever its name
        {"conversations": {"who": ["x"], "text": ["y"]}},  # by its name, whatever its keys
        {"messages": [{"role": "assistant", "tool_calls": {"id": ["1"], "function": ["f"]}}]},
        {"messages": {"role": ["user"], "content": ["a", "b"]}},  # not one list of anything
        {"arguments": {"messages": lists}},  # an object that somebody meant
    ]
    expected = [
        {"chat": pairs},
        {"conversations": [{"who": "x", "text": "y"}]},
        {"messages": [{"role": "assistant", "tool_calls": calls}]},
        *rows[3:],
    ]
    assert [records_of(pa.Table.from_pylist([row])) for row in rows] == [[row] for row in expected]


# Values that cannot be read ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "kind", "good", "reason", "detail"),
    [
        ("{", pa.json_(), "1", MALFORMED_JSON, "column x: Expecting property name"),
        ("9" * 5000, pa.json_(), "1", BEYOND_PARSER, "column x: Exceeds the limit"),
        ("[" * 10**5, pa.json_(), "1", BEYOND_PARSER, "column x: maximum recursion depth"),
        (2**62, pa.timestamp("s"), 0, OUT_OF_RANGE, "column x: "),
        (0, pa.timestamp("s", "No/Where"), None, OUT_OF_RANGE, "column x: "),
    ],
)
def test_a_value_that_cannot_be_read_costs_its_row(
    bad: Any, kind: Any, good: Any, reason: str, detail: str
) -> None:
    table = pa.table({"y": [{"a": 1}, {"b": 2}, {}], "x": typed([good, bad, None], kind)})
    notes = RowNotes()
    first, second, third = records_of(table, notes)
    assert isinstance(second, Rejection)
    assert (second.row_id, second.reason) == ("t#2", reason)
    assert second.detail.startswith(detail)
    assert (first["y"], third) == ({"a": 1}, {"y": {}, "x": None})
    assert removed(notes) == 3


def test_two_of_the_same_name() -> None:
    twice = pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], ["a", "a"])
    for table, what in (
        (pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]), "columns"),
        (pa.table({"o": twice}), "fields of o"),
    ):
        with pytest.raises(DataError, match=f"t: two {what} have the same name: 'a'"):
            records_of(table)


def test_content_that_is_null_is_content_that_is_not_there(tmp_path: Path) -> None:
    """An assistant's turn that only calls tools, as lines say it and as a union schema does."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    other = {"type": "function", "function": {"name": "g", "arguments": {"y": "2"}}}
    rows = [
        {
            "messages": [
                {"role": "user", "content": "go"},
                {"role": "assistant", "content": None, "tool_calls": [each]},
                {"role": "tool", "content": "done", "name": "f"},
                {"role": "assistant", "content": "ok"},
            ]
        }
        for each in (call, other)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    lines, stored = (
        list(open_rows(SourceSpec(file_dataset_path=str(tmp_path / name)), RowReading())[1])
        for name in ("rows.jsonl", "rows.parquet")
    )
    assert all(isinstance(row, Row) for row in lines)
    assert [row.messages for row in stored] == [row.messages for row in lines]  # type: ignore[union-attr]


# JSON-typed columns -----------------------------------------------------------------------------


def test_json_typed_columns_are_as_datasets_reads_them(shared_dir: Path, tmp_path: Path) -> None:
    path = shared_dir / "cases/data/json_type/mixed_from_load.parquet"
    expected = datasets.load_dataset(
        "parquet", data_files=str(path), split="train", cache_dir=str(tmp_path)
    ).to_list()
    found = [record for _, record in read_rows(SourceSpec(file_dataset_path=str(path)))]
    assert found == expected
    assert isinstance(found[0], dict)
    assert isinstance(found[0]["messages"][0]["content"], list)


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.sampled_from([0.5, -2.25, 1e9]),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5),
)
JSON_VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from("abc"), inner, max_size=3)
    ),
    max_leaves=6,
)

JSON_ROWS = st.dictionaries(st.sampled_from(["p", "q", "r"]), JSON_VALUES, min_size=1)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["p", "q", "r"]), JSON_VALUES, min_size=1),
        min_size=1,
        max_size=4,
    )
)
def test_json_like_rows_that_datasets_wrote_are_as_it_reads_them(
    rows: list[dict[str, Any]],
) -> None:
    """Random rows: mixed types become its JSON type, others a union schema."""
    try:
        data = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    except (pa.ArrowException, ValueError, TypeError, KeyError, AttributeError, OverflowError):
        reject()  # it cannot write them
    out = io.BytesIO()
    data.to_parquet(out)
    found = read_records("t.parquet", lambda: io.BytesIO(out.getvalue()))
    expected = [_without_filled_in(row, data.features) for row in data]
    assert [record for _, record in found] == expected


def _without_filled_in(value: Any, feature: Any, column: bool = True) -> Any:
    """The naive way: values as the library gives them, along its own features."""
    if isinstance(feature, dict) and isinstance(value, dict):
        kept = {k: _without_filled_in(v, feature[k], False) for k, v in value.items()}
        return kept if column else {k: v for k, v in kept.items() if v is not None}
    if isinstance(feature, datasets.List) and isinstance(value, list):
        return [_without_filled_in(item, feature.feature, False) for item in value]
    return value
