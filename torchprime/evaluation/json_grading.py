"""Graders of structured output: is it JSON, and JSON of the wanted shape?

The whole output has to be the document; text around it is what breaks the program that reads it.
JSON means RFC 8259: Python's own NaN and Infinity are refused.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import jsonschema
import regex
from jsonschema.validators import (
    Draft4Validator,
    Draft6Validator,
    Draft7Validator,
    Draft201909Validator,
    Draft202012Validator,
    extend,
)
from jsonschema_specifications import REGISTRY
from referencing import Specification
from referencing.exceptions import Unresolvable
from referencing.jsonschema import specification_with

from torchprime.config.checks import refuse
from torchprime.errors import ConfigError, DataError
from torchprime.evaluation.samples import Grader, Sample
from torchprime.evaluation.text_grading import PATTERN_SECONDS

FENCE = re.compile(r"```(?:json|JSON)?[ \t\r]*\n(.*)\n[ \t]*```", re.DOTALL)
DRAFTS = (
    Draft202012Validator,
    Draft201909Validator,
    Draft7Validator,
    Draft6Validator,
    Draft4Validator,
)
_NOT_JSON = object()


def json_grader(key: str, fenced: bool = False) -> Grader:
    """1 if the whole output is one JSON document, space around it aside.

    Args:
        fenced: the document may also stand in one Markdown fence, with nothing around that.
    """
    return lambda sample: float(_document(sample.output, fenced) is not _NOT_JSON)


def json_schema_grader(key: str, schema: Any, fenced: bool = False) -> Grader:
    """1 if the whole output is one JSON document that the schema allows.

    Args:
        schema: a JSON Schema as a mapping, or the path of a file with one. It is read by the
            draft that its $schema names, otherwise 2020-12. References to other files and hosts
            are refused, and `format` is an annotation, not a check.
    """
    if isinstance(schema, str):
        schema = _schema_from_file(Path(schema), f"{key}.schema")
    validator = _validator(schema, f"{key}.schema")

    def grade(sample: Sample) -> float:
        document = _document(sample.output, fenced)
        if document is _NOT_JSON:
            return 0.0
        try:
            return float(validator.is_valid(document))
        except OverflowError:  # 1e999 is infinite here, and then a multiple of nothing
            return 0.0
        except (RecursionError, TimeoutError) as error:
            raise DataError(
                f"{key}.schema: checking the output of row {sample.row_id} "
                f"({len(sample.output)} characters) ended in {type(error).__name__}, expected a "
                f"schema that can be checked to the end. Look for a $ref that leads to itself, or "
                f"a pattern that backtracks without an end."
            ) from None

    return grade


# Documents ----------------------------------------------------------------------------------------


def _document(text: str, fenced: bool) -> Any:
    """The JSON value that the text is, or _NOT_JSON; null is None, so None says nothing."""
    text = text.strip()
    fence = FENCE.fullmatch(text) if fenced else None
    try:
        return json.loads(
            fence.group(1) if fence else text, parse_int=_whole, parse_constant=_no_constant
        )
    except (ValueError, RecursionError):  # nested deeper than any reader follows
        return _NOT_JSON


def _whole(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:  # Python reads no number of thousands of digits; JSON has no such limit
        return float(digits)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


# Schemas ------------------------------------------------------------------------------------------


def _schema_from_file(path: Path, key: str) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        refuse(
            key,
            str(path),
            f"a schema, or a file with one, but {error.strerror}",
            "Correct the path; a relative one starts where the command runs.",
        )
    except (ValueError, RecursionError) as error:
        refuse(key, str(path), f"a file with JSON, but {error}", "Correct the file there.")


def _validator(schema: Any, key: str) -> Any:
    if not isinstance(schema, dict):
        refuse(
            key,
            schema,
            "a mapping, or the path of a file with one",
            "Write the schema below it in YAML, such as {type: object}.",
        )
    draft = _draft(schema, f"{key}.$schema")
    try:
        draft.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ConfigError(
            f"{key}: given {error.instance!r} at {error.json_path}, expected a JSON Schema of "
            f"{_uri(draft)}: {error.message}. Correct it there."
        ) from None
    _check_references(schema, specification_with(_uri(draft)), key)
    # Without a registry of its own jsonschema would fetch what a reference names.
    return extend(draft, {"pattern": _pattern})(schema, registry=REGISTRY)


def _draft(schema: dict[str, Any], key: str) -> Any:
    """The validator of the draft that the schema names."""
    given = schema.get("$schema", _uri(Draft202012Validator))
    for draft in DRAFTS:
        if isinstance(given, str) and given.rstrip("#") == _uri(draft):
            return draft
    refuse(key, given, f"one of {', '.join(map(_uri, DRAFTS))}", "Leave it out for 2020-12.")


def _uri(draft: Any) -> str:
    return draft.ID_OF(draft.META_SCHEMA).rstrip("#")


def _pattern(
    validator: Any, pattern: str, value: Any, schema: Any
) -> Iterator[jsonschema.ValidationError]:
    """As jsonschema does it, with a time limit."""
    if isinstance(value, str) and not regex.search(pattern, value, timeout=PATTERN_SECONDS):
        yield jsonschema.ValidationError(f"{value!r} does not match {pattern!r}")


def _check_references(schema: dict[str, Any], draft: Specification, key: str) -> None:
    """Every reference leads somewhere inside the schema; otherwise it would only show when met."""
    root = draft.create_resource(schema)
    todo, seen = [(root, REGISTRY.resolver_with_root(root))], set()
    while todo:
        resource, resolver = todo.pop()
        if id(resource.contents) in seen:
            continue
        seen.add(id(resource.contents))
        todo += [(inner, resolver.in_subresource(inner)) for inner in resource.subresources()]
        for name in ("$ref", "$dynamicRef"):
            given = resource.contents.get(name) if isinstance(resource.contents, dict) else None
            if given is not None:
                target = _target(resolver, given, f"{key} ({name})")
                todo.append((draft.create_resource(target.contents), target.resolver))


def _target(resolver: Any, given: str, key: str) -> Any:
    try:
        return resolver.lookup(given)
    except Unresolvable:
        refuse(
            key,
            given,
            "a reference into the schema itself, since nothing is fetched from elsewhere",
            "Put what it names below $defs and write '#/$defs/NAME'.",
        )
