"""Graders of structured output: valid JSON, and JSON that fits a schema.

The whole output must be the document, since text around it breaks the program that reads it.
JSON means RFC 8259: Python's own NaN and Infinity are refused.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn

from torchprime.config.checks import refuse
from torchprime.errors import DataError
from torchprime.evaluation.graders.samples import Grader, Sample
from torchprime.evaluation.graders.schemas.check import SchemaCheck
from torchprime.evaluation.graders.schemas.decimals import read_decimal
from torchprime.files.atomic import read_regular_text

FENCE = re.compile(r"```(?:json|JSON)?[ \t\r]*\n(.*)\n[ \t]*```", re.DOTALL)
GRADE_SECONDS = 5.0  # for checking one output
DEEPEST = 100  # nesting levels of a document that a recursive schema can check
_NOT_JSON = object()


def json_grader(key: str, fenced: bool = False) -> Grader:
    """Build a grader: 1 if the whole output is one JSON document, apart from white space around it.

    Args:
        fenced: the document may also stand in one Markdown fence, with nothing around that.
    """
    return lambda sample: float(_document(sample.output, fenced) is not _NOT_JSON)


def json_schema_grader(key: str, schema: Any, fenced: bool = False) -> Grader:
    """Build a grader: 1 if the whole output is one JSON document that the schema allows.

    Args:
        schema: a JSON Schema as a mapping, or the path of a file with one. It is read by the
            draft that its $schema names, otherwise 2020-12. References to other files and hosts
            are refused, and `format` is an annotation, not a check.

    Raises:
        DataError: (when grading) the check takes longer than GRADE_SECONDS, or has no end.
    """
    if isinstance(schema, str):
        schema = _schema_from_file(Path(schema), f"{key}.schema")
    check = SchemaCheck(schema, f"{key}.schema")

    def grade(sample: Sample) -> float:
        document = _document(sample.output, fenced)
        if document is _NOT_JSON:
            return 0.0
        try:
            return float(check.allows(document, GRADE_SECONDS))
        except TimeoutError:
            raise DataError(
                _unfinished(key, sample, f"took more than {GRADE_SECONDS:g} s")
            ) from None
        except RecursionError:
            if _deeper(document, DEEPEST):
                return 0.0
            raise DataError(_unfinished(key, sample, "had no end")) from None

    return grade


def _unfinished(key: str, sample: Sample, what: str) -> str:
    return (
        f"{key}.schema: checking the output of row {sample.row_id} ({len(sample.output)} "
        f"characters) {what}, expected a schema that can be checked to the end. Look for a $ref "
        "that leads to itself, a pattern that backtracks without an end, or anyOf inside of anyOf "
        "that tries all combinations."
    )


def _deeper(value: Any, levels: int) -> bool:
    """Return True if the document has more nesting levels than this."""
    layer = [value]
    for _ in range(levels):
        inner = [each for each in layer if isinstance(each, dict | list)]
        if not inner:
            return False
        layer = [v for each in inner for v in (each.values() if isinstance(each, dict) else each)]
    return True


# Documents ----------------------------------------------------------------------------------------


def _document(text: str, fenced: bool) -> Any:
    """Return the JSON value of the text, or _NOT_JSON, because null already is None.

    Numbers with a point or an exponent are decimals: what the text says, exactly.
    """
    text = text.strip()
    fence = FENCE.fullmatch(text) if fenced else None
    try:
        return json.loads(
            fence.group(1) if fence else text,
            parse_int=_whole,
            parse_float=read_decimal,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError):  # nested deeper than Python's parser can read
        return _NOT_JSON


def _whole(digits: str) -> int | Decimal:
    try:
        return int(digits)
    except ValueError:  # Python parses no number of thousands of digits; JSON has no such limit
        return Decimal(digits)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _schema_from_file(path: Path, key: str) -> Any:
    try:
        text = read_regular_text(path)
        return json.loads(text, parse_float=read_decimal, parse_constant=_no_constant)
    except OSError as error:
        refuse(
            key,
            str(path),
            f"a schema, or a file with one, but {error.strerror}",
            "Correct the path; a relative one starts where the command runs.",
        )
    except (ValueError, RecursionError) as error:
        refuse(key, str(path), f"a file with JSON, but {error}", "Correct the file there.")
