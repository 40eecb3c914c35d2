"""JSON and JSON Schema: the whole output is the document, and no schema reaches out."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchprime.errors import DataError
from torchprime.evaluation import json_grading
from torchprime.evaluation.graders import Sample, make_grader

Grade = Callable[..., float | None]
Make = Callable[..., Sample]
Refused = Callable[..., str]
FENCE = "```"

# json ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "output",
    [
        '{"a": 1}',
        ' \n{"a": [1, 2.5e3, null, true, "\\u00e9"]}\n',
        "[]",
        "null",
        "0",
        '"text"',
        "1" * 5000,  # Python's own reading of whole numbers ends at 4300 digits
        "1e999",
    ],
)
def test_json(grade: Grade, output: str) -> None:
    assert grade("json", output) == 1.0


@pytest.mark.parametrize(
    "output",
    [
        "",
        " ",
        "text",
        "{'a': 1}",
        '{"a": 1,}',
        '{"a": 1',
        '{"a": 1} {"b": 2}',
        'Here: {"a": 1}',
        '{"a": 1} // so',
        "NaN",
        "[Infinity]",
        "[-Infinity]",
        "01",
        "+1",
        ".5",
        '"a\nb"',
        "True",
        "[" * 100_000,
        "[" * 100_000 + "]" * 100_000,
        f'{FENCE}json\n{{"a": 1}}\n{FENCE}',
    ],
)
def test_no_json(grade: Grade, output: str) -> None:
    assert grade("json", output) == 0.0


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    ),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
)  # fmt: skip
def test_what_is_written_as_json_is_json(value: Any, indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    assert make_grader("json")(Sample("r:1", "", f" {text}\n", "", True, 1)) == 1.0


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (f'{FENCE}json\n{{"a": 1}}\n{FENCE}', 1.0),
        (f'\n{FENCE}\n{{\n  "a": 1\n}}\n{FENCE}\n', 1.0),
        (f'{FENCE}json\r\n{{"a": 1}}\r\n{FENCE}', 1.0),
        (json.dumps({"a": f"{FENCE}\n"}), 1.0),
        ('{"a": 1}', 1.0),
        (f'Here:\n{FENCE}json\n{{"a": 1}}\n{FENCE}', 0.0),
        (f'{FENCE}json\n{{"a": 1}}\n{FENCE}\nThere.', 0.0),
        (f"{FENCE}json\n[1]\n{FENCE}\n{FENCE}json\n[1]\n{FENCE}", 0.0),
        (f'{FENCE}json\n{{"a": 1}}', 0.0),
        (f"{FENCE}yaml\n[1]\n{FENCE}", 0.0),
        (f"{FENCE}json\n\n{FENCE}", 0.0),
    ],
)
def test_json_in_a_fence(grade: Grade, output: str, expected: float) -> None:
    assert grade("json", output, fenced=True) == expected
    assert grade("json_schema", output, schema={}, fenced=True) == expected


# json_schema --------------------------------------------------------------------------------------

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"$ref": "#/$defs/age"}},
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"age": {"type": "integer", "minimum": 0}},
}


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ('{"name": "Ann", "age": 7}', 1.0),
        ('{"name": "Ann", "age": 7.0}', 1.0),
        ('{"name": "Ann"}', 1.0),
        ('{"name": "Ann", "age": -7}', 0.0),
        ('{"name": "Ann", "age": "7"}', 0.0),
        ('{"name": "Ann", "size": 7}', 0.0),
        ('{"age": 7}', 0.0),
        ("[]", 0.0),
        ("null", 0.0),
        ('{"name": "Ann"', 0.0),
        ("", 0.0),
    ],
)
def test_json_schema(grade: Grade, tmp_path: Path, output: str, expected: float) -> None:
    assert grade("json_schema", output, schema=PERSON) == expected
    file = tmp_path / "person.json"
    file.write_text(json.dumps(PERSON))
    assert grade("json_schema", output, schema=str(file)) == expected


def test_a_document_may_be_null(grade: Grade) -> None:
    assert grade("json_schema", "null", schema={"type": "null"}) == 1.0


def test_patterns_are_searched_for(grade: Grade) -> None:
    schema = {"pattern": "^[A-Z]+$"}
    assert [grade("json_schema", text, schema=schema) for text in ('"AB"', '"Ab"', "3")] == [
        1.0, 0.0, 1.0,
    ]  # fmt: skip


def test_the_draft_is_the_one_it_names_else_2020_12(grade: Grade) -> None:
    """`prefixItems` is 2020-12's; draft 7 had another meaning for a list of `items`."""
    new = {"prefixItems": [{"type": "integer"}]}
    old = {"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"type": "integer"}]}
    assert grade("json_schema", '["a"]', schema=new) == 0.0
    assert grade("json_schema", '["a"]', schema={**new, "$schema": old["$schema"]}) == 1.0
    assert grade("json_schema", '["a"]', schema=old) == 0.0


def test_a_number_beyond_every_float_is_a_multiple_of_nothing(grade: Grade) -> None:
    assert grade("json_schema", "1e999", schema={"multipleOf": 0.01}) == 0.0


def test_a_schema_of_schemas_needs_no_network(grade: Grade) -> None:
    schema = {"$ref": "https://json-schema.org/draft/2020-12/schema"}
    assert grade("json_schema", '{"type": "object"}', schema=schema) == 1.0
    assert grade("json_schema", '{"type": "objekt"}', schema=schema) == 0.0


@pytest.mark.parametrize(
    ("schema", "place"),
    [
        ({"type": "objekt"}, "'objekt' at $.type"),
        ({"properties": {"a": {"minimum": "0"}}}, "'0' at $.properties.a.minimum"),
        ({"pattern": "a(b"}, "'a(b' at $.pattern"),
        ({"required": "a"}, "'a' at $.required"),
    ],
)
def test_a_schema_that_is_none_says_where(refused: Refused, schema: dict, place: str) -> None:
    message = refused("json_schema", schema=schema)
    assert message.startswith(
        f"eval.graders[1].schema: given {place}, expected a JSON Schema of "
        "https://json-schema.org/draft/2020-12/schema: "
    )
    assert message.endswith("Correct it there.")


@pytest.mark.parametrize("given", [[1], 3, None, True])
def test_a_schema_of_another_type(refused: Refused, given: object) -> None:
    message = refused("json_schema", schema=given)
    assert message.startswith("eval.graders[1].schema: given ")
    assert "expected a mapping, or the path of a file with one" in message
    assert "such as {type: object}" in message


@pytest.mark.parametrize("given", ["http://example.com/draft", [1]])
def test_an_unknown_draft(refused: Refused, given: object) -> None:
    message = refused("json_schema", schema={"$schema": given})
    assert message.startswith(f"eval.graders[1].schema.$schema: given {given!r}, expected one of ")
    assert "http://json-schema.org/draft-07/schema" in message
    assert message.endswith("Leave it out for 2020-12.")


def test_a_file_that_is_missing_or_no_json(refused: Refused, tmp_path: Path) -> None:
    missing, broken = tmp_path / "missing.json", tmp_path / "broken.json"
    broken.write_text("{")
    for file, problem, fix in (
        (missing, "No such file or directory", "Correct the path"),
        (tmp_path, "Is a directory", "Correct the path"),
        (broken, "a file with JSON, but Expecting property name", "Correct the file there."),
    ):
        message = refused("json_schema", schema=str(file))
        assert message.startswith(f"eval.graders[1].schema: given {str(file)!r}, expected ")
        assert problem in message and fix in message


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "https://example.com/schema.json"},
        {"properties": {"a": {"items": {"$ref": "other.json#/b"}}}},
        {"$dynamicRef": "https://example.com/schema.json"},
        {"$ref": "#/$defs/missing"},
        {"$ref": "#/x/y", "x": {"y": {"$ref": "file:///etc/hosts"}}},
        {"$id": "https://example.com/a/", "anyOf": [{"$ref": "b"}]},
        {"$schema": "http://json-schema.org/draft-07/schema#", "$ref": "#/definitions/missing"},
    ],
)
def test_a_reference_to_elsewhere_is_refused_and_nothing_fetched(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, schema: dict
) -> None:
    def fetched(*_: object, **__: object) -> None:
        raise AssertionError("a schema was fetched")

    monkeypatch.setattr(urllib.request, "urlopen", fetched)
    message = refused("json_schema", schema=schema)
    assert message.startswith(("eval.graders[1].schema ($ref)", "eval.graders[1].schema ($dyn"))
    assert "expected a reference into the schema itself" in message
    assert "write '#/$defs/NAME'" in message


def test_references_inside_are_followed(grade: Grade) -> None:
    tree = {
        "$id": "https://example.com/tree",
        "type": "object",
        "properties": {"left": {"$ref": "#"}, "right": {"$ref": "/tree"}, "size": {"$ref": "#s"}},
        "additionalProperties": False,
        "$defs": {"s": {"$anchor": "s", "type": "integer"}},
    }
    assert grade("json_schema", '{"left": {"right": {"size": 1}}}', schema=tree) == 1.0
    assert grade("json_schema", '{"left": {"right": {"size": "1"}}}', schema=tree) == 0.0


def test_a_schema_that_never_ends_names_the_row(sample: Make) -> None:
    grader = make_grader("json_schema", key="eval.graders[1]", schema={"$ref": "#"})
    with pytest.raises(DataError) as error:
        grader(sample("{}"))
    message = str(error.value)
    assert message.startswith(
        "eval.graders[1].schema: checking the output of row rows.jsonl:7 (2 characters) ended in "
        "RecursionError, expected a schema that can be checked to the end."
    )
    assert "$ref that leads to itself" in message


def test_a_pattern_without_an_end_is_stopped(sample: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_grading, "PATTERN_SECONDS", 0.05)
    schema = {"items": {"pattern": "^(a|aa)+$"}}
    grader = make_grader("json_schema", key="eval.graders[1]", schema=schema)
    assert grader(sample('["aaa"]')) == 1.0
    with pytest.raises(DataError, match="row rows.jsonl:7 .* ended in TimeoutError"):
        grader(sample(json.dumps(["a" * 999 + "b"])))
