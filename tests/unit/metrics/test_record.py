"""Records become one line of JSON that any reader accepts, and come back unchanged."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from torchprime.metrics.record import EvalRecord, GradedScore, StepRecord, from_json, to_json


def refuse_constant(name: str) -> float:
    raise AssertionError(f"bare {name} is not JSON")


def parse_strictly(line: str) -> dict:
    return json.loads(line, parse_constant=refuse_constant)


def test_a_step_s_line_has_exactly_the_documented_keys(step_record: StepRecord) -> None:
    assert parse_strictly(to_json(replace(step_record, compiles=1))) == {
        "kind": "train",
        "step": 10,
        "epoch": 0.25,
        "loss": 1.2345,
        "grad_norm": 0.98,
        "lr": 1e-4,
        "supervised_tokens": 600,
        "real_tokens": 900,
        "slot_tokens": 1024,
        "batch_hash": "0123456789abcdef",
        "step_seconds": 1.0,
        "supervised_tokens_per_s": 512.4,
        "slot_tokens_per_s": 1024.0,
        "mfu": None,
        "device_memory_bytes": None,
        "host_memory_bytes": 1073741824,
        "compiles": 1,
    }


def test_an_evaluation_s_line_carries_the_perplexity() -> None:
    line = to_json(EvalRecord(step=0, eval_loss=math.log(8), eval_supervised_tokens=7, seconds=0.5))
    values = parse_strictly(line)
    assert values.pop("eval_perplexity") == pytest.approx(8)
    assert values == {
        "kind": "eval",
        "step": 0,
        "eval_loss": math.log(8),
        "eval_supervised_tokens": 7,
        "seconds": 0.5,
    }


@pytest.mark.parametrize("word", ["nan", "inf", "-inf"])
def test_a_number_json_cannot_hold_is_null_and_named(step_record: StepRecord, word: str) -> None:
    values = parse_strictly(to_json(replace(step_record, loss=float(word))))
    assert values["loss"] is None
    assert values["nonfinite"] == {"loss": word}


@pytest.mark.parametrize("word", ["nan", "inf", "-inf"])
def test_reading_puts_the_number_back_and_leaves_the_unknown_alone(
    step_record: StepRecord, word: str
) -> None:
    values = from_json(to_json(replace(step_record, loss=float(word))))
    assert str(values["loss"]) == word
    assert values["mfu"] is None
    assert "nonfinite" not in values


def test_a_term_json_cannot_hold_comes_back(step_record: StepRecord) -> None:
    line = to_json(replace(step_record, terms={"kl": math.nan, "z_loss": 0.5}))
    values = parse_strictly(line)
    assert values["terms"] == {"kl": None, "z_loss": 0.5}
    assert values["nonfinite"] == {"terms": {"kl": "nan"}}
    read = from_json(line)["terms"]
    assert math.isnan(read["kl"]) and read["z_loss"] == 0.5


def test_a_perplexity_past_the_largest_float_is_infinite() -> None:
    record = EvalRecord(step=1, eval_loss=1e4, eval_supervised_tokens=1, seconds=1.0)
    assert parse_strictly(to_json(record))["nonfinite"] == {"eval_perplexity": "inf"}


def test_a_line_becomes_its_record_again(step_record: StepRecord) -> None:
    values = from_json(to_json(replace(step_record, loss=math.inf)))
    assert StepRecord.from_dict(values | {"later": 1}) == replace(step_record, loss=math.inf)
    with pytest.raises(TypeError, match="lr"):
        StepRecord.from_dict({name: value for name, value in values.items() if name != "lr"})


def test_an_evaluation_s_line_becomes_its_record_again() -> None:
    score: GradedScore = {"value": 1, "count": 2, "low": 0, "high": 1, "interval": "wilson"}
    record = EvalRecord(3, 2.5, 7, 0.5, scores={"right": score}, share_of_run=0.25)
    assert EvalRecord.from_dict(from_json(to_json(record))) == record


def test_a_line_that_is_no_object_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a JSON object, got list"):
        from_json("[1, 2]")
