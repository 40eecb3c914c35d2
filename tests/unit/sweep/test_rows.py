"""Ranks of runs by their own rule, whoever made them, and the files that show them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from torchprime.config.load import flat_keys
from torchprime.errors import DataError
from torchprime.sweep.figure import charts_of, standalone
from torchprime.sweep.rows import Measured, Table, parameterization, read_table
from torchprime.sweep.write import shown_measure, write_sweep

KEPT = Path(__file__).parents[2] / "assets" / "run_0_1" / "run"
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A copy of a kept run with other held-out losses and other values of its config."""

    def run(name: str, losses: Mapping[int, float], **changes: Any) -> Path:
        folder = tmp_path / "runs" / name
        shutil.copytree(KEPT, folder)
        path = folder / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            if record["kind"] == "eval" and record["step"] in losses:
                record["eval_loss"] = losses[record["step"]]
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        config = yaml.safe_load((folder / "config.yaml").read_text())
        for key, value in changes.items():
            *sections, last = key.split("__")
            place = config
            for section in sections:
                place = place[section]
            place[last] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return folder

    return run


def evaluated() -> list[int]:
    lines = map(json.loads, (KEPT / "metrics.jsonl").read_text().splitlines())
    return [record["step"] for record in lines if record["kind"] == "eval" and record["step"]]


def ranks(table: Table) -> dict[str, int | None]:
    return {row.run: row.rank for row in table.rows}


def test_ranks_are_of_the_best_steps_and_equal_runs_share_one(make: Make) -> None:
    first, last = evaluated()[0], evaluated()[-1]
    make("a", {first: 3.0, last: 2.0}, seed=1)
    make("b", {first: 1.5, last: 9.0}, seed=2)
    folder = make("c", {first: 5.0, last: 2.0}, seed=3).parent
    table = read_table([folder])
    assert ranks(table) == {"b": 1, "a": 2, "c": 2}
    assert [row.run for row in table.rows] == ["b", "a", "c"]
    assert [row.best_step for row in table.rows] == [first, last, last]
    assert table.winner is not None and table.winner.run == "b"
    assert [row.varied for row in table.rows] == [{"seed": "2"}, {"seed": "1"}, {"seed": "3"}]


def test_gates_and_unfinished_runs_have_no_rank(make: Make) -> None:
    last = evaluated()[-1]
    gates = {"selection__gates": ["eval_loss <= 2.5"]}
    high = dict.fromkeys(evaluated(), 3.0)
    folder = make("bad", high, **gates).parent
    make("good", {**high, last: 2.0}, **gates)
    cut = make("cut", {**high, last: 1.0}, **gates)
    lines = (cut / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in lines if json.loads(line)["step"] < last]
    (cut / "metrics.jsonl").write_text("".join(f"{line}\n" for line in steps))
    table = read_table([folder])
    assert ranks(table) == {"good": 1, "bad": None, "cut": None}
    assert {row.run: row.state for row in table.rows}["cut"] == "unfinished"


def test_a_damaged_run_is_a_row_and_differences_are_noted(make: Make) -> None:
    folder = make("a", {}).parent
    make("b", {}, selection__ranking=["eval_perplexity asc"])
    (make("c", {}) / "run.json").write_text("{")
    facts = json.loads((folder / "b" / "run.json").read_text())
    facts["fingerprints"]["eval"] = "other"
    (folder / "b" / "run.json").write_text(json.dumps(facts))
    table = read_table([folder / "a", folder / "b", folder / "c"])
    damaged = next(row for row in table.rows if row.run == "c")
    assert damaged.state == "failed" and "run.json" in damaged.message
    assert "different selection rules" in table.notes[0]
    assert "2 different sets of held-out rows; their metrics cannot be compared" in table.notes[1]
    with pytest.raises(DataError, match="holds no run"):
        read_table([folder / "a" / "evaluations", folder])


def test_the_files_can_be_read(make: Make, tmp_path: Path) -> None:
    folder = make("a <b>", {}, seed=1).parent
    make("c", {evaluated()[-1]: 0.1}, seed=2)
    out = tmp_path / "out"
    write_sweep([folder], out)
    content = json.loads((out / "sweep.json").read_text())
    assert (content["winner"], content["varied"]) == ("c", ["seed"])
    assert "a <b>" not in (out / "sweep.html").read_text() + (out / "sweep.md").read_text()
    drawn = standalone(charts_of(read_table([folder])))
    assert drawn == (out / "curves.svg").read_text()
    texts = [each.text for each in ElementTree.fromstring(drawn).iter() if each.text]
    assert {"a <b>", "Training loss", "Held-out loss"} <= set(texts)
    winner = yaml.safe_load((out / "winner.yaml").read_text())
    kept = yaml.safe_load((folder / "c" / "config.yaml").read_text())
    assert dict(flat_keys(winner)).items() >= dict(flat_keys(kept["task"], "task.")).items()
    shutil.rmtree(folder / "c")
    for line in (folder / "a <b>").glob("metrics.jsonl"):
        line.write_text("")
    write_sweep([folder], out)
    assert not (out / "winner.yaml").exists()


@pytest.mark.parametrize(
    ("adapter", "told"),
    [
        ({"rank": None}, "all weights"),
        ({}, "all weights"),
        ({"rank": 8}, "LoRA rank 8"),
        ({"rank": 8, "dora": True}, "DoRA rank 8"),
        ({"rank": 8, "base_dtype": "nf4"}, "QLoRA rank 8"),
        ({"rank": 8, "base_dtype": "int8"}, "LoRA rank 8, int8 base"),
        ({"rank": None, "pretrained": "x"}, "LoRA"),
    ],
)
def test_the_parameterization_is_named(adapter: dict[str, Any], told: str) -> None:
    assert parameterization({"adapter": adapter}) == told


def test_a_metric_is_shown_with_its_interval() -> None:
    assert shown_measure(Measured(1.23456)) == "1.2346"
    assert shown_measure(Measured(0.5, 0.4, 0.625, 20)) == "50.0% (40.0 to 62.5)"
    assert shown_measure(Measured(12.34, 11.8, 12.9, 20)) == "12.3 (11.8 to 12.9)"
    assert shown_measure(None) == "-"
