"""A conversation as the turns of a server: one example for each answer (dataset.turns=branch).

A template may write earlier turns otherwise than it wrote them when they were the last: Qwen 3 and
others drop their reasoning. One text of the whole conversation then trains answers that the model
is never to give. A branch is the conversation up to one answer; only that answer carries loss, so
its prefix is what a server feeds at that turn and nothing that follows has shaped it. `auto` does
so for the conversations of which no single sequence is right for every turn.
"""

from __future__ import annotations

import re
from dataclasses import replace

from torchprime.data.rows.read import Row

WHOLE, BRANCH, AUTO = "whole", "branch", "auto"
_BRANCH_ID = re.compile(r"@\d+$")


def branches(row: Row, last_only: bool = False) -> list[Row]:
    """Return one row for each assistant turn that carries loss, or for the last one.

    Their ids are the row's with the number of the answer's message, from 1: `train.jsonl:17@4`.
    """
    found = []
    for i, message in enumerate(row.messages):
        if message.role == "assistant" and message.weight > 0:
            context = [replace(before, weight=0.0) for before in row.messages[:i]]
            found.append(replace(row, row_id=f"{row.row_id}@{i + 1}", messages=(*context, message)))
    return found[-1:] if last_only else found


def row_of(branch_id: str) -> str:
    """Return the id of the row that a branch is of."""
    return _BRANCH_ID.sub("", branch_id)
