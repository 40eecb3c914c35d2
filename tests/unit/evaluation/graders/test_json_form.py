"""JSON and JSON Schema: the whole output is the document, and no schema reaches out."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema.validators import Draft201909Validator, Draft202012Validator

from torchprime.errors import DataError
from torchprime.evaluation.graders import json_form as json_grading
from torchprime.evaluation.graders.make import Sample, make_grader
from torchprime.evaluation.graders.schemas import check as json_schemas
from torchprime.evaluation.graders.schemas import decimals as json_numbers

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


def test_every_price_is_a_multiple_of_a_cent(sample: Make) -> None:
    """With floats, 1,363 of these are none."""
    for schema in ({"multipleOf": 0.01}, {"multipleOf": 1e-2}, {"multipleOf": 0.0025}):
        grader = make_grader("json_schema", schema=schema)
        wrong = [n for n in range(1, 10_000) if grader(sample(f"{n // 100}.{n % 100:02d}")) != 1.0]
        assert not wrong
    grader = make_grader("json_schema", schema={"multipleOf": 0.01})
    assert not any(grader(sample(f"{n // 100}.{n % 100:02d}1")) for n in range(1, 1000))


@pytest.mark.parametrize(
    ("number", "of", "expected"),
    [
        ("1e999", 0.01, 1.0),  # infinite as a float
        ("1e-999", 0.01, 0.0),
        ("1e999999999999", 3, 0.0),
        ("3e999999999999", 3, 1.0),
        ("3e-999999999999", 3, 0.0),
        ("1e99999999999999999999", 0.01, 0.0),  # no computer holds it
        ("0e99999999999999999999", 0.01, 1.0),
        ("0", 0.01, 1.0),
        ("-0.0", 3, 1.0),
        ("-0.07", 0.01, 1.0),
        ("0.30000000000000004", 0.1, 0.0),
        ("4.35", 0.05, 1.0),
        ("7", 0.1, 1.0),
        ("1" * 5000, 1, 1.0),
        ("1" * 5000 + "2", 3, 0.0),
        ("true", 1, 1.0),  # no number, so it is not looked at
    ],
)
def test_multiples_are_exact(grade: Grade, number: str, of: float, expected: float) -> None:
    assert grade("json_schema", number, schema={"multipleOf": of}) == expected


@given(st.integers(-(10**6), 10**6), st.integers(0, 6), st.integers(1, 10**4), st.integers(0, 4))
def test_multiples_are_those_of_fractions(a: int, places: int, b: int, of_places: int) -> None:
    number, of = Decimal(a).scaleb(-places), Decimal(b).scaleb(-of_places)
    multiple = (Fraction(number) / Fraction(of)).denominator == 1
    assert json_numbers.is_multiple(number, of) == multiple


@pytest.mark.parametrize(
    ("output", "schema", "expected"),
    [
        ("0.1", {"minimum": 0.1}, 1.0),
        ("0.1", {"exclusiveMinimum": 0.1}, 0.0),
        ("0.1", {"const": 0.1}, 1.0),
        ("1.0", {"const": 1}, 1.0),
        ("1.0", {"const": True}, 0.0),
        ("[0.3]", {"enum": [[0.3]]}, 1.0),
        ("7.0", {"type": "integer"}, 1.0),
        ("7.5", {"type": "integer"}, 0.0),
        ("1e400", {"type": "integer", "minimum": 5}, 1.0),
        ("true", {"type": "number"}, 0.0),
        ("7.0", {"type": "integer", "$schema": "http://json-schema.org/draft-04/schema#"}, 0.0),
        ("[1, 1.0]", {"uniqueItems": True}, 0.0),
        ("[1, true, 0, false]", {"uniqueItems": True}, 1.0),
        ('[{"a": 1, "b": [2]}, {"b": [2.0], "a": 1}]', {"uniqueItems": True}, 0.0),
        ('["ab", "b"]', {"items": {"maxLength": 2.0}}, 1.0),
    ],
)
def test_numbers_are_compared_as_written(
    grade: Grade, output: str, schema: dict, expected: float
) -> None:
    assert grade("json_schema", output, schema=schema) == expected


def test_numbers_of_a_schema_file_are_exact_too(grade: Grade, tmp_path: Path) -> None:
    file = tmp_path / "price.json"
    file.write_text('{"multipleOf": 0.01, "minimum": 0.07, "maximum": 1e500}')
    assert grade("json_schema", "0.07", schema=str(file)) == 1.0
    assert grade("json_schema", "0.075", schema=str(file)) == 0.0


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (
            {"patternProperties": {r"^\p{Lu}$": {"type": "integer"}}},
            '{"\u00c9": 1}',
            '{"\u00c9": ""}',
        ),
        (
            {"patternProperties": {r"^\p{Lu}$": {}}, "additionalProperties": False},
            '{"\u00c9": 1}',
            '{"\u00e9": 1}',
        ),
        (
            {"patternProperties": {r"^\p{Lu}$": {}}, "unevaluatedProperties": False},
            '{"\u00c9": 1}',
            '{"\u00e9": 1}',
        ),
        (
            {
                "allOf": [{"$ref": "#/$defs/upper"}, {"properties": {"a": True}}],
                "unevaluatedProperties": False,
                "$defs": {"upper": {"patternProperties": {r"^(?<first>\p{Lu})\k<first>$": {}}}},
            },
            '{"\u00c9\u00c9": 1, "a": 1}',
            '{"\u00c9a": 1, "a": 1}',
        ),
        ({"propertyNames": {"pattern": r"^\d$"}}, '{"7": 1}', '{"\u0667": 1}'),
        ({"pattern": "^a$"}, '"a"', '"a\\n"'),
    ],
)
def test_patterns_are_ecma_262s_wherever_they_are(
    grade: Grade, schema: dict, right: str, wrong: str
) -> None:
    for draft in ("2020-12", "2019-09"):
        schema["$schema"] = f"https://json-schema.org/draft/{draft}/schema"
        found = [grade("json_schema", output, schema=schema) for output in (right, wrong)]
        assert found == [1.0, 0.0]


@pytest.mark.parametrize("draft", json_schemas.DRAFTS)
def test_the_keywords_written_anew_are_jsonschemas(draft: Any) -> None:
    """Against the library's own, on floats and patterns that mean the same in both languages."""
    documents = [
        {}, {"a": 1}, {"b": 1}, {"a": "", "b": 1}, {"ab": 2, "c": []}, [1, 1.5], [1, 1], [{}, {}],
        [{"a": 1}, {"a": True}], 3, 1.5, "ab", None,
    ]  # fmt: skip
    parts = [
        {"patternProperties": {"a": {"type": "integer"}}},
        {"properties": {"b": {}}, "patternProperties": {"^a": {}}, "additionalProperties": False},
        {"patternProperties": {"c$": {}}, "unevaluatedProperties": {"type": "integer"}},
        {"properties": {"a": {}}, "additionalProperties": {"type": "integer"}},
        {"uniqueItems": True},
        {"multipleOf": 0.5},
        {"items": {"multipleOf": 1}},
        {"contains": {"const": 1}, "unevaluatedItems": {"type": "number"}},
    ]
    combined = [
        {"anyOf": [one, {"not": other}], "unevaluatedProperties": False, "unevaluatedItems": False}
        for one in parts for other in parts
    ]  # fmt: skip
    combined += [
        {"if": one, "then": other, "else": {"required": ["a"]}, "dependentSchemas": {"b": one}}
        for one in parts for other in parts
    ]  # fmt: skip
    # The library's 2019-09 leaves out what an inner unevaluatedProperties has looked at.
    library = Draft202012Validator if draft is Draft201909Validator else draft
    for schema in [*parts, *combined]:
        uri = draft.ID_OF(draft.META_SCHEMA)
        ours = json_schemas.SchemaCheck({"$schema": uri, **schema}, "key")
        theirs = library(schema)
        for document in documents:
            exact = json_numbers.exact_numbers(document)
            assert ours.allows(exact, 5.0) == theirs.is_valid(document), (schema, document)


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
        "eval.graders[1].schema: checking the output of row rows.jsonl:7 (2 characters) had no "
        "end, expected a schema that can be checked to the end."
    )
    assert "$ref that leads to itself" in message


ENDLESS = {
    "a pattern": ({"items": {"pattern": "^(a|aa)+$"}}, json.dumps(["a" * 999 + "b"])),
    "a name's pattern": (
        {"patternProperties": {"^(a|aa)+$": {}}},
        json.dumps({"a" * 999 + "b": 1}),
    ),
    "the names beside": (
        {"patternProperties": {"^(a|aa)+$": {}}, "additionalProperties": False},
        json.dumps({"a" * 999 + "b": 1}),
    ),
    "names not evaluated": (
        {"patternProperties": {"^(a|aa)+$": {}}, "unevaluatedProperties": False},
        json.dumps({"a" * 999 + "b": 1}),
    ),
    "anyOf in anyOf": (
        {
            "$ref": "#/$defs/s40",
            "$defs": {"s0": {"type": "string"}}
            | {f"s{n + 1}": {"anyOf": [{"$ref": f"#/$defs/s{n}"}] * 2} for n in range(40)},
        },
        "1",
    ),
    "unevaluated in anyOf": (
        {
            "$ref": "#/$defs/s30",
            "unevaluatedProperties": False,
            "$defs": {"s0": {"properties": {"a": True}}}
            | {f"s{n + 1}": {"allOf": [{"$ref": f"#/$defs/s{n}"}] * 2} for n in range(30)},
        },
        '{"b": 1}',
    ),
}


@pytest.mark.parametrize("case", ENDLESS)
def test_a_grade_without_an_end_is_stopped_and_names_row_and_grader(
    sample: Make, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(json_grading, "GRADE_SECONDS", 0.1)
    schema, output = ENDLESS[case]
    grader = make_grader("json_schema", key="eval.graders[1]", schema=schema)
    started = time.monotonic()
    with pytest.raises(DataError) as error:
        grader(sample(output))
    assert time.monotonic() - started < 5
    assert str(error.value).startswith(
        f"eval.graders[1].schema: checking the output of row rows.jsonl:7 ({len(output)} "
        "characters) took more than 0.1 s, expected a schema that can be checked to the end."
    )


def test_an_answer_nested_too_deep_for_a_recursive_schema_is_wrong(grade: Grade) -> None:
    schema = {"items": {"$ref": "#"}}
    assert grade("json_schema", "[" * 50 + "]" * 50, schema=schema) == 1.0
    assert grade("json_schema", "[" * 900 + "]" * 900, schema=schema) == 0.0


@pytest.mark.parametrize(
    ("schema", "told"),
    [
        ({"pattern": r"\p{Nonsense}"}, "the property Nonsense, which is not known at position 0"),
        ({"pattern": r"\Aa"}, r"the escape \A, which ECMA-262 lacks at position 0"),
        ({"patternProperties": {"(?i)a": {}}}, "(?i, which ECMA-262 lacks at position 0"),
        ({"$ref": "#/x/y", "x": {"y": {"pattern": "a++"}}}, "nothing to repeat at position 2"),
        ({"minimum": float("nan")}, "nan is no number of JSON"),
    ],
)
def test_what_is_no_pattern_or_number_is_refused_by_name(
    refused: Refused, schema: dict, told: str
) -> None:
    message = refused("json_schema", schema=schema)
    assert message.startswith("eval.graders[1].schema: given ") and told in message
