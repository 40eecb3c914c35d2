"""Special tokens that end a turn, found in text by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from torchprime.data.templates.render import ChatTemplate
from torchprime.data.templates.stop_tokens import Stops, openers, reserved_texts, stops_of
from torchprime.data.tokenizer.load import Tokenizer

END, LONGER, OPEN = "<|end|>", "<|end|>x", "<|user|>"
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    ("text", "position", "span"),
    [
        ("answer<|end|>\n", 6, (6, 13)),
        ("answer \n<|end|>\n", 6, (8, 15)),
        ("answer<|end|>x", 6, (6, 14)),
        ("answer.<|end|>", 6, None),
        ("answer", 6, None),
    ],
)
def test_a_stop_is_found_at_a_position(text: str, position: int, span: tuple | None) -> None:
    found = Stops(frozenset({END, LONGER})).after(text, position)
    assert found == span


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("a<|end|>", (1, 8)),
        ("a<|end|> \n", (1, 8)),
        ("a<|end|>x", (1, 9)),
        ("a<|end|>b", None),
        ("", None),
    ],
)
def test_a_stop_is_found_at_the_end(text: str, span: tuple | None) -> None:
    assert Stops(frozenset({END, LONGER})).at_end(text) == span


def test_without_special_tokens_nothing_ends_a_turn() -> None:
    stops = stops_of(frozenset())
    assert stops.after("a", 1) is None and stops.at_end("a") is None


def test_openers_are_the_tokens_before_a_message_and_not_after_it() -> None:
    texts = frozenset({END, OPEN, "<|assistant|>", "<|tool|>"})
    assert openers(ChatTemplate("mine", CHAT), texts) == {OPEN, "<|assistant|>"}


def test_eos_is_no_opener_even_where_it_begins_the_text() -> None:
    template = ChatTemplate("mine", "{{ bos_token }}" + CHAT, bos_token=END, eos_token=END)
    assert openers(template, frozenset({END, OPEN})) == {OPEN}


def test_a_template_that_refuses_a_single_turn_has_no_openers() -> None:
    refusing = ChatTemplate("mine", "{{ raise_exception('two turns, please') }}")
    assert openers(refusing, frozenset({END, OPEN})) == frozenset()


def test_reserved_texts_are_special_tokens_markers_and_both_ends() -> None:
    tokenizer = cast(Tokenizer, SimpleNamespace(special_tokens=frozenset({"<pad>"})))
    template = ChatTemplate("mine", CHAT, bos_token="<s>", eos_token="", markers=("[INST]",))
    assert reserved_texts(template, tokenizer) == {"<pad>", "<s>", "[INST]"}
