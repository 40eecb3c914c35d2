"""Parts of a conversation that its rendered text lacks."""

from __future__ import annotations

from typing import Any

import pytest

from torchprime.data.templates.left_out import (
    NO_REASONING,
    NO_SYSTEM,
    NO_TOOLS,
    left_out,
    unsaid,
)

SYSTEM = {"role": "system", "content": " Be brief. "}
USER = {"role": "user", "content": "Weather?"}
CALL = {"type": "function", "function": {"name": "forecast", "arguments": {}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
THINKING = {"role": "assistant", "content": "Rain.", "reasoning_content": "Clouds."}
TOOL = {"type": "function", "function": {"name": "forecast", "parameters": {}}}


@pytest.mark.parametrize(
    ("messages", "produced", "lacking"),
    [
        ([USER, THINKING], {1: "Rain.<|end|>"}, ""),
        ([USER, THINKING], {1: "Clouds.<|end|>"}, "message 2: its content"),
        ([USER, CALLING], {1: '{"name": "forecast"}'}, ""),
        ([USER, CALLING], {1: "<|end|>"}, "message 2: the call of forecast"),
        # Reasoning in the content may be missing, the answer after it may not.
        ([USER, {"content": "<think>Hm</think>Rain."}], {1: "Rain."}, ""),
        ([USER, {"content": "<think>Hm</think>Rain."}], {1: "<think>Hm</think>"}, "message 2: its"),
        ([USER, {"content": None}], {1: ""}, ""),
        ([USER], {}, ""),
    ],
)
def test_words_and_calls_that_a_span_lacks(
    messages: list[dict[str, Any]], produced: dict[int, str], lacking: str
) -> None:
    assert unsaid(messages, produced).startswith(lacking)
    assert bool(unsaid(messages, produced)) == bool(lacking)


@pytest.mark.parametrize(
    ("messages", "tools", "text", "found"),
    [
        ([SYSTEM, USER], [], "Be brief. Weather?", ()),
        ([SYSTEM, USER], [], "Weather?", (NO_SYSTEM,)),
        ([SYSTEM | {"role": "developer"}, USER], [], "Weather?", (NO_SYSTEM,)),
        ([USER], [TOOL], "Weather?", (NO_TOOLS,)),
        ([USER], [TOOL], "forecast: Weather?", ()),
        ([USER, THINKING], [], "Weather? Rain.", (NO_REASONING,)),
        ([USER, THINKING], [], "Weather? Clouds. Rain.", ()),
        ([SYSTEM, THINKING], [TOOL], "Rain.", (NO_SYSTEM, NO_TOOLS, NO_REASONING)),
        ([], [], "", ()),
    ],
)
def test_parts_of_the_row_that_the_text_lacks(
    messages: list[dict[str, Any]], tools: list[dict[str, Any]], text: str, found: tuple
) -> None:
    assert left_out(messages, tools, text) == found
