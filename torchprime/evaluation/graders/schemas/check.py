"""JSON Schema validation by jsonschema, with exact numbers, ECMA-262 patterns and a time limit.

    schema (a mapping)  ->  checked  ->  SchemaCheck, which tells if a document is allowed

jsonschema computes with floats, in which 0.07 is no multiple of 0.01, and searches with Python's
patterns, which are not JSON Schema's and have no time limit. So documents and schemas hold their
numbers as decimals, and the keywords that compute or search are implemented here. Every keyword
checks the time left for the grade: a schema that tries all combinations is stopped.
"""

from __future__ import annotations

import reprlib
import time
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any

import jsonschema
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
from referencing.jsonschema import lookup_recursive_ref, specification_with

from torchprime.config.checks import refuse
from torchprime.errors import ConfigError
from torchprime.evaluation.graders.schemas.decimals import exact_numbers, is_multiple
from torchprime.evaluation.graders.schemas.ecma_patterns import PatternError, compile_ecma

DRAFTS = (
    Draft202012Validator,
    Draft201909Validator,
    Draft7Validator,
    Draft6Validator,
    Draft4Validator,
)
Errors = Iterator[jsonschema.ValidationError]


class Clock:
    """The time that is left for one grade."""

    def __init__(self) -> None:
        self.end = float("inf")

    def start(self, seconds: float) -> None:
        """Give the next grade this many seconds."""
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds left. Raise a TimeoutError if there are none."""
        left = self.end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def matches(self, pattern: str, text: str) -> bool:
        """Return True if the pattern is found in the text. Raise a TimeoutError if that takes too
        long."""
        left = self.left()
        limit = left if left < float("inf") else None
        return compile_ecma(pattern).search(text, timeout=limit) is not None


class SchemaCheck:
    """A schema for the validation of documents.

    Args:
        schema: with its numbers as JSON or YAML give them.
        key: of the config, for messages.

    Raises:
        ConfigError: the schema or a pattern is invalid, or a reference leads out of the schema.
    """

    def __init__(self, schema: Any, key: str) -> None:
        if not isinstance(schema, dict):
            refuse(
                key,
                schema,
                "a mapping, or the path of a file with one",
                "Write the schema below it in YAML, such as {type: object}.",
            )
        draft = _draft(schema, f"{key}.$schema")
        self.clock = Clock()
        own = _validator_class(draft, self.clock)
        try:
            exact = exact_numbers(schema)
            _check_schema(own, draft, schema, key)
            _check_references(exact, specification_with(_uri(draft)), key)
        except (ValueError, RecursionError) as error:
            given = reprlib.repr(schema)
            refuse(key, given, f"a JSON Schema, but {error}", "Correct it there.")
        # Without a registry of its own jsonschema would download what a reference names.
        self._validator = own(exact, registry=REGISTRY)

    def allows(self, document: Any, seconds: float) -> bool:
        """Return True if the schema allows the document.

        Raises:
            TimeoutError: the check exceeds the time left for the grade.
            RecursionError: the document, or a chain of references, goes too deep.
        """
        self.clock.start(seconds)
        return self._validator.is_valid(document)


# Keywords -----------------------------------------------------------------------------------------


def _is_number(checker: Any, value: Any) -> bool:
    return isinstance(value, int | float | Decimal) and not isinstance(value, bool)


def _is_integer(checker: Any, value: Any) -> bool:
    return _is_number(checker, value) and is_multiple(Decimal(value), 1)


def _is_strict_integer(checker: Any, value: Any) -> bool:
    """Return True for an integer of draft 4, in which 1.0 is none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _validator_class(draft: Any, clock: Clock) -> Any:
    """Return the draft's validator with our keywords, all of which check the time left."""
    integer = _is_strict_integer if draft is Draft4Validator else _is_integer
    types = draft.TYPE_CHECKER.redefine_many({"number": _is_number, "integer": integer})
    keywords = {name: each for name, each in _keywords(clock).items() if name in draft.VALIDATORS}
    timed = {n: _timed(each, clock) for n, each in {**draft.VALIDATORS, **keywords}.items()}
    return extend(draft, timed, type_checker=types)


def _timed(keyword: Callable[..., Any], clock: Clock) -> Callable[..., Any]:
    def check(validator: Any, value: Any, instance: Any, schema: Any) -> Any:
        clock.left()
        return keyword(validator, value, instance, schema)

    return check


def _keywords(clock: Clock) -> dict[str, Callable[..., Errors]]:
    """Yield the keywords that compute or search, as the specification defines them."""

    def pattern(validator: Any, value: str, instance: Any, schema: Any) -> Errors:
        if validator.is_type(instance, "string") and not clock.matches(value, instance):
            yield jsonschema.ValidationError(f"{instance!r} does not match {value!r}")

    def pattern_properties(validator: Any, value: Any, instance: Any, schema: Any) -> Errors:
        if not validator.is_type(instance, "object"):
            return
        for name, subschema in value.items():
            for key, each in instance.items():
                if clock.matches(name, key):
                    yield from validator.descend(each, subschema, path=key, schema_path=name)

    def additional_properties(validator: Any, value: Any, instance: Any, schema: Any) -> Errors:
        if not validator.is_type(instance, "object"):
            return
        for key, each in instance.items():
            if not _named(clock, schema, key):
                yield from validator.descend(each, value, path=key)

    def unevaluated_properties(validator: Any, value: Any, instance: Any, schema: Any) -> Errors:
        if not validator.is_type(instance, "object"):
            return
        known = _evaluated(clock, validator, instance, schema)
        for key in instance.keys() - known:
            yield from validator.descend(instance[key], value, path=key)

    def unevaluated_items(validator: Any, value: Any, instance: Any, schema: Any) -> Errors:
        if not validator.is_type(instance, "array"):
            return
        known = _evaluated_items(validator, instance, schema)
        for place, each in enumerate(instance):
            if place not in known:
                yield from validator.descend(each, value, path=place)

    def multiple_of(validator: Any, value: Any, instance: Any, schema: Any) -> Errors:
        if validator.is_type(instance, "number") and not is_multiple(instance, value):
            yield jsonschema.ValidationError(f"{instance} is not a multiple of {value}")

    def unique_items(validator: Any, value: Any, instance: Any, schema: Any) -> Errors:
        if value and validator.is_type(instance, "array"):
            found = {_hashable(each) for each in instance}
            if len(found) < len(instance):
                yield jsonschema.ValidationError("the array has non-unique elements")

    return {
        "pattern": pattern,
        "patternProperties": pattern_properties,
        "additionalProperties": additional_properties,
        "unevaluatedProperties": unevaluated_properties,
        "unevaluatedItems": unevaluated_items,
        "multipleOf": multiple_of,
        "uniqueItems": unique_items,
    }


def _named(clock: Clock, schema: Mapping[str, Any], key: str) -> bool:
    """Return True if the sibling `properties` or `patternProperties` have the key."""
    return key in schema.get("properties", {}) or any(
        clock.matches(name, key) for name in schema.get("patternProperties", {})
    )


def _evaluated(clock: Clock, validator: Any, instance: Any, schema: Any) -> set[str]:
    """Return the keys of an object that the schema's other keywords have evaluated."""
    if not isinstance(schema, Mapping):
        return set()
    keys = {key for key in instance if _named(clock, schema, key)}
    for name in ("additionalProperties", "unevaluatedProperties"):
        if (value := schema.get(name)) is not None:
            keys |= {
                key for key, each in instance.items()
                if not _named(clock, schema, key) and _valid(validator, each, value)
            }  # fmt: skip
    inner = [each for key, each in schema.get("dependentSchemas", {}).items() if key in instance]
    for there, each in [*_beside(validator, instance, schema), *((validator, i) for i in inner)]:
        keys |= _evaluated(clock, there, instance, each)
    return keys


def _evaluated_items(validator: Any, instance: Any, schema: Any) -> set[int]:
    """Return the indexes of an array that the schema's other keywords have evaluated."""
    if not isinstance(schema, Mapping):
        return set()
    everything, items = set(range(len(instance))), schema.get("items")
    new = "prefixItems" in validator.VALIDATORS  # 2020-12
    if isinstance(items, list):  # 2019-09
        if "additionalItems" in schema:
            return everything
        places = set(range(len(items)))
    elif items is not None:
        return everything
    else:
        places = set(range(len(schema.get("prefixItems", []) if new else [])))
    for name in ["unevaluatedItems", *(["contains"] if new else [])]:
        if name in schema:
            places |= {p for p in everything if _valid(validator, instance[p], schema[name])}
    for there, each in _beside(validator, instance, schema):
        places |= _evaluated_items(there, instance, each)
    return places


def _beside(validator: Any, instance: Any, schema: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the subschemas that apply to the same value and allow it, each with its validator."""
    for name in ("allOf", "anyOf", "oneOf"):
        for each in schema.get(name, []):
            if _valid(validator, instance, each):
                yield validator, each
    if "if" in schema:
        holds = _valid(validator, instance, schema["if"])
        chosen = [schema["if"], schema.get("then")] if holds else [schema.get("else")]
        yield from ((validator, each) for each in chosen)
    for resolved in _resolved(validator, schema):
        there = validator.evolve(schema=resolved.contents, _resolver=resolved.resolver)
        yield there, resolved.contents


def _valid(validator: Any, instance: Any, schema: Any) -> bool:
    return next(validator.descend(instance, schema), None) is None


def _resolved(validator: Any, schema: Mapping[str, Any]) -> Iterator[Any]:
    """Yield the targets of the schema's references."""
    for name in ("$ref", "$dynamicRef"):
        if name in schema:
            yield validator._resolver.lookup(schema[name])
    if "$recursiveRef" in schema:
        yield lookup_recursive_ref(validator._resolver)


def _hashable(value: Any) -> Any:
    """Return a hashable that is equal for equal JSON values; 1 equals 1.0, but not true."""
    if isinstance(value, Mapping):
        return frozenset((key, _hashable(each)) for key, each in value.items())
    if isinstance(value, list):
        return tuple(map(_hashable, value))
    return (isinstance(value, bool), value)


# Schemas ------------------------------------------------------------------------------------------


def _draft(schema: dict[str, Any], key: str) -> Any:
    """Return the validator of the draft that the schema names."""
    given = schema.get("$schema", _uri(Draft202012Validator))
    for draft in DRAFTS:
        if isinstance(given, str) and given.rstrip("#") == _uri(draft):
            return draft
    refuse(key, given, f"one of {', '.join(map(_uri, DRAFTS))}", "Leave it out for 2020-12.")


def _uri(draft: Any) -> str:
    return draft.ID_OF(draft.META_SCHEMA).rstrip("#")


def _check_schema(own: Any, draft: Any, schema: Any, key: str) -> None:
    """Check that the schema is valid in its draft."""
    formats = jsonschema.FormatChecker(formats=())
    formats.checkers = {**draft.FORMAT_CHECKER.checkers, "regex": (_is_pattern, PatternError)}
    meta = own(draft.META_SCHEMA, registry=REGISTRY, format_checker=formats)
    for error in meta.iter_errors(schema):
        why = f"{error.message}: {error.cause}" if error.cause else error.message
        given = error.instance
        given = float(given) if isinstance(given, Decimal) else given
        raise ConfigError(
            f"{key}: given {given!r} at {error.json_path}, expected a JSON Schema of "
            f"{_uri(draft)}: {why}. Correct it there."
        )


def _is_pattern(value: object) -> bool:
    if isinstance(value, str):
        compile_ecma(value)
    return True


def _check_references(schema: dict[str, Any], draft: Specification, key: str) -> None:
    """Check that every reference has a target inside the schema, not only when it is followed.

    The same holds for a bad pattern in a part that is only reached by a reference.
    """
    root = draft.create_resource(schema)
    todo, seen = [(root, REGISTRY.resolver_with_root(root))], set()
    while todo:
        resource, resolver = todo.pop()
        if id(resource.contents) in seen:
            continue
        seen.add(id(resource.contents))
        todo += [(inner, resolver.in_subresource(inner)) for inner in resource.subresources()]
        if not isinstance(resource.contents, dict):
            continue
        _check_patterns(resource.contents, key)
        for name in ("$ref", "$dynamicRef"):
            if (given := resource.contents.get(name)) is not None:
                target = _target(resolver, given, f"{key} ({name})")
                todo.append((draft.create_resource(target.contents), target.resolver))


def _check_patterns(schema: dict[str, Any], key: str) -> None:
    named = schema.get("patternProperties")
    found = [schema.get("pattern"), *(named if isinstance(named, dict) else ())]
    for pattern in found:
        try:
            _is_pattern(pattern)
        except PatternError as error:
            refuse(key, pattern, f"a pattern of ECMA-262, but: {error}", "Correct it there.")


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
