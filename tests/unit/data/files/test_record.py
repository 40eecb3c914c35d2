"""Records and rejections of a file's reader."""

from __future__ import annotations

from typing import Any

import pytest

from torchprime.data.files.record import NOT_AN_OBJECT, Rejection, as_object, bad_byte


def test_an_object_is_a_record_unchanged() -> None:
    value = {"prompt": "p"}
    assert as_object(value, "f:1") is value and as_object({}, "f:1") == {}


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ([], "an array"),
        ("{}", "a string"),
        (True, "a boolean"),
        (None, "null"),
        (1, "a number"),
        (1.5, "a number"),
    ],
)
def test_another_json_value_is_rejected_by_its_kind(value: Any, kind: str) -> None:
    found = as_object(value, "f:1")
    assert isinstance(found, Rejection)
    assert (found.row_id, found.reason) == ("f:1", NOT_AN_OBJECT)
    assert found.detail.startswith(f"{kind}, expected an object such as")


def test_a_bad_byte_is_told_by_value_and_position() -> None:
    with pytest.raises(UnicodeDecodeError) as caught:
        b"ab\xffc".decode("utf-8")
    error = caught.value
    assert bad_byte(error, error.start) == "byte 3 is 0xff (invalid start byte)"
    assert bad_byte(error, 1_234_566).startswith("byte 1,234,567 is 0xff")
