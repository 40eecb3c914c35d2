"""Rows of one question and its answer, and the context before the question.

    prompt_completion  {prompt, completion}           unchanged
    question_answer    {question, answer}             the question inside QUESTION_PROMPT
    alpaca             {instruction, input?, output}  inside the prompts of the original Alpaca

A system prompt and earlier exchanges are context. As text they are written before the prompt with
blank lines between, the exchanges in the kind's own frame; in Alpaca's prompt the system prompt
replaces the opening sentences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torchprime.data.rows.formats import QUESTION_PROMPT
from torchprime.data.shared.fields import FIELD_EMPTY, Unusable, string_of

# The wording is Alpaca's own: models and servers of that form know no other.
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_PROMPT_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
BETWEEN = "\n\n"
FRAMES = {
    "question_answer": QUESTION_PROMPT,
    "alpaca": ALPACA_PROMPT.partition(BETWEEN)[2].replace("{instruction}", "{question}"),
}
Pairs = Sequence[tuple[str, str]]


class Exchange(NamedTuple):
    """A question and its answer.

    Attributes:
        asked: the text of a user's turn.
        prompt: the same text in the kind's frame.
        opening: text of the kind before everything else, if there is no system prompt.
    """

    kind: str
    asked: str
    prompt: str
    completion: str
    opening: str = ""

    def prompt_after(self, system: str, history: Pairs) -> str:
        """Return the whole prompt."""
        opening = system or self.opening
        before = [self._framed(question) + answer for question, answer in history]
        return BETWEEN.join([*([opening] if opening else []), *before, self.prompt])

    def _framed(self, question: str) -> str:
        frame = FRAMES.get(self.kind)
        return question if frame is None else frame.format(question=question)

    def question(self) -> str:
        """Return the user's turn, without the kind's frame: the chat template has its own."""
        if not self.asked.strip():
            raise Unusable(FIELD_EMPTY.format("prompt"))
        return self.asked


def prompt_completion(fields: dict[str, Any], columns: Mapping[str, str]) -> Exchange:
    """Return both strings unchanged."""
    prompt = string_of(fields, "prompt", columns, may_be_empty=True)
    return Exchange("prompt_completion", prompt, prompt, string_of(fields, "completion", columns))


def question_answer(fields: dict[str, Any], columns: Mapping[str, str]) -> Exchange:
    """Return the question in its frame."""
    question = string_of(fields, "question", columns)
    prompt = QUESTION_PROMPT.format(question=question)
    return Exchange("question_answer", question, prompt, string_of(fields, "answer", columns))


def alpaca(fields: dict[str, Any], columns: Mapping[str, str]) -> Exchange:
    """Return one of Alpaca's two prompts, without or with an input."""
    instruction = string_of(fields, "instruction", columns)
    output = string_of(fields, "output", columns)
    given = ""
    if fields.get("input") is not None:
        given = string_of(fields, "input", columns, may_be_empty=True)
    prompt = ALPACA_PROMPT_INPUT if given.strip() else ALPACA_PROMPT
    opening, _, frame = prompt.partition(BETWEEN)
    prompt = frame.format(instruction=instruction, input=given)
    asked = BETWEEN.join(text for text in (instruction, given) if text.strip())
    return Exchange("alpaca", asked, prompt, output, opening)
