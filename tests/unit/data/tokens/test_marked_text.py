"""Texts with markers: labels by characters, ids as a server feeds them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest

from torchprime.data.files.record import Rejection
from torchprime.data.rows.read import Row
from torchprime.data.tokenizer.load import Tokenizer
from torchprime.data.tokens.completions import REASON_UNSUPERVISED, RULES, Example
from torchprime.data.tokens.marked_text import (
    REASON_MANY_MARKERS,
    REASON_NO_MARKER,
    REASON_NOTHING_BEHIND,
    Markers,
    tokenize_texts,
)

ASK, SAY = "### Ask:\n", "### Say:\n"
ONE, SEVERAL = Markers(SAY), Markers(SAY, ASK)


def text_row(text: str, prompt: str = "", weight: float = 1.0) -> Row:
    return Row("f:1", "text", prompt=prompt, completion=text, weight=weight)


@pytest.fixture
def tokenizer(build: SimpleNamespace, make_tokenizer: Callable[..., Tokenizer]) -> Tokenizer:
    # The marker's line break merges with an answer's first one, the marker's words do not differ.
    raw = build.begin_with_bos(build.byte_level([("Ċ", "Ċ"), ("#", "#")]))
    return make_tokenizer(raw, bos_token="<s>")


def outcome(row: Row, tokenizer: Tokenizer, markers: Markers | None) -> Example | Rejection:
    (found,) = tokenize_texts([row], tokenizer, "auto", markers)
    return found


def learned(found: Example | Rejection, tokenizer: Tokenizer) -> list[str]:
    """The texts of the runs of tokens that carry loss."""
    assert isinstance(found, Example), found
    mask = (found.weights > 0).astype(int)
    borders = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    return [
        tokenizer.decode(found.ids[a:b].tolist(), False)
        for a, b in zip(borders[::2], borders[1::2], strict=True)
    ]


@pytest.mark.parametrize(
    ("text", "markers", "wanted"),
    [
        (f"{ASK}2+3?\n{SAY}5", ONE, ["5</s>"]),
        (f"{ASK}2+3?\n{SAY}5\n", ONE, ["5\n</s>"]),
        (f"{ASK}a\n{SAY}b\n{ASK}c\n{SAY}d", SEVERAL, ["b\n", "d</s>"]),
        (f"{ASK}a\n{SAY}\n\nb\n{ASK}c\n{SAY}d", SEVERAL, None),  # the break merges: see below
        (f"{SAY}b", ONE, ["b</s>"]),
        # A text that a template rendered, with its stop token: no second one.
        (f"{ASK}a{SAY}b</s>", ONE, ["b</s>"]),
    ],
)
def test_what_stands_behind_a_marker_carries_loss(
    text: str, markers: Markers, wanted: list[str] | None, tokenizer: Tokenizer
) -> None:
    found = outcome(text_row(text), tokenizer, markers)
    if wanted is None:  # no single sequence has both prefixes as they are served
        assert isinstance(found, Rejection) and "server feeds" in found.reason
        return
    assert learned(found, tokenizer) == wanted
    assert isinstance(found, Example)
    assert found.ids[0] == tokenizer.bos_id and RULES[found.rules[0]] == "bos"
    assert found.ids.tolist().count(tokenizer.eos_id) == 1
    prompt = text[: text.index(SAY) + len(SAY)]
    first = int(np.flatnonzero(found.weights)[0])
    assert found.ids[:first].tolist() == tokenizer.prompt_ids(prompt)


def test_a_marker_that_merges_with_the_answer(tokenizer: Tokenizer) -> None:
    text = f"{ASK}a{SAY}\nb"
    found = outcome(text_row(text), tokenizer, ONE)
    assert learned(found, tokenizer) == ["\nb</s>"]
    assert isinstance(found, Example) and found.boundary == "marker, separate"
    first = int(np.flatnonzero(found.weights)[0])
    assert found.ids[:first].tolist() == tokenizer.prompt_ids(f"{ASK}a{SAY}")


@pytest.mark.parametrize(
    ("row", "markers", "reason"),
    [
        (text_row("no marker here"), ONE, REASON_NO_MARKER),
        (text_row(f"{SAY}a{SAY}b"), ONE, REASON_MANY_MARKERS),
        (text_row(f"{ASK}a{SAY} \n"), ONE, REASON_NOTHING_BEHIND),
        (text_row(f"{SAY}a", weight=0.0), ONE, REASON_UNSUPERVISED),
    ],
)
def test_rows_without_an_answer(
    row: Row, markers: Markers, reason: str, tokenizer: Tokenizer
) -> None:
    found = outcome(row, tokenizer, markers)
    assert isinstance(found, Rejection) and found.reason == reason


def test_a_system_text_in_front_is_context(tokenizer: Tokenizer) -> None:
    marked = outcome(text_row(f"{SAY}b", prompt="Be brief.\n\n"), tokenizer, ONE)
    assert learned(marked, tokenizer) == ["b</s>"]
    plain = outcome(text_row("all of it", prompt="Be brief.\n\n"), tokenizer, None)
    assert learned(plain, tokenizer) == ["all of it</s>"]
    alone = outcome(text_row("all of it"), tokenizer, None)
    assert learned(alone, tokenizer) == ["all of it</s>"]


def test_other_rows_go_by_their_own_rule_and_in_order(tokenizer: Tokenizer) -> None:
    rows = [
        Row("a", "text", completion=f"{SAY}x"),
        Row("b", "prompt_completion", prompt="q", completion="y"),
        Row("c", "text", completion="nothing"),
    ]
    found = tokenize_texts(rows, tokenizer, "auto", ONE)
    assert [each.row_id for each in found] == ["a", "b", "c"]
    assert [learned(each, tokenizer) for each in found[:2]] == [["x</s>"], ["y</s>"]]
    assert isinstance(found[2], Rejection)
