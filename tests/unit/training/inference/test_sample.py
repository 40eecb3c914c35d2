"""Rejection sampling with an engine that answers at once: files, resume, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from torchprime.config.schema import TrainConfig
from torchprime.errors import ConfigError, DataError, UserError
from torchprime.training.inference.engine import OpenEngine
from torchprime.training.inference.sample import SampleRequest, number_of, sample_rows

Parrot = Callable[..., tuple[OpenEngine, list[int]]]


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def request(tiny: Path, out: Path, **more: Any) -> SampleRequest:
    return SampleRequest(**{"model": str(tiny), "out": out, "answers": 6, "seed": 3, **more})


def files(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in out.iterdir() if not p.name.startswith(".")}


def test_right_answers_become_rows(
    config: TrainConfig, tiny: Path, tmp_path: Path, parrot: Parrot
) -> None:
    said: list[str] = []
    open_engine, calls = parrot()
    sample_rows(config, request(tiny, tmp_path / "out"), open_engine, said.append)
    assert calls == [12] * 17  # two rows at a time
    samples, rows = (read_lines(tmp_path / "out" / n) for n in ("samples.jsonl", "rows.jsonl"))
    assert len(samples) == 34 * 6 and len({s["row_id"] for s in samples}) == 34
    # Of WORDS three say yes in at most two words: the third repeats the first.
    assert [r["completion"] for r in rows] == ["yes", "yes yes", "well, yes"] * 34
    first = rows[0]["provenance"]
    assert first["grades"] == {"says_yes": 1.0, "short": 1.0, "characters": 3.0}
    assert first["seed"] == 3 and len(first["sha256"]["weights"]) == 64
    assert "136 of 204 answers are right (66.7%), for 34 of 34 rows; kept 102" in said[-2]
    settings = json.loads((tmp_path / "out" / "sampling.json").read_text())
    assert (settings["engine"], settings["number_of_rows"]) == ("parrot", 34)


@pytest.mark.parametrize(("dies_after", "torn"), [(0, b""), (3, b""), (5, b'{"row_id": "tr')])
def test_a_killed_sampling_goes_on_and_writes_the_same(
    config: TrainConfig, tiny: Path, tmp_path: Path, parrot: Parrot, dies_after: int, torn: bytes
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    sample_rows(config, request(tiny, whole, keep=1), parrot()[0], print)
    with pytest.raises(KeyboardInterrupt):
        sample_rows(config, request(tiny, cut, keep=1), parrot(dies_after)[0], print)
    assert not (cut / "rows.jsonl").exists()
    if torn:
        with (cut / "samples.jsonl").open("ab") as file:
            file.write(torn)
    open_engine, calls = parrot()
    sample_rows(config, request(tiny, cut, keep=1), open_engine, print)
    assert len(calls) == 17 - dies_after
    assert files(cut) == files(whole)


def test_held_out_rows_and_few_of_them(
    config: TrainConfig, tiny: Path, tmp_path: Path, parrot: Parrot
) -> None:
    given = request(tiny, tmp_path / "out", side="eval", limit=3, right=["says_yes"], answers=1)
    open_engine, calls = parrot()
    sample_rows(config, given, open_engine, print)
    ids = [s["row_id"] for s in read_lines(tmp_path / "out" / "samples.jsonl")]
    assert ids == [f"heldout.jsonl:{n}" for n in (1, 2, 3)] and calls == [3]


def test_other_settings_are_not_mixed(
    config: TrainConfig, tiny: Path, tmp_path: Path, parrot: Parrot
) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        sample_rows(config, request(tiny, out), parrot(2)[0], print)
    before = files(out)
    with pytest.raises(ConfigError, match="--out: .* other settings: seed is 3 there and 4 now"):
        sample_rows(config, request(tiny, out, seed=4), parrot()[0], print)
    assert files(out) == before


def test_no_right_answer_is_an_error_that_keeps_the_samples(
    config: TrainConfig, tiny: Path, tmp_path: Path, parrot: Parrot
) -> None:
    graders = [{"name": "never", "kind": "regex", "pattern": "maybe"}]
    config = replace(config, eval=replace(config.eval, graders=graders))
    with pytest.raises(DataError, match="No answer is kept.*samples.jsonl"):
        sample_rows(config, request(tiny, tmp_path / "out"), parrot()[0], print)
    assert len(read_lines(tmp_path / "out" / "samples.jsonl")) == 204


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature": 0.0}, "--temperature: given 0, expected above 0: .* --answers 1"),
        ({"temperature": -1.0}, "--temperature: given -1.0, expected 0 (greedy) or more"),
        ({"top_p": 0.0}, "--top-p: given 0.0, expected above 0 and at most 1"),
        ({"top_k": 0}, "--top-k: given 0, expected 1 or more"),
        ({"max_new_tokens": 0}, "--max-new-tokens: given 0, expected 1 or more"),
        ({"right": ["rite"]}, "--right: given 'rite', .* passes or fails: says_yes, short"),
        ({"right": ["characters"]}, "--right: given 'characters', expected a grader that passes"),
        ({"out": "{tmp}/used"}, "--out: .*used holds notes.txt, which is not of a sampling"),
        ({"out": "{tmp}/done"}, "--out: .*done holds a complete sampling"),
        ({"model": "no/such/folder"}, "There is no local folder no/such/folder"),
    ],
)
def test_a_mistake_is_one_message_before_weights_are_read(
    config: TrainConfig, tiny: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    for name, file in (("used", "notes.txt"), ("done", "rows.jsonl")):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text("")
    if "out" in changes:
        changes = {"out": Path(changes["out"].format(tmp=tmp_path))}

    def open_engine(inputs: Any) -> Any:
        raise AssertionError("weights are read")

    given = request(tiny, **{"out": tmp_path / "out", **changes})
    pattern = re.compile(said.replace("(", r"\(").replace(")", r"\)"))
    with pytest.raises(UserError, match=pattern):
        sample_rows(config, given, open_engine, print)


def test_no_grader_is_a_message(config: TrainConfig, tiny: Path, tmp_path: Path, parrot) -> None:
    bare = replace(config, eval=replace(config.eval, graders=[]))
    with pytest.raises(ConfigError, match=r"eval.graders: given \[\], expected graders"):
        sample_rows(bare, request(tiny, tmp_path / "out"), parrot()[0], print)
    only = [each for each in config.eval.graders if each["kind"] == "length"]
    bare = replace(config, eval=replace(config.eval, graders=only))
    with pytest.raises(ConfigError, match=r"eval.graders: given \['characters'\], .*only measure"):
        sample_rows(bare, request(tiny, tmp_path / "out"), parrot()[0], print)


def test_numbers_fit_and_differ_within_a_row() -> None:
    ids = [f"train.jsonl:{n}" for n in range(500)]
    found = [[number_of(row_id, n) for n in range(8)] for row_id in ids]
    assert all(-(2**31) <= n < 2**31 for row in found for n in row)
    assert all(len(set(row)) == 8 for row in found)
    assert len({row[0] for row in found}) == 500
