"""Lines reach a stdout of any encoding, and one that is closed early is no error."""

from __future__ import annotations

import io
import os
import sys
from typing import Literal

import pytest

from torchprime.cli.stdout import print_lines


@pytest.mark.parametrize(
    ("errors", "expected"),
    [("replace", b"? 5\nplain\n"), ("backslashreplace", b"\\u2588 5\nplain\n")],
)
def test_a_stdout_without_unicode_gets_what_it_can_show(
    monkeypatch: pytest.MonkeyPatch,
    errors: Literal["replace", "backslashreplace"],
    expected: bytes,
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    print_lines(["█ 5", "plain"], errors)
    assert raw.getvalue() == expected


def test_a_reader_that_leaves_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        print_lines(["x" * 100_000], "replace")
