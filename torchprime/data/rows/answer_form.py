"""Answers in a form that their rows lack: GSM8K answers get <think> and <answer> blocks.

    He has 3 + 4 = 7.        <think>
    #### 7              ->   He has 3 + 4 = 7.
                             </think>
                             <answer>
                             7
                             </answer>

The text itself is unchanged. An answer that does not end in one `#### number` line is rejected,
since nothing else marks the part that is the value.
"""

from __future__ import annotations

from torchprime.data.shared.fields import NO_FINAL_LINE, Unusable, show

AS_IS, THINK_ANSWER = "as_is", "think_answer"
# Kinds whose rows are one prompt and its answer.
KINDS_WITH_ANSWERS = ("prompt_completion", "question_answer", "alpaca")

MARKER = "####"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def think_answer(answer: str) -> str:
    """Put the reasoning inside <think>, and the text after the last `####` inside <answer>.

    Raises:
        Unusable: no such line at the end, or more than one; nothing before or after it;
            or a tag is in the text already.
    """
    reasoning, marker, value = (part.strip() for part in answer.rpartition(MARKER))
    whole = reasoning and marker and value and "\n" not in value and MARKER not in reasoning
    if not whole or any(tag in answer for tag in TAGS):
        raise Unusable(NO_FINAL_LINE, show(answer[-80:]))
    return f"<think>\n{reasoning}\n</think>\n<answer>\n{value}\n</answer>"
