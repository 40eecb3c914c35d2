"""Advice for each reason why rows are rejected: what to change in the config or in the rows.

Too many rejections for one reason end a run; the error message then gives the advice for that
reason. ADVICE is the whole table; a new reason needs a line in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

from torchprime.data.files import record as records
from torchprime.data.rows import limits as row_limits
from torchprime.data.shared import fields
from torchprime.data.templates import reasoning, turns
from torchprime.data.tokens import borders, marked_text
from torchprime.data.tokens import completions as tokenize
from torchprime.data.tokens import conversations as chat

MOST_SHOWN = 3

_FIELDS = (
    "name the right column in dataset.columns (e.g. dataset.columns={question: Body}), set "
    "dataset.format to the rows' kind, or correct the rows"
)
_TEXTS = "write texts into these fields: an empty value, null or a number cannot be trained"
_TURNS = (
    "correct the messages; if their keys have other names, say so: "
    "dataset.columns={message.role: ROLE, message.content: CONTENT}"
)
_ROLES = (
    "rename the roles to system, developer, user, assistant or tool, or name the key that holds "
    "them: dataset.columns={message.role: KEY}"
)
_SWITCHES = "state once whether a turn carries loss: train: true or false, or a weight from 0 to 10"
_CALLS = 'write calls as {"name": NAME, "arguments": {...}}, the arguments as a JSON object'
_TEMPLATE = (
    "see what the template makes of such a row (torchprime inspect), correct the rows, or name "
    "another template with dataset.chat_template"
)
_KEY = "name a column that every row has, or leave the key out"
_TREE = (
    "export the trees again: the messages of a tree one after the other, each with message_id, "
    "parent_id, text and role"
)
_SERVED = (
    "set dataset.turns=branch, which makes an example of each answer as it is served (auto: only "
    "where it has to be), or dataset.compute_loss_on=last_assistant"
)
_ENDS = (
    "see that the text that ends a turn is a special token of this tokenizer "
    "(model.add_special_tokens adds it), or name another template with dataset.chat_template"
)
_LONGER = "raise dataset.block_size or set dataset.truncation=right"

ADVICE: Mapping[str, str] = {
    fields.FIELD_MISSING: _FIELDS,
    fields.FIELD_NULL: _TEXTS,
    fields.FIELD_NOT_STRING: _FIELDS,
    fields.FIELD_EMPTY: _TEXTS,
    fields.FIELD_NOT_LIST: _FIELDS,
    fields.FIELD_NOT_UNICODE: "write the file again as UTF-8, without half surrogates",
    fields.FIELD_UNSUPPORTED: "write such rows as messages (dataset.format=messages)",
    fields.MIXED_FORMS: "write prompt and completion both as texts or both as lists of messages",
    fields.MESSAGE_NOT_OBJECT: _TURNS,
    fields.MESSAGE_NO_ROLE: _TURNS,
    fields.UNKNOWN_ROLE: _ROLES,
    fields.CONTENT_NULL: _TURNS,
    fields.CONTENT_NOT_TEXT: "leave out images, sound and files: they are not trained",
    fields.CONTENT_EMPTY: "give the assistant something to say, or mark the turn with train: false",
    fields.MESSAGE_NOT_STRING: "write texts into these keys, or leave them out",
    fields.MESSAGE_NOT_UNICODE: "write the file again as UTF-8, without half surrogates",
    fields.MESSAGE_WEIGHT: _SWITCHES,
    fields.MESSAGE_SWITCH: _SWITCHES,
    fields.SWITCHES_DIFFER: _SWITCHES,
    fields.MASK_UNCLEAR: "say masked: true or train: false for no loss, train: true for loss",
    fields.BAD_TRAIN_DETAIL: (
        "write parts that do not overlap, {begin_offset, end_offset, train}, the end included"
    ),
    fields.ANSWER_WEIGHTS_DIFFER: (
        "give a turn and the calls after it the same weight: they are one answer"
    ),
    fields.TWO_REASONINGS: "write the reasoning of a turn once",
    fields.BAD_TOOL_CALLS: _CALLS,
    fields.BAD_FUNCTION_CALL: _CALLS,
    fields.BAD_ARGUMENTS: _CALLS,
    fields.CALLS_DIFFER: "leave out function_call, the old form, beside tool_calls",
    fields.BAD_TOOLS: "write tools as a list of schemas with a name, or as the JSON text of one",
    fields.TOOLS_DIFFER: "leave out functions, the old form, beside tools",
    fields.TOO_NESTED: "simplify the tools or the arguments of such rows",
    fields.TWO_SYSTEMS: "leave out the field system, or the system turn",
    fields.BAD_HISTORY: "write history as [[question, answer], ...] or as a list of messages",
    fields.ONLY_LAST: "write only_last as true or false",
    fields.NO_ASSISTANT: "leave such rows out, or check that the roles are those of the kind",
    fields.ALL_OFF: "leave such rows out, or give a turn of the assistant a weight",
    fields.ROW_WEIGHT: "write weights from 0 to 10, or name another column in dataset.columns",
    fields.NO_FINAL_LINE: (
        "end the answers in one line `#### value`, or set dataset.answer_form=as_is"
    ),
    fields.CHOSEN_ELSEWHERE: "write chosen as the answer alone, or as the whole conversation",
    fields.BAD_TREE: _TREE,
    fields.BAD_RANK: "write ranks as numbers, the best lowest, or null",
    fields.NO_PARENT: _TREE,
    fields.TWO_ROOTS: _TREE,
    fields.TREE_AGAIN: _TREE,
    fields.NO_GROUP: _KEY,
    fields.BAD_GROUP: _KEY,
    fields.NO_TIME: _KEY,
    fields.BAD_TIME: "name a column of numbers or ISO 8601 times in dataset.time_key",
    fields.NO_WEIGHT: (
        "write a weight into every row (1 for one that counts as usual), or set "
        "dataset.weight_key=null"
    ),
    fields.BAD_WEIGHT: "write weights as numbers from 1e-6 to 1e6, or 0 to leave a row out",
    fields.NO_ID: _KEY,
    fields.BAD_ID: _KEY,
    fields.DUPLICATED_ID: "leave out the second copies, or set dataset.id_key=null",
    tokenize.REASON_BOUNDARY: (
        "end the prompts, or begin the completions, with a line break or a space"
    ),
    tokenize.REASON_NO_TOKENS: "leave out rows whose completion has no tokens",
    tokenize.REASON_UNPREDICTED: "write prompts, or use dataset.format=text for texts without one",
    tokenize.REASON_TOO_LONG: _LONGER,
    tokenize.REASON_NOTHING_LEFT: "raise dataset.block_size: tokens that carry loss are cut off",
    tokenize.REASON_UNSUPERVISED: "leave such rows out, or give them a weight above 0",
    turns.REASON_REFUSED: (
        "set what the template lacks with dataset.template_options, correct the rows (gemma knows "
        "no system turn, most families no tools), or name another template"
    ),
    turns.REASON_MARKS: _TEMPLATE,
    turns.REASON_NO_SPAN: _ENDS,
    turns.REASON_NOT_SERVED: _SERVED,
    turns.REASON_LEFT_OUT: _TEMPLATE,
    borders.REASON_TURN_BOUNDARY: _TEMPLATE,
    borders.REASON_NOT_FED: _SERVED,
    reasoning.REASON_NO_PLACE: (
        "set dataset.reasoning=inline to write it into the answer, or drop to leave it out"
    ),
    chat.REASON_SPECIAL: (
        "take the special token's text out of the messages, or allow it in answers with "
        "dataset.special_tokens_in_text=answers"
    ),
    chat.REASON_NO_STOP: _ENDS,
    chat.REASON_TWO_BOS: _TEMPLATE,
    chat.REASON_MASKED_PLACE: "write contents as the template does, without spaces at their ends",
    marked_text.REASON_NO_MARKER: "check dataset.response_marker, to the character",
    marked_text.REASON_MANY_MARKERS: (
        "set dataset.instruction_marker to the text in front of each instruction"
    ),
    marked_text.REASON_NOTHING_BEHIND: "add an answer after the marker",
    marked_text.REASON_NO_PROMPT: "add text before the answer",
    chat.REASON_NO_PROMPT: "begin the conversations with a turn that the assistant answers",
    row_limits.REASON_TOO_MANY: (
        "cut the texts into rows, or raise the limit if there is memory for it"
    ),
    **dict.fromkeys(sorted(records.UNREADABLE), "correct the file: it may be damaged or cut off"),
}


@lru_cache(maxsize=1)
def _patterns() -> list[tuple[re.Pattern[str], str]]:
    return [
        (re.compile(re.escape(reason).replace(r"\{\}", ".+"), re.DOTALL), advice)
        for reason, advice in ADVICE.items()
    ]


def advice_for(reason: str) -> str:
    """Return the advice for one reason; a {} in the reason may be filled in."""
    found = (advice for pattern, advice in _patterns() if pattern.fullmatch(reason))
    return next(found, "correct the rows")


def advise(reasons: Iterable[str]) -> str:
    """Return the advice for several reasons in one sentence, the most frequent first."""
    by_advice: dict[str, list[str]] = {}
    for reason in reasons:
        by_advice.setdefault(advice_for(reason), []).append(reason)
    shown = list(by_advice.items())[:MOST_SHOWN]
    return "; ".join(f'for "{found[0]}": {advice}' for advice, found in shown)
