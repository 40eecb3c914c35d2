"""The parts of experimental/forgetting/compare.py that train nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from load_script import load_script

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def compare() -> ModuleType:
    return load_script(REPO / "experimental" / "forgetting" / "compare.py")


def result(compare: ModuleType, variant: str, seed: int, right: str, rise: float) -> object:
    """A run in which the questions are right where `right` has a 1."""
    grades = {f"q:{place}": float(mark) for place, mark in enumerate(right)}
    return compare.Result(variant, seed, [], grades, 1.25 + rise, 1.25, 0.5, 9.0)


def test_a_passage_is_on_one_side(compare: ModuleType) -> None:
    rows = [
        {"prompt": f"Story {n // 3}.\nQuestion: {n}?\nAnswer:", "completion": " x"}
        for n in range(300)
    ]
    sides = compare.split_rows([json.dumps(row) for row in rows])
    found = [{json.loads(line)["prompt"].split("\n")[0] for line in sides[s]} for s in sides]
    assert len(sides["train"]) + len(sides["test"]) == 300
    assert not found[0] & found[1]
    assert 0.15 < len(sides["test"]) / 300 < 0.35


def test_stories_begin_like_stories_and_have_no_known_passage(compare: ModuleType) -> None:
    text = (
        "The end of another.\n\nOnce upon a time a dog ran.\n\nIt ran far.\n\n"
        "One day Tom saw a cat. It was red.\n\n\nHe laughed.\n\nOnce there was Sue.\n"
    )
    stories = compare.stories_of(text, ["Tom saw a cat. It was red."])
    assert stories == [
        "The end of another.",
        "Once upon a time a dog ran.\nIt ran far.",
        "Once there was Sue.",
    ]


def test_the_interval_is_of_the_questions_not_of_the_answers(compare: ModuleType) -> None:
    """Three seeds that answer alike tell no more about the questions than one of them."""
    same = [result(compare, "a", seed, "1100", 0.1 * seed) for seed in (1, 2, 3)]
    (three,), (one,) = compare.points_of(same), compare.points_of(same[:1])
    assert three.right.value == 0.5 and three.right.count == 4
    assert (three.right.low, three.right.high) == (one.right.low, one.right.high)
    assert (three.rise, three.lowest, three.highest) == pytest.approx((0.2, 0.1, 0.3))
    mixed = [result(compare, "a", 1, "1100", 0.0), result(compare, "a", 2, "1001", 0.0)]
    assert compare.points_of(mixed)[0].right.value == 0.5


def test_the_frontier_has_what_nothing_beats(compare: ModuleType) -> None:
    results = [
        result(compare, "best answers", 1, "1110", 0.5),
        result(compare, "beaten", 1, "1100", 0.5),
        result(compare, "least rise", 1, "0000", 0.0),
        result(compare, "between", 1, "1100", 0.2),
        result(compare, "twin", 1, "1100", 0.2),
    ]
    points = compare.points_of(results)
    assert compare.frontier(points) == ["best answers", "least rise", "between", "twin"]
    lines = compare.table(points)
    assert len(lines) == 2 + 5
    assert lines[2].startswith("| **best answers** | 75.0% | ") and "| +0.500 |" in lines[2]
    assert lines[3].startswith("| beaten | 50.0% | ")


def test_a_run_that_is_in_the_file_is_not_repeated(
    compare: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, int]] = []

    def run(variant: object, seed: int, inputs: object) -> object:
        ran.append((variant.name, seed))  # type: ignore[attr-defined]
        made = result(compare, variant.name, seed, "10", 0.1)  # type: ignore[attr-defined]
        made.overrides.extend(variant.overrides)  # type: ignore[attr-defined]
        return made

    monkeypatch.setattr(compare, "run", run)
    a, b = compare.Variant("a", "a", ("x=1",)), compare.Variant("b", "b", ("x=2",))
    path = tmp_path / "results.jsonl"
    first = compare.run_missing([a], [1, 2], None, path)
    assert compare.run_missing([a, b], [1, 2], None, path)[0] == first[0]
    assert ran == [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    other = a._replace(overrides=("x=3",))  # the same name, trained in another way
    compare.run_missing([other], [1], None, path)
    assert ran[-1] == ("a", 1) and len(ran) == 5


def test_the_strength_with_the_least_rise_is_chosen_that_costs_few_answers(
    compare: ModuleType,
) -> None:
    searched = [
        result(compare, "nothing", 0, "1" * 8 + "00", 0.9),
        result(compare, "weak", 0, "1" * 8 + "00", 0.6),
        result(compare, "good", 0, "1" * 7 + "000", 0.2),
        result(compare, "strong", 0, "1" * 6 + "0000", 0.1),
        result(compare, "other method", 0, "1" * 8 + "00", 0.0),
    ]
    points = compare.points_of(searched)
    assert compare.chosen(points, ["weak", "good", "strong"]) == "good"
    assert compare.chosen(points, ["strong"]) == "strong"


def test_every_variant_has_its_place_in_table_and_figure(
    compare: ModuleType, tmp_path: Path
) -> None:
    inputs = compare.Inputs(tmp_path, tmp_path)
    names = [each.name for each in compare.searched(inputs)]
    points = compare.points_of([result(compare, name, 0, "10", 0.1) for name in names])
    listed = compare.variants(inputs, points)
    assert len({each.name for each in listed}) == len(listed) and len(set(names)) == len(names)
    results = [result(compare, each.name, 1, "10", 0.1) for each in listed]
    compare.write_table(compare.points_of(results), results, tmp_path / "table.md")
    written = (tmp_path / "table.md").read_text().splitlines()
    assert written[0] == "The base: 1.250 nats per token on held-out stories."
    assert len(written) == 4 + len(listed)
    compare.draw(
        compare.points_of(results), {v.name: v.group for v in listed}, tmp_path / "figure.png"
    )
    assert (tmp_path / "figure.png").stat().st_size > 10_000
