"""GSM8K answers in the form of <think> and <answer>; the text itself is unchanged."""

from __future__ import annotations

import pytest

from torchprime.data.rows.answer_form import think_answer
from torchprime.data.shared.fields import NO_FINAL_LINE, Unusable


@pytest.mark.parametrize(
    ("answer", "reasoning", "value"),
    [
        ("He has 3 + 4 = 7.\n#### 7", "He has 3 + 4 = 7.", "7"),
        ("a\nb \n\n####   1,234 \n", "a\nb", "1,234"),
        ("<<3+4=7>>7 #### $7.50", "<<3+4=7>>7", "$7.50"),
    ],
)
def test_the_value_after_the_mark_becomes_the_answer(
    answer: str, reasoning: str, value: str
) -> None:
    expected = f"<think>\n{reasoning}\n</think>\n<answer>\n{value}\n</answer>"
    assert think_answer(answer) == expected


@pytest.mark.parametrize(
    "answer",
    [
        *("", "7", "He has 7.", "#### 7", "He has 7.\n####", "He has 7.\n#### \n"),
        *("a\n#### 7\nmore", "a #### 6\n#### 7", "<think>a</think>\n#### 7", "a\n#### <answer>7"),
    ],
)
def test_an_answer_without_one_final_line_is_unusable(answer: str) -> None:
    with pytest.raises(Unusable) as caught:
        think_answer(answer)
    assert caught.value.reason == NO_FINAL_LINE
