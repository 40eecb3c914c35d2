"""One row of a stranger's file or template can't hold up or fill up a machine."""

from __future__ import annotations

import json
import time

import pytest

from torchprime.data.messages.read import Message
from torchprime.data.rows import limits as row_limits
from torchprime.data.rows.limits import characters, one_row
from torchprime.data.rows.row import Row
from torchprime.data.templates.render import (
    ChatTemplate,
    TemplateRefusal,
    render,
    render_with_marks,
)

SAID = [{"role": "user", "content": "hello"}]
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
MUCH = "{% for a in range(1000) %}{{ messages[0].content }}{% endfor %}"
PLAIN = ChatTemplate("plain", "{% for m in messages %}{{ m.content }}{% endfor %}")


def test_all_texts_of_a_row_count() -> None:
    assert characters(Row("a", "text", "12", "345")) == 5
    call = {"function": {"name": "f", "arguments": {"x": "yz"}}}
    turns = (
        Message({"role": "user", "content": "ü你"}),
        Message({"role": "assistant", "content": None, "tool_calls": [call]}),
    )
    texts = json.dumps([dict(turn.template) for turn in turns], ensure_ascii=False)
    letters = sum(character.isalpha() or character == "_" for character in texts) - len("null") + 1
    assert characters(Row("a", "messages", messages=turns)) == letters


@pytest.mark.parametrize("marks", [False, True])
def test_a_template_that_never_ends_is_stopped(
    monkeypatch: pytest.MonkeyPatch, marks: bool
) -> None:
    monkeypatch.setattr(row_limits, "RENDER_SECONDS", 0.05)
    draw = render_with_marks if marks else render
    with pytest.raises(TemplateRefusal, match="took more than 0.05 s"):
        draw(ChatTemplate("endless", ENDLESS), SAID)
    assert render(PLAIN, SAID) == "hello"  # the next one is not stopped by what is left of it


def test_the_renderings_of_a_row_share_its_time() -> None:
    with one_row():
        before, until = row_limits._left[-1], time.monotonic() + 20
        # The clock of a process may count in milliseconds, and one rendering takes less.
        while row_limits._left[-1] == before:
            assert time.monotonic() < until, "renderings take none of the row's time"
            render(PLAIN, SAID)
        assert row_limits._left[-1] < before
        row_limits._left[-1] = 0.0
        with pytest.raises(TemplateRefusal, match="of one row"):
            render(ChatTemplate("endless", ENDLESS), SAID)
    assert not row_limits._left


@pytest.mark.parametrize("marks", [False, True])
def test_a_template_that_writes_too_much_is_stopped(
    monkeypatch: pytest.MonkeyPatch, marks: bool
) -> None:
    template = ChatTemplate("much", MUCH)
    draw = render_with_marks if marks else render
    draw(template, SAID)
    monkeypatch.setattr(row_limits, "MOST_RENDERED", 1000)
    with pytest.raises(TemplateRefusal, match="more than 1,000 characters"):
        draw(template, SAID)
