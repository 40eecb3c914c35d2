"""Columns that hold messages as JSON text, told apart from text that shows JSON."""

from __future__ import annotations

import pytest

from torchprime.data.messages.json_fields import objects_of_text, turns_of_text


@pytest.mark.parametrize(
    ("text", "objects", "turns"),
    [
        ('[{"role": "user", "content": "a"}]', [{"role": "user", "content": "a"}], True),
        (' \n[{"from": "human", "value": null}]', [{"from": "human", "value": None}], True),
        (
            '[{"role": "assistant", "tool_calls": []}]',
            [{"role": "assistant", "tool_calls": []}],
            True,
        ),
        ('[{"role": "user"}]', [{"role": "user"}], False),
        ('[{"name": "tool"}]', [{"name": "tool"}], False),
        ("[]", [], False),
        ("[1, 2]", None, False),
        ('{"role": "user", "content": "a"}', None, False),
        ("[not JSON", None, False),
        ("plain", None, False),
        ("", None, False),
    ],
)
def test_a_list_of_turns_is_recognized(text: str, objects: list | None, turns: bool) -> None:
    assert objects_of_text(text) == objects
    assert turns_of_text(text) == (objects if turns else None)
