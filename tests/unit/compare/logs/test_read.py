"""Every kind of log that a run may be read from, with what its numbers stand for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from torchprime.compare.logs.numbers_in_text import half_digits
from torchprime.compare.logs.read import read_run
from torchprime.errors import DataError
from torchprime.metrics.record import StepRecord
from torchprime.metrics.writers import ConsoleWriter, JsonlWriter


@pytest.fixture
def record(step_record: StepRecord) -> StepRecord:
    return replace(step_record, step=1, loss=2.5, grad_norm=1.5, supervised_tokens_per_s=1512.4)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    def make(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return make


# Ours ---------------------------------------------------------------------------------------------


def test_a_run_folder_gives_its_records_facts_and_config(
    write, record: StepRecord, tmp_path: Path
) -> None:
    writer = JsonlWriter(tmp_path / "run" / "metrics.jsonl")
    writer.write(record)
    writer.close()
    write("run/run.json", {"model": {"dtype": "bfloat16"}, "backend": "torch_xla"})
    write("run/config.yaml", "seed: 7\ntask:\n  max_steps: 3\n")
    run = read_run("mine", tmp_path / "run")
    logged = run.steps[1]
    assert (logged.loss, logged.grad_norm, logged.lr) == (2.5, 1.5, 1e-4)
    assert (logged.supervised_tokens, logged.batch_hash) == (600, "0123456789abcdef")
    assert logged.supervised_tokens_per_s == 1512.4 and not logged.rounding
    assert run.dtype == "bfloat16" and run.config["task"] == {"max_steps": 3}
    assert read_run("x", tmp_path / "run" / "metrics.jsonl").facts == run.facts


def test_the_dtype_is_the_configs_where_run_json_is_missing(write, tmp_path: Path) -> None:
    write("run/metrics.jsonl", '{"step": 1, "loss": 2.0}\n')
    assert read_run("x", tmp_path / "run").dtype is None
    write("run/config.yaml", "torch_dtype: float32\n")
    assert read_run("x", tmp_path / "run").dtype == "float32"


def test_of_a_repeated_step_the_last_record_wins(write) -> None:
    lines = [(1, 3.0), (2, 2.0), (3, 9.0), (3, 1.5), (2, 2.25), (4, 1.0)]
    text = "".join(json.dumps({"kind": "train", "step": s, "loss": x}) + "\n" for s, x in lines)
    run = read_run("x", write("metrics.jsonl", text))
    assert {s: logged.loss for s, logged in run.steps.items()} == {1: 3.0, 2: 2.25, 3: 1.5, 4: 1.0}
    assert list(run.steps) == [1, 2, 3, 4]


def test_a_torn_last_line_is_left_out(write) -> None:
    text = '{"kind": "train", "step": 1, "loss": 3.0}\n{"kind": "train", "step": 2, "lo'
    assert list(read_run("x", write("metrics.jsonl", text)).steps) == [1]


def test_nan_and_unknown_are_not_the_same(write) -> None:
    text = (
        '{"kind": "train", "step": 1, "loss": null, "grad_norm": null, '
        '"nonfinite": {"loss": "nan"}}\n'
        '{"kind": "train", "step": 2, "loss": 1.0, "grad_norm": null}\n'
    )
    steps = read_run("x", write("metrics.jsonl", text)).steps
    assert math.isnan(steps[1].loss or 0) and steps[1].grad_norm is None
    assert steps[2].grad_norm is None


def test_held_out_losses_are_kept_apart(write) -> None:
    text = (
        '{"kind": "eval", "step": 0, "eval_loss": 7.0}\n'
        '{"kind": "train", "step": 1, "loss": 3.0}\n'
        '{"kind": "eval", "step": 1, "eval_loss": 6.0}\n'
    )
    run = read_run("x", write("metrics.jsonl", text))
    assert dict(run.heldout) == {0: 7.0, 1: 6.0} and list(run.steps) == [1]


# transformers -------------------------------------------------------------------------------------

STATE = {
    "best_metric": None,
    "epoch": 1.0,
    "eval_steps": 500,
    "global_step": 30,
    "logging_steps": 10,
    "max_steps": 30,
    "log_history": [
        {"epoch": 0.3, "grad_norm": 3.25, "learning_rate": 1e-05, "loss": 2.123456789, "step": 10},
        {"epoch": 0.3, "eval_loss": 2.5, "eval_runtime": 1.0, "step": 10},
        {"epoch": 0.6, "grad_norm": 2.25, "learning_rate": 9e-06, "loss": 1.987654321, "step": 20},
        {"epoch": 1.0, "grad_norm": 1.25, "learning_rate": 8e-06, "loss": 1.5, "step": 30},
        {"epoch": 1.0, "step": 30, "total_flos": 1e12, "train_loss": 1.87, "train_runtime": 9.5},
    ],
}


def test_a_trainer_state_is_read_with_its_means(write, tmp_path: Path) -> None:
    run = read_run("hf", write("out/trainer_state.json", STATE))
    assert list(run.steps) == [10, 20, 30] and dict(run.heldout) == {10: 2.5}
    assert run.steps[20].loss == 1.987654321 and run.steps[20].lr == 9e-06
    assert [logged.mean_over for logged in run.steps.values()] == [10, 10, 10]
    assert any("means" in note for note in run.notes)
    assert not run.steps[10].rounding  # nine decimals were not rounded to four
    assert read_run("x", tmp_path / "out").steps == run.steps


def test_losses_of_older_transformers_are_known_to_be_rounded(write) -> None:
    history = [{"step": 1, "loss": 2.1235, "grad_norm": 3.123456789}, {"step": 2, "loss": 0.5}]
    run = read_run("hf", write("trainer_state.json", {"log_history": history}))
    assert run.steps[1].rounding == {"loss": pytest.approx(5e-5)}
    assert run.steps[2].rounding == {"loss": pytest.approx(5e-5)}
    assert any("rounded" in note for note in run.notes)


def test_a_resumed_trainers_history(write) -> None:
    history = [{"step": s, "loss": x} for s, x in [(1, 3.0), (2, 2.123456), (2, 2.5), (3, 1.0)]]
    run = read_run("hf", write("trainer_state.json", {"log_history": history}))
    assert {s: logged.loss for s, logged in run.steps.items()} == {1: 3.0, 2: 2.5, 3: 1.0}
    assert {logged.mean_over for logged in run.steps.values()} == {1}


def test_bare_nan_in_a_trainer_state(write) -> None:
    text = '{"log_history": [{"loss": NaN, "step": 1}, {"loss": Infinity, "step": 2}]}'
    steps = read_run("hf", write("trainer_state.json", text)).steps
    assert math.isnan(steps[1].loss or 0) and steps[2].loss == math.inf


def test_of_several_checkpoints_the_last_is_read(write, tmp_path: Path) -> None:
    for step in (5, 10, 100):
        state = {"log_history": [{"step": s, "loss": 1.0 / s} for s in range(1, step + 1)]}
        write(f"out/checkpoint-{step}/trainer_state.json", state)
    assert max(read_run("hf", tmp_path / "out").steps) == 100


def test_printed_dicts_of_transformers_4(write) -> None:
    text = (
        "some warning\n"
        " 33%|###   | 1/3 [00:01<00:02]{'loss': 2.1, 'grad_norm': 3.2, 'learning_rate': 1e-05, "
        "'epoch': 0.33}\n"
        "{'loss': nan, 'grad_norm': inf, 'learning_rate': 5e-06, 'epoch': 0.67}\n"
        "{'eval_loss': 1.9, 'eval_runtime': 0.5, 'epoch': 0.67}\n"
        "{'loss': 1.1234, 'grad_norm': 1.2, 'learning_rate': 0.0, 'epoch': 1.0}\n"
        "{'train_runtime': 1.5, 'train_steps_per_second': 2.0, 'train_loss': 1.7, 'epoch': 1.0}\n"
    )
    run = read_run("hf", write("log.txt", text))
    assert list(run.steps) == [1, 2, 3]
    first = run.steps[1]
    assert (first.loss, first.grad_norm, first.lr) == (2.1, 3.2, 1e-05)
    assert math.isnan(run.steps[2].loss or 0) and run.steps[2].grad_norm == math.inf
    assert dict(run.heldout) == {2: 1.9} and run.steps[3].lr == 0.0
    # Python prints floats in full: only the loss was rounded.
    assert first.rounding == {"loss": pytest.approx(5e-5)}
    assert any("no steps" in note for note in run.notes)


def test_printed_dicts_of_transformers_5_have_four_digits(write) -> None:
    text = (
        "{'loss': '12.35', 'grad_norm': '3.2', 'learning_rate': '1e-05', 'epoch': '0.5'}\n"
        "{'loss': '0.8765', 'grad_norm': '123.4', 'learning_rate': '9.995e-06', 'epoch': '1'}\n"
        "{'train_runtime': '1.5', 'train_steps_per_second': '1.333', 'epoch': '1'}\n"
    )
    steps = read_run("hf", write("train.log", text)).steps
    assert (steps[1].loss, steps[2].loss) == (12.35, 0.8765)
    assert steps[1].rounding["loss"] == pytest.approx(0.005)
    assert steps[2].rounding["loss"] == pytest.approx(5e-5)
    assert steps[1].rounding["lr"] == pytest.approx(5e-9)  # 1.000e-05
    assert steps[2].rounding["lr"] == pytest.approx(5e-10)


def test_printed_dicts_of_every_tenth_step_cannot_be_placed(write) -> None:
    lines = "{'loss': 2.1, 'epoch': 0.1}\n" * 5
    text = lines + "{'train_runtime': 10.0, 'train_steps_per_second': 5.0, 'epoch': 1.0}\n"
    with pytest.raises(DataError, match=r"5 lines .* about 50 steps"):
        read_run("hf", write("log.txt", text))


# Other texts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("step 12/60 loss 1.23 more", (12, 1.23, None, None)),
        ("Step: 12, loss: 1.23", (12, 1.23, None, None)),
        ("[ 12/60] loss=1.23 lr=1e-5 grad_norm=0.4", (12, 1.23, 0.4, 1e-5)),
        ("[2026-01-02 10:00:00][INFO] - Epoch: 0.1, step: 12, loss: 1.2300, lr: 1e-05, "
         "trace time: 3.4 ms", (12, 1.23, None, 1e-5)),
        ("\x1b[31mstep: 12  \x1b[32mloss:  1.2300  \x1b[33mgrad_norm:  0.4000\x1b[0m",
         (12, 1.23, 0.4, None)),
        ("iter 12: train/loss 1.23, val/loss 9.9", (12, 1.23, None, None)),
        ("lr: 1.0E-05 | gnorm 0.4 | train_loss 1.23 | global_step=12", (12, 1.23, 0.4, 1e-5)),
        ("step 12 loss nan grad norm inf", (12, math.nan, math.inf, None)),
        ("step 12 loss .5 learning rate 1", (12, 0.5, None, 1.0)),
        ("step=12 loss=-0.25.", (12, -0.25, None, None)),
    ],
)  # fmt: skip
def test_lines_of_the_family(write, line: str, expected: tuple) -> None:
    run = read_run("x", write("old.log", f"start\n{line}\nstep 13 loss 1.0\n"))
    logged = run.steps[12]
    step, *numbers = expected
    assert logged.step == step
    for found, wanted in zip((logged.loss, logged.grad_norm, logged.lr), numbers, strict=True):
        assert found == wanted or (found is not None and math.isnan(found) and math.isnan(wanted))


@pytest.mark.parametrize(
    "line",
    [
        "step 12 val_loss 1.0",
        "step 12 validation loss 1.0",
        "eval at step 12: loss 1.0",
        "loss 1.0 after 0.66 s/step 12",
        "steps 12 loss 1.0",
        "step 12 loss scale 65536",
        "step 12 loss: n/a",
        "step 12 avg loss 1.0",
    ],
)
def test_lines_that_are_no_training_step(write, line: str) -> None:
    run = read_run("x", write("old.log", f"step 1 loss 2.0\n{line}\n"))
    assert list(run.steps) == [1]


def test_our_own_lines_are_read_back(record: StepRecord, tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    with path.open("w") as stream:
        writer = ConsoleWriter(total_steps=6, stream=stream)
        writer.write(record)
        writer.close()
    logged = read_run("x", path).steps[1]
    assert (logged.loss, logged.grad_norm, logged.lr) == (2.5, 1.5, 1e-4)
    assert logged.supervised_tokens_per_s == 1512
    assert logged.rounding["loss"] == pytest.approx(5e-5)  # 2.5000
    assert logged.rounding["lr"] == pytest.approx(5e-7)  # 1.00e-04


def test_steps_counted_from_zero_are_moved(write) -> None:
    run = read_run("x", write("old.log", "step 0 loss 3.0\nstep 1 loss 2.0\n"))
    assert {s: logged.loss for s, logged in run.steps.items()} == {1: 3.0, 2: 2.0}
    assert any("from 0" in note for note in run.notes)


@pytest.mark.parametrize(
    ("texts", "halves"),
    [
        # Fixed decimals: every number hides half of the last one.
        (["12.1234", "0.1234", "0.0100"], [5e-5, 5e-5, 5e-5]),
        # Four digits, zeros cut off: it depends on the number's size.
        (["12.35", "9.876", "123.4"], [5e-3, 5e-4, 5e-2]),
        (["1.00e-04", "2.5e-05", None], [5e-7, 5e-8, None]),
        # At least three digits are taken to be good.
        (["1e-5"], [5e-8]),
        (["nan", "2.50"], [None, 5e-3]),
        (["0.00", "0.25"], [5e-3, 5e-3]),
    ],
)
def test_what_rounding_hides(texts: list[str | None], halves: list[float | None]) -> None:
    assert half_digits(texts, 3) == [half and pytest.approx(half) for half in halves]


# Unreadable logs ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("run/notes.txt", "", "neither metrics.jsonl nor trainer_state.json"),
        ("metrics.jsonl", "", "no training loss"),
        ("metrics.jsonl", '{"kind": "eval", "step": 1, "eval_loss": 1.0}\n', "no training loss"),
        ("metrics.jsonl", '{"kind": "train", "step": 1, "loss": "low"}\n', "'low'"),
        ("metrics.jsonl", '{"kind": "train", "step": "1", "loss": 1.0}\n', "whole number"),
        ("metrics.jsonl", '{"kind": "train", "step": 1, "loss": true}\n', "True"),
        ("metrics.jsonl", "not json\n", "line 1"),
        ("metrics.jsonl", "[" * 100_000 + "\n", "line 1.*nested too deeply"),
        ("metrics.jsonl", '{"step": 1, "loss": 1%s}\n' % ("0" * 400), "a number of 401 digits"),
        ("metrics.jsonl", '{"step": 1, "nonfinite": 1}\n', "nonfinite is not as"),
        ("metrics.jsonl", '{"step": 1, "nonfinite": ["loss"]}\n', "nonfinite is not as"),
        ("metrics.jsonl", '{"step": 1, "nonfinite": {"loss": {}}}\n', "nonfinite is not as"),
        ("metrics.jsonl", '{"nonfinite": {"source_losses": {"a": 1}}}\n', "nonfinite is not as"),
        ("metrics.jsonl", '{"step": 10000001, "loss": 1.0}\n', "whole number up to 10,000,000"),
        ("trainer_state.json", "[" * 100_000, "is not JSON"),
        ("train.log", "step: 99999999 loss: 1.5\n", "a step 99999999, expected a whole number"),
        ("train.log", "{'loss': 1.5, 'step': 'nan'}\n", "step is nan"),
        ("trainer_state.json", "{", "is not JSON"),
        ("trainer_state.json", "[1]", "log_history"),
        ("trainer_state.json", '{"log_history": [1]}', "log_history"),
        ("train.log", "nothing of use\n", "no training loss"),
    ],
)
def test_what_cannot_be_read_is_said(write, name: str, content: str, said: str) -> None:
    path = write(name, content)
    with pytest.raises(DataError, match=said):
        read_run("x", path.parent if path.name == "notes.txt" else path)


def test_a_long_history_with_odd_totals_is_read_soon(write) -> None:
    """The start of a mean is looked for among all steps."""
    records = [{"step": 10**7 - k, "loss": 1.0} for k in (400, 300, 200, 100, 0)]
    end = {"step": 10**7, "train_loss": 0.123, "train_runtime": 1e308}
    state = {"log_history": [*records, end], "max_steps": "many"}
    assert len(read_run("x", write("trainer_state.json", json.dumps(state))).steps) == 5
    del end["train_loss"]
    end["train_steps_per_second"] = 1e308
    assert len(read_run("x", write("trainer_state.json", json.dumps(state))).steps) == 5


def test_a_printed_number_beyond_floats(write) -> None:
    run = read_run("x", write("train.log", "step: 1 loss: 1e400\nstep: 2 loss: 2.5\n"))
    assert run.steps[1].loss == float("inf") and "loss" not in run.steps[1].rounding


def test_tokens_without_end_are_not_counted(write) -> None:
    path = write("metrics.jsonl", '{"step": 1, "loss": 1.0, "supervised_tokens": NaN}\n')
    assert read_run("x", path).steps[1].supervised_tokens is None


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        read_run("x", tmp_path / "nothing")
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\x00\n")
    with pytest.raises(DataError, match="not text"):
        read_run("x", tmp_path)


def test_a_broken_run_json_is_said(write, tmp_path: Path) -> None:
    write("run/metrics.jsonl", '{"step": 1, "loss": 2.0}\n')
    for content in ("{", "[" * 100_000):
        write("run/run.json", content)
        with pytest.raises(DataError, match=r"run\.json"):
            read_run("x", tmp_path / "run")
