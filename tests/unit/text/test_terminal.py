"""Lines reach a stdout of any encoding and a closed one, and show what anybody wrote as text."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from typing import Literal

import pytest

from torchprime.text.terminal import print_json, print_lines


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


def test_json_stays_json_and_shows_nothing_raw(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"a\u202e": "é\x7f\x9b\U000e0001 \u3000\n\t\x1b[2J 你好 नमस्ते\u200d"}
    print_json(value)
    printed = capsys.readouterr().out
    assert json.loads(printed) == value
    assert "é" in printed and "你好" in printed
    assert not set("\u202e\x7f\x9b\U000e0001\x1b") & set(printed)


def test_messages_logs_and_warnings_are_written_out(capsys: pytest.CaptureFixture[str]) -> None:
    code = r"""
import logging, sys, warnings
from torchprime.text.terminal import guard_output, say
guard_output()
text = "a\x1b[2J\u202e"
say(text)
logging.getLogger("other").warning("%s", text)
warnings.warn(text)
raise ValueError(text)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.count(r"a\x1b[2J\u202e") == 4
    assert "\x1b" not in done.stderr and "\u202e" not in done.stderr
    assert done.returncode == 1


def test_colours_are_kept_where_they_are_ours(capsys: pytest.CaptureFixture[str]) -> None:
    print_lines(["\x1b[32mgreen\x1b[0m \x1b[2J"], coloured=True)
    print_lines(["\x1b[32m"])
    assert capsys.readouterr().out == "\x1b[32mgreen\x1b[0m \\x1b[2J\n\\x1b[32m\n"
