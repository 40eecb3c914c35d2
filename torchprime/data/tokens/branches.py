"""Branches: one example for each answer, as a server sees the turns (dataset.turns=branch).

A template may render earlier turns differently than when they were the last: Qwen 3 and others drop
their reasoning. One text of the whole conversation then trains answers that the model should never
give. A branch is the conversation up to one answer, and only that answer carries loss. So its
prefix is exactly a server's input at that turn, without any effect of later turns. `auto` makes
branches of conversations that have no single sequence correct for every turn.
"""

from __future__ import annotations

import re
from dataclasses import replace

from torchprime.data.rows.read import Row

WHOLE, BRANCH, AUTO = "whole", "branch", "auto"
_BRANCH_ID = re.compile(r"@\d+$")


def branches(row: Row, last_only: bool = False) -> list[Row]:
    """Return one row for each assistant turn that carries loss, or for the last one.

    Their ids are the row's with the number of the answer's message, from 1: `train.jsonl:17@4`. The
    weight of the answer's message is a factor of the branch's weight: it is an example of its own.
    """
    found = []
    for i, message in enumerate(row.messages):
        if message.role == "assistant" and message.weight > 0:
            context = [replace(before, weight=0.0) for before in row.messages[:i]]
            branch = (*context, replace(message, weight=1.0))
            found.append(
                replace(
                    row,
                    row_id=f"{row.row_id}@{i + 1}",
                    messages=branch,
                    weight=row.weight * message.weight,
                )
            )
    return found[-1:] if last_only else found


def row_of(branch_id: str) -> str:
    """Return the id of the row that a branch comes from."""
    return _BRANCH_ID.sub("", branch_id)
