"""Facts of a template's source, and the check of dataset.template_options against it."""

from __future__ import annotations

import pytest

from torchprime.data.templates.render import ChatTemplate
from torchprime.data.templates.source import (
    check_syntax,
    checked_options,
    tells_date,
    variables_of,
)
from torchprime.errors import DataError

LOOP = "{% for m in messages %}{{ m.content }}{% endfor %}"
THINKING = LOOP + "{% if enable_thinking %}<think>{% endif %}"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("plain", set()),
        (LOOP, {"messages"}),
        (THINKING, {"messages", "enable_thinking"}),
        ("{% set x = tools %}{{ x }}", {"tools"}),
        ("{# enable_thinking #}{% raw %}{{ hidden }}{% endraw %}", set()),
        ("{% macro f(a) %}{{ a }}{{ b }}{% endmacro %}{{ f(1) }}", {"b"}),
    ],
)
def test_variables_are_the_names_that_a_template_does_not_set(text: str, names: set[str]) -> None:
    assert variables_of(text) == names


def test_the_date_counts_only_where_it_is_called() -> None:
    assert tells_date("{{ strftime_now('%d %B %Y') }}")
    assert not tells_date("strftime_now {# strftime_now #}{{ messages }}")


def test_a_syntax_error_is_told_with_its_line() -> None:
    check_syntax(THINKING, "mine")
    with pytest.raises(DataError, match=r"\(mine\) is not valid jinja: .* at line 3"):
        check_syntax("\n\n{% for m in messages %}", "mine")
    with pytest.raises(DataError, match=r"\(deep\) cannot be compiled: RecursionError"):
        check_syntax("{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}", "deep")


def test_options_are_json_sorted_by_name() -> None:
    template = ChatTemplate("mine", THINKING + "{{ budget }}")
    found = checked_options({"enable_thinking": False, "budget": [1, None]}, template)
    assert found == (("budget", "[1, null]"), ("enable_thinking", "false"))
    assert checked_options({}, template) == ()


def test_an_option_of_a_named_template_is_read_too() -> None:
    template = ChatTemplate("mine", LOOP, named=(("tool_use", THINKING),))
    assert checked_options({"enable_thinking": True}, template) == (("enable_thinking", "true"),)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"enable_thinkin": True}, "does not read enable_thinkin; it reads enable_thinking"),
        ({"enable_thinkin": True}, "Did you mean enable_thinking?"),
        ({"zzz": 1}, "Leave it out"),
        ({"messages": []}, "messages is given by the run. Leave it out"),
        ({"chat_template": "x"}, "chat_template is given by the run"),
        ({"enable_thinking": {1, 2}}, "expected values that JSON can write"),
    ],
)
def test_an_option_that_cannot_be_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(DataError) as caught:
        checked_options(options, ChatTemplate("mine", THINKING))
    assert "dataset.template_options" in str(caught.value) and said in str(caught.value)
