"""A record in the common form, and the settings for reading records into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchprime.config.sections.dataset import AnswerForm, DatasetConfig, Format
from torchprime.data.messages.read import Message


@dataclass(frozen=True)
class Row:
    """One record in the common form: a prompt and a completion, or messages.

    A text row has everything in completion; its prompt is context from the field `system`, or "". A
    row of messages has neither.
    """

    row_id: str
    kind: str
    prompt: str = ""
    completion: str = ""
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()  # JSON schemas, for the template
    weight: float = 1.0  # multiplies the loss of the whole row
    source: str = ""  # the part of a mixture it is from
    group: str | None = None  # rows of one group stay on one side of a split
    time: float | str | None = None  # for a split by time


@dataclass(frozen=True)
class RowReading:
    """The settings for reading; column names may be dotted to reach into nested objects.

    Attributes:
        columns: our field -> the source's column, e.g. {"question": "Body"}; "message.role" and
            "message.content" name keys inside each message.
        group_key, time_key, id_key: columns of Row.group and Row.time, and of an id that may occur
            only once.
        weight_key: column of a factor of Row.weight.
        answer_form: AS_IS, or a form that answer_form.py gives to prompts' answers.
        as_messages: prompt and completion become a user's and an assistant's turn.
    """

    format: Format = DatasetConfig.format
    columns: Mapping[str, str] | None = None
    group_key: str | None = None
    time_key: str | None = None
    id_key: str | None = None
    as_messages: bool = DatasetConfig.as_messages
    answer_form: AnswerForm = DatasetConfig.answer_form
    weight_key: str | None = None


PLAIN_READING = RowReading()
