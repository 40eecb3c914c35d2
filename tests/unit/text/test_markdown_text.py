"""Foreign text in Markdown, read back by a Markdown library."""

from __future__ import annotations

import html
import re

import pytest

from torchprime.text.markdown_text import block, code, inline, table

markdown_it = pytest.importorskip("markdown_it", reason="markdown-it-py is not installed")
READER = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"])

TEXTS = [
    "plain words",
    "a * b and *c* and _d_ and snake_case",
    "`code` and ``more``",
    "[link](http://x) ![i](y)",
    "<script>alert(1)</script>",
    "a & b &lt; c",
    "# heading",
    "> quote, a > b",
    "~~struck~~ | cell",
    "back\\slash \\* star",
]


def words(rendered: str) -> str:
    """Return the text of an HTML page of one paragraph."""
    return html.unescape(re.sub(r"<[^>]*>", "", rendered)).strip()


@pytest.mark.parametrize("text", TEXTS)
def test_a_line_is_shown_as_it_was_written(text: str) -> None:
    rendered = READER.render("x " + inline(text))
    assert words(rendered) == f"x {text}"
    assert re.findall(r"<(\w+)", rendered) == ["p"], "no element but the paragraph"


@pytest.mark.parametrize("text", [*TEXTS, "`", "``", "a`"])
def test_code_in_a_line_is_shown_as_it_was_written(text: str) -> None:
    rendered = READER.render(code(text))
    assert words(rendered) == text and rendered.startswith("<p><code>")


@pytest.mark.parametrize("text", ["a\nb", "```\nx\n```", "~~~~\n````text\n", "<b>&"])
def test_a_fence_is_longer_than_any_inside(text: str) -> None:
    lines = block(text)
    rendered = READER.render("\n".join(lines))
    assert words(rendered) == text.strip() and rendered.count("<code") == 1
    assert lines[0].endswith("text") and lines[1:-1] == text.split("\n")


def test_a_cell_cannot_end_its_row() -> None:
    lines = table(["a|b", "c"], [["1|2", "x\ny"], ["---", "z"]])
    assert lines == ["| a\\|b | c |", "| --- | --- |", "| 1\\|2 | x y |", "| --- | z |"]
    rendered = READER.render("\n".join(lines))
    assert rendered.count("<tr>") == 3 and rendered.count("<td>") == 4


def test_control_characters_are_visible() -> None:
    assert inline("a\x1bb\n c") == "a\\\\x1bb c" and code("\x1b") == "`\\x1b`"
