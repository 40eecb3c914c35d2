"""Advice: every reason has some, and the message that ends a run gives that of its reasons."""

from __future__ import annotations

import pytest

from torchprime.data.advice import ADVICE, advice_for, advise
from torchprime.data.files import record as records
from torchprime.data.shared import fields
from torchprime.data.templates import reasoning, turns
from torchprime.data.tokens import borders, marked_text
from torchprime.data.tokens import completions as tokenize
from torchprime.data.tokens import conversations as chat


def test_every_reason_has_advice() -> None:
    given = {
        getattr(module, name)
        for module in (borders, chat, marked_text, reasoning, tokenize, turns)
        for name in vars(module)
        if name.startswith("REASON_")
    }
    assert len(given) > 10
    missing = {*given, *fields.REASONS, *records.UNREADABLE} - set(ADVICE)
    assert not missing, "add a line to ADVICE"


@pytest.mark.parametrize(
    ("reason", "part"),
    [
        ("longer than block_size", "raise dataset.block_size or set dataset.truncation=right"),
        ("field answer is missing", "dataset.columns={question: Body}"),
        ("unknown role", "rename the roles"),
        ("answer is not reasoning and one line of #### and a value", "dataset.answer_form=as_is"),
        ("message train_detail is not a list of parts of its content", "begin_offset"),
        ("group_key meta.thread is missing", "name a column that every row has"),
        ("malformed JSON", "correct the file"),
        ("something new", "correct the rows"),
    ],
)
def test_advice_fits_the_reason(reason: str, part: str) -> None:
    assert part in advice_for(reason)
    assert advise([reason]) == f'for "{reason}": {advice_for(reason)}'


def test_few_pieces_of_advice_each_once() -> None:
    both = ["field a is missing", "field b is missing"]
    assert advise(both) == f'for "field a is missing": {advice_for(both[0])}'
    many = advise(["unknown role", "duplicated id", "longer than block_size", "malformed JSON"])
    assert many.count('for "') == 3 and "malformed" not in many
