"""The answers that become training rows, which the reader takes as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from torchprime.data.files.source import SourceSpec
from torchprime.data.rows.read import load_rows
from torchprime.evaluation.graders.samples import Sample
from torchprime.training.inference.kept_rows import KeepRule, count_kept, kept_records


def graded(*answers: tuple[str, bool, float | None], stopped: bool = True):
    return [
        (Sample("r", "q", text, "ref", ended, len(text)), {"right": grade, "length": 3.0})
        for text, ended, grade in answers
    ]


FOUND = graded(
    ("long answer", True, 1.0), ("wrong", True, 0.0), ("b", True, 1.0), ("a", True, 1.0),
    (" b\n", True, 1.0), ("x", False, 1.0), ("?", True, None),
)  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (KeepRule(["right"]), [2, 3, 0]),  # the second "b" repeats, "x" was cut
        (KeepRule(["right"], most=1), [2]),
        (KeepRule(["right"], failing=["right"]), [1]),
    ],
)
def test_the_shortest_different_right_answers_are_kept(rule: KeepRule, kept: list[int]) -> None:
    assert rule.keep(FOUND) == kept


def test_every_grader_that_applies_has_to_pass() -> None:
    rule = KeepRule(["a", "b"])
    assert rule.is_right({"a": 1.0, "b": None}) and rule.is_right({"a": 1.0, "b": 1.0})
    assert not rule.is_right({"a": 1.0, "b": 0.0}) and not rule.is_right({"a": None, "b": None})


def test_the_counts_add_up() -> None:
    counts = count_kept(KeepRule(["right"], most=2), [FOUND, graded(("no", True, 0.0))])
    assert (counts.rows, counts.answers, counts.right, counts.cut) == (2, 8, 5, 1)
    assert (counts.rows_with_right, counts.kept) == (1, 2)
    assert "5 of 8 answers are right (62.5%), for 1 of 2 rows; kept 2 (left out 2" in (
        counts.describe()
    )


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "5"},
]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "record",
    [
        {"question": "1+1?", "answer": "3"},
        {"prompt": "say it: ", "completion": "3", "weight": 0.5},
        {"messages": CHAT, "tools": [TOOL]},
        {"messages": CHAT[:1] + CHAT[3:]},
    ],
)
def test_a_kept_answer_is_a_row_with_the_same_prompt(tmp_path: Path, record: dict) -> None:
    def read(content: dict):
        path = tmp_path / "rows.jsonl"
        path.write_text(json.dumps(content) + "\n")
        (row,) = load_rows(SourceSpec(file_dataset_path=str(path)), 2)
        return row

    before = read(record)
    (made,) = kept_records(before, graded(("4", True, 1.0)), KeepRule(["right"]), {"seed": 1})
    assert made["provenance"] == {
        "row_id": "rows.jsonl:1", "answer": 0, "tokens": 1, "seed": 1,
        "grades": {"right": 1.0, "length": 3.0},
    }  # fmt: skip
    after = read(made)
    assert (after.prompt, after.tools, after.weight) == (before.prompt, before.tools, before.weight)
    if not before.messages:
        assert after.completion == "4"
        return
    assert [m.template for m in after.messages[:-1]] == [m.template for m in before.messages[:-1]]
    assert after.messages[-1].content == "4"
    trained = [m.weight for m in after.messages if m.role == "assistant"]
    assert trained == [0.0] * (len(trained) - 1) + [1.0]
