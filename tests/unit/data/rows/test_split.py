"""Rows keep their side, groups and equal rows stay together, and time divides before from after."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchprime.data.messages.read import Message
from torchprime.data.rows.read import Row
from torchprime.data.rows.split import (
    SplitRule,
    TimeSplit,
    check_sides,
    content_text,
    parse_time,
    plan_split,
)
from torchprime.errors import ConfigError, DataError


def row(text: str, group: str | None = None, time: object = None, row_id: str = "f:1") -> Row:
    return Row(row_id, "text", "", text, group=group, time=time)  # type: ignore[arg-type]


def sides(rule: SplitRule, rows: Iterable[Row]) -> list[str]:
    return [rule.side_of(r, content_text(r)) for r in rows]


def test_a_row_keeps_its_side_whatever_is_around_it() -> None:
    rows = [row(f"text {i}", row_id=f"f:{i}") for i in range(2000)]
    rule = SplitRule(0.1, seed=3)
    before = {r.completion: side for r, side in zip(rows, sides(rule, rows), strict=True)}
    others = [row(f"text {i}", row_id=f"g:{i}") for i in range(1000, 4000)]
    random.Random(0).shuffle(others)
    after = {r.completion: side for r, side in zip(others, sides(rule, others), strict=True)}
    shared = before.keys() & after.keys()
    assert len(shared) == 1000
    assert {t: before[t] for t in shared} == {t: after[t] for t in shared}


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9])
def test_the_fraction_is_kept_to_chance(fraction: float) -> None:
    total = 20_000
    found = Counter(sides(SplitRule(fraction, 0), (row(str(i)) for i in range(total))))
    deviation = (total * fraction * (1 - fraction)) ** 0.5
    assert abs(found["eval"] - total * fraction) < 4 * deviation


def test_these_sides_are_the_same_for_ever() -> None:
    # Prepared data and reported scores hang on it: a change here is a change of everyone's split.
    rows = [row(str(i)) for i in range(12)] + [row("x", group=str(i)) for i in range(12)]
    found = "".join(side[0] for side in sides(SplitRule(0.5, seed=7), rows))
    assert found == "eeettettteteettttetettee"


def test_another_seed_is_another_split_and_a_larger_fraction_only_adds() -> None:
    rows = [row(str(i)) for i in range(1000)]
    small, large, other = (
        {r.completion for r in rows if rule.side_of(r, content_text(r)) == "eval"}
        for rule in (SplitRule(0.1, 1), SplitRule(0.3, 1), SplitRule(0.1, 2))
    )
    assert small < large
    assert len(small & other) < 40  # 10 if independent


def test_equal_rows_are_together() -> None:
    rule = SplitRule(0.5, 0)
    for i in range(200):
        assert len(set(sides(rule, [row(f"a {i}", row_id=f"{n}") for n in range(3)]))) == 1


def test_a_group_is_on_one_side_and_is_not_mistaken_for_a_text() -> None:
    rule = SplitRule(0.5, 0)
    rows = [row(f"text {i}", group=f"thread {i % 300}") for i in range(3000)]
    of_group: dict[str | None, set[str]] = {}
    for r, side in zip(rows, sides(rule, rows), strict=True):
        of_group.setdefault(r.group, set()).add(side)
    assert all(len(found) == 1 for found in of_group.values())
    assert {"train", "eval"} == set().union(*of_group.values())
    # The empty group is a group; None is none.
    assert len(set(sides(rule, [row(str(i), group="") for i in range(50)]))) == 1
    assert len(set(sides(rule, [row(str(i)) for i in range(50)]))) == 2
    alone = [rule.side_of(row("\n" + str(i)), str(i)) for i in range(100)]
    grouped = [rule.side_of(row("t", group=str(i)), "t") for i in range(100)]
    assert alone != grouped


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_fraction_that_leaves_a_side_empty(fraction: float) -> None:
    with pytest.raises(ConfigError, match="eval_fraction"):
        SplitRule(fraction, 0)


def test_an_empty_side_says_the_counts_and_what_to_do() -> None:
    check_sides(1, 1)
    with pytest.raises(DataError, match=r"10 rows to train and 0 to eval.*Raise.*eval_fraction"):
        check_sides(10, 0)
    with pytest.raises(DataError, match=r"0 rows to train and 10 to eval.*Lower.*eval_fraction"):
        check_sides(0, 10)
    with pytest.raises(DataError, match="0 rows to train"):
        plan_split([row(str(i), group="one") for i in range(10)], 0.999999, 0)
    with pytest.raises(DataError, match="0 rows to train and 0 to eval"):
        plan_split([], 0.5)


def test_plan_split_by_hash_is_the_rule_itself() -> None:
    assert plan_split([row(str(i)) for i in range(100)], 0.5, 4) == SplitRule(0.5, 4)


# By time


def test_the_latest_rows_are_for_evaluation() -> None:
    rows = [row(str(i), time=i * 1.5) for i in range(100)]
    random.Random(1).shuffle(rows)
    rule = plan_split(rows, 0.2, by_time=True)
    late = {r.completion for r in rows if rule.side_of(r, "") == "eval"}
    assert late == {str(i) for i in range(80, 100)}
    assert rule.by_time
    assert rule.threshold == 120.0


def test_ties_at_the_threshold_all_go_to_eval() -> None:
    rows = [row(str(i), time=time) for i, time in enumerate([1, 2, 3, 3, 3, 3, 4])]
    rule = plan_split(rows, 0.3, by_time=True)  # two rows wanted
    assert sides(rule, rows) == ["train", "train", "eval", "eval", "eval", "eval", "eval"]


def test_a_group_is_as_late_as_its_latest_row() -> None:
    rows = [row("a1", "a", 1), row("a2", "a", 100), row("b", "b", 50)]
    rows += [row(str(i), None, i) for i in range(2, 9)]
    rule = plan_split(rows, 0.2, by_time=True)
    assert sides(rule, rows) == ["eval", "eval"] + ["train"] * 8
    # A group that was not there in the first pass is judged by its own time.
    assert sides(rule, [row("c", "c", 101), row("c", "c", 3)]) == ["eval", "train"]


@given(
    st.lists(
        st.tuples(st.sampled_from([None, "a", "b", "c", "d"]), st.integers(0, 20)),
        min_size=2,
        max_size=40,
    ),
    st.floats(0.01, 0.99),
)
def test_time_split_against_the_definition(
    pairs: list[tuple[str | None, int]], fraction: float
) -> None:
    rows = [row(str(i), group, time) for i, (group, time) in enumerate(pairs)]
    own = [max(t for h, t in pairs if h == g) if g is not None else time for g, time in pairs]
    wanted = max(1, min(round(fraction * len(rows)), len(rows) - 1))
    # The latest cut between different times that gives eval at least the rows wanted.
    cut = max(t for t in own if sum(o >= t for o in own) >= wanted)
    expected = ["eval" if t >= cut else "train" for t in own]
    if "train" not in expected:
        with pytest.raises(DataError, match="without rows"):
            plan_split(rows, fraction, by_time=True)
        return
    found = sides(plan_split(rows, fraction, by_time=True), rows)
    assert found == expected
    # Nothing trained on is later than, or of the time of, what is evaluated without a group.
    trained = [t for (_, t), side in zip(pairs, found, strict=True) if side == "train"]
    judged = [t for (g, t), s in zip(pairs, found, strict=True) if s == "eval" and g is None]
    assert not judged or max(trained) < min(judged)


def test_texts_of_time_are_ordered_as_moments() -> None:
    times = ["2024-05-01T10:00:00Z", "2024-05-01T09:00:00-05:00", "2024-05-01T12:00:00.5+00:00"]
    assert [parse_time(row("t", time=t))[0] - 1714557600 for t in times] == [0, 4 * 3600, 7200.5]
    rows = [
        row(t, time=t) for t in ("2024-01-31", "2023-12-01", "2024-02-01T00:00:00", "2020-01-01")
    ]
    rule = plan_split(rows, 0.5, by_time=True)
    assert sides(rule, rows) == ["eval", "train", "eval", "train"]


@pytest.mark.parametrize(
    "time",
    [None, True, float("nan"), float("inf"), "", "yesterday", "1714557600", "2024-13-01", [2024]],
)
def test_a_time_that_cannot_be_used_names_the_row(time: object) -> None:
    rows = [row("a", time=1.0), row("b", time=time, row_id="rows.jsonl:17")]
    with pytest.raises(DataError, match=r"rows\.jsonl:17: the time .* expected"):
        plan_split(rows, 0.5, by_time=True)


@pytest.mark.parametrize(
    ("one", "other"), [(1, "2024-01-01"), ("2024-01-01", "2024-01-01T00:00:00Z")]
)
def test_times_of_two_forms_are_refused(one: object, other: object) -> None:
    times = TimeSplit(0.5)
    times.add(row("a", time=one, row_id="f:1"))
    with pytest.raises(DataError, match=r"f:2: the time .*f:1 has .*can't be ordered"):
        times.add(row("b", time=other, row_id="f:2"))


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_rows_for_two_sides(count: int) -> None:
    with pytest.raises(DataError, match="expected some on both sides"):
        plan_split([row("a", time=1)] * count, 0.5, by_time=True)


def test_all_rows_of_one_time_leave_train_empty() -> None:
    with pytest.raises(DataError, match="leaves train without rows.*all 5 rows"):
        plan_split([row(str(i), time=3) for i in range(5)], 0.2, by_time=True)


# A row's own split


def messages(*templates: dict) -> Row:
    return Row("f:1", "messages", messages=tuple(Message(t) for t in templates))


def test_content_text() -> None:
    assert content_text(Row("f:1", "prompt_completion", "p", "c")) == "p\nc"
    turns = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"})
    assert content_text(messages(*turns)) == "user\nhi\nassistant\nhello"


def test_content_text_has_the_calls_but_not_their_ids() -> None:
    def calling(call_id: str, city: str) -> str:
        function = {"name": "weather", "arguments": {"city": city}}
        call = {"id": call_id, "type": "function", "function": function}
        return content_text(messages({"role": "assistant", "content": None, "tool_calls": [call]}))

    assert calling("1", "Bern") == calling("2", "Bern") != calling("1", "Basel")
    assert "weather" in calling("1", "Bern")


def test_content_text_takes_what_is_not_a_text() -> None:
    parts = [{"type": "text", "text": "grüezi"}]
    assert "grüezi" in content_text(messages({"role": "user", "content": parts}))
    # Half a surrogate pair is text to Python; the hash takes it too.
    assert SplitRule(0.5, 0).side_of(row("\ud83d"), "\ud83d") in ("train", "eval")


def test_content_text_ignores_who_and_where() -> None:
    one = Row("f:1", "text", "", "t", source="a", weight=2.0, group="g", time=3)
    assert content_text(one) == content_text(Row("f:2", "text", "", "t"))
