"""Lines as other trainers print them: read surely, or refused with the line.

The lines are written by hand after each trainer's own print statements.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from torchprime.compare.judge import compare
from torchprime.compare.logs.read import read_run
from torchprime.compare.logs.run import HowLogged, LoggedStep, Run
from torchprime.compare.verdict import AGREE, DIFFER
from torchprime.errors import ConfigError, DataError

Write = Callable[..., Path]
EN, NBSP, ARABIC, MINUS = "\u2013", "\u00a0", "\u0661\u0662", "\u2212"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(content: Any, name: str = "run.log") -> Path:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    return make


# One line, and what it says: step, loss, gradient norm, learning rate -----------------------------


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # torchtune: its logger, and its progress bar
        ("Step 12 | loss:1.2345678 lr:2e-05 tokens_per_second_per_gpu:1234.5 grad_norm:0.5 ",
         (12, 1.2345678, 0.5, 2e-05)),
        ("1|12|Loss: 1.2345678:  20%|##   | 12/60 [00:12<00:48,  1.00s/it]",
         (12, 1.2345678, None, None)),
        # MaxText counts from 0
        ("I0804 08:14:00.000000 1 metric_logger.py:196] completed step: 11, seconds: 0.500, "
         "TFLOP/s/device: 200.000, Tokens/s/device: 25,000.000, total_weights: 393216, loss: 1.234",
         (12, 1.234, None, None)),
        # LitGPT counts micro-batches as iter
        ("Epoch 1 | iter 48 step 12 | loss train: 1.234, val: n/a | iter time: 12.34 ms (step) "
         "remaining time: 0:01:00", (12, 1.234, None, None)),
        # torchtitan, in colours, behind torchrun's prefix; and with colours that lost their escape
        ("[rank0]:[titan] 2026-01-02 03:04:05,678 - root - INFO - \x1b[31mstep: 12  \x1b[32mloss:  "
         "1.23456  \x1b[38;2;180;60;0mgrad_norm:  0.4000  \x1b[36mmemory: 12.34GiB(15.00%)  "
         "\x1b[34mtps: 1,234  \x1b[35mmfu: 12.34%\x1b[39m", (12, 1.23456, 0.4, None)),
        ("[31mstep: 12  [32mloss:  1.23456  [33mgrad_norm:  0.4000[0m", (12, 1.23456, 0.4, None)),
        # Megatron and nanotron
        (" iteration       12/    5000 | consumed samples: 192 | elapsed time per iteration (ms): "
         "54568.1 | learning rate: 2.500E-08 | lm loss: 1.519366E+00 | loss scale: 1.0 | grad "
         "norm: 41.408 | number of skipped iterations:   0 |", (12, 1.519366, 41.408, 2.5e-08)),
        ("iteration: 12 / 100 | consumed_tokens: 93.2K | tokens_per_sec: 11.3K | grad_norm: 1.4 | "
         "lr: 3.3e-05 | lm_loss: 9.2", (12, 9.2, 1.4, 3.3e-05)),
        # mlx-lm
        ("Iter 12: Train loss 1.234, Learning Rate 1.000e-05, It/sec 1.5, Tokens/sec 1234.5, "
         "Trained Tokens 1234, Peak mem 3.4 GB", (12, 1.234, None, 1e-05)),
        # srun --label; and a bar that is overwritten by the line behind it
        ("0: step 12 loss 1.5", (12, 1.5, None, None)),
        (" 20%|##  | 12/60 [00:01<00:04]\rstep 12 loss 1.5", (12, 1.5, None, None)),
        ("Epoch [1/3] Step [12/60] loss: 1.5", (12, 1.5, None, None)),
        # numbers
        ("step 1,012 loss 1.5", (1012, 1.5, None, None)),
        ("step: 1,234,567, loss=1.5,lr=1e-5", (1234567, 1.5, None, 1e-5)),
        ("step=12,loss=1,234.5,grad_norm=1e3", (12, 1234.5, 1e3, None)),
        ("step 00012/00100 (12.00%) | loss: 1.5", (12, 1.5, None, None)),
        ("step 12 loss 1.5 (2.5)", (12, 1.5, None, None)),
        ("step 12 loss NaN grad_norm -inf", (12, math.nan, -math.inf, None)),
        ("step 12 loss 1.5 grad_norm: None", (12, 1.5, None, None)),
        ("step 12 600.5 tokens loss 1.5", (12, 1.5, None, None)),
    ],
)  # fmt: skip
def test_a_line_that_is_sure(write: Write, line: str, expected: tuple) -> None:
    run = read_run("x", write(f"start\n{line}\nend\n"))
    (logged,) = run.steps.values()
    found = (logged.step, logged.loss, logged.grad_norm, logged.lr)
    assert repr(found) == repr(expected)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("step 12 loss 2,5000", "2,5000"),
        ("step 12 loss 1,234", "1,234"),
        ("step 12 loss 1.234,5", "1.234,5"),
        ("step 12 loss 2.5,3", "2.5,3"),
        ("step 12 loss 12k", "12k"),
        ("step 12 loss 2.5%", "2.5%"),
        ("step 12 loss 2.5/3.5", "2.5/3.5"),
        (f"step 12 loss 2{EN}3", f"2{EN}3"),
        (f"step 12 loss {MINUS}2.5", f"{MINUS}2.5"),
        ("step 12 loss tensor(2.5, device='cuda:0')", "tensor(2.5,"),
        ("step 12 loss 0x1p3", "0x1p3"),
        ("step 12 loss 1_000.5", "1_000.5"),
        ("step 12 loss 1 234", "1 234"),
        ("step 12 loss 2.5 grad_norm 201K", "201K"),
        ("step 12 loss 2.5 lr 1,5e-05", "1,5e-05"),
        ("step 12 loss 2.5 lr 0,0001", "0,0001"),
        ("step 1k loss 2.5", "1k"),
        ("step 1.2k loss 2.5", "1.2k"),
        ("step 1M loss 2.5", "1M"),
        ("step 1,01 loss 2.5", "1,01"),
        ("step 1.010 loss 2.5", "1.010"),
        ("step 12.0 loss 2.5", "12.0"),
        ("step -12 loss 2.5", "-12"),
        ("step 1'010 loss 2.5", "1'010"),
        ("step 1 010 loss 2.5", "1 010"),
        (f"step 1{NBSP}010 loss 2.5", r"1\xa0010"),
        (f"step {ARABIC} loss 2.5", ARABIC),
        ("[1/4] [12/60] loss 2.5", "[1/4] and another"),
    ],
)
def test_a_line_that_is_not_ends_the_reading_with_it(write: Write, line: str, told: str) -> None:
    with pytest.raises(DataError) as error:
        read_run("x", write(f"step 11 loss 2.5\n{line}\n"))
    message = str(error.value)
    assert "run.log, line 2: " in message and repr(line) in message
    assert f"{told!r} is ambiguous".replace(r"\\", "\\") in message
    assert "JSON lines" in message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[rank0]: step 1 loss 2.0\n[rank1]: step 1 loss 2.1\n", "line 2"),
        ("[rank0]: step 1 loss 2.0\n[rank1]: step 2 loss 2.1\n", "line 2"),
        ("".join(f"step {s} loss {s}.{r}\n" for s in (1, 2, 3) for r in (1, 2)), "line 2"),
    ],
)
def test_several_processes_that_log_different_losses(write: Write, text: str, told: str) -> None:
    with pytest.raises(DataError, match=f"{told}.*lines of several processes or micro-batches"):
        read_run("x", write(text))


def test_several_processes_that_log_the_same(write: Write) -> None:
    text = "".join(f"[default{r}]: step {s} loss {s}.5\n" for s in (1, 2, 3) for r in (3, 0))
    assert [s.loss for s in read_run("x", write(text)).steps.values()] == [1.5, 2.5, 3.5]


def test_a_resumed_run_is_no_several_processes(write: Write) -> None:
    text = "".join(f"step {s} loss {s}.{i}\n" for i, s in enumerate([1, 2, 3, 4, 4, 5, 6]))
    assert [s.loss for s in read_run("x", write(text)).steps.values()] == [1.0, 2.1, 3.2, 4.4, 5.5,
                                                                           6.6]  # fmt: skip


def test_steps_that_begin_anew_in_each_epoch(write: Write) -> None:
    text = "".join(f"Epoch: {e} step: {s} loss: {e}.{s}\n" for e in (1, 2) for s in (1, 2, 3))
    with pytest.raises(DataError, match="line 4.*steps begin again in each epoch"):
        read_run("x", write(text))


def test_micro_batches_of_litgpt_are_no_steps(write: Write) -> None:
    text = "".join(
        f"Epoch 1 | iter {i} step {i // 4} | loss train: {1 + i / 100:.3f}, val: n/a | iter time: "
        f"1.00 ms{' (step)' if i % 4 == 0 else ''}\n"
        for i in range(1, 13)
    )
    run = read_run("x", write(text + "iter 12: val loss 9.9, val time: 1.00 ms\n"))
    assert {s: x.loss for s, x in run.steps.items()} == {1: 1.04, 2: 1.08, 3: 1.12}
    assert not run.heldout


def test_held_out_losses_move_with_steps_or_are_left_out(write: Write) -> None:
    maxtext = (
        "completed step: 0, seconds: 1.0, loss: 3.0\n"
        "completed step: 1, seconds: 1.0, loss: 2.0\n"
        "eval metrics after step: 1, loss=2.5, total_weights=8751\n"
    )
    run = read_run("x", write(maxtext))
    assert list(run.steps) == [1, 2] and dict(run.heldout) == {2: 2.5}
    run = read_run("x", write("step 0 eval_loss 3.5\nstep 0 loss 3.0\nstep 1 loss 2.0\n"))
    assert not run.heldout and any("held-out losses are not compared" in n for n in run.notes)


# transformers' Trainer and what is built on it ----------------------------------------------------

END = "{'train_runtime': 2.0, 'train_steps_per_second': 1.0, 'epoch': 1.0}\n"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        # transformers 5 and Axolotl; TRL; LLaMA-Factory's web page, with formatted numbers
        ("{'loss': '1.234', 'grad_norm': '0.5', 'learning_rate': '1e-05', 'ppl': '3.435', "
         "'memory/max_active (GiB)': '12.34', 'tokens/train_per_sec_per_gpu': '1,234', "
         "'epoch': '0.1'}", (1.234, 0.5, 1e-05)),
        ("{'loss': 1.2345, 'grad_norm': 0.512345678, 'learning_rate': 2e-05, 'num_tokens': "
         "12345.0, 'mean_token_accuracy': 0.61, 'epoch': 0.1}", (1.2345, 0.512345678, 2e-05)),
        ("[INFO|2026-01-02 03:04:05] callbacks.py:152 >> {'loss': 1.2345, 'learning_rate': "
         "2.0000e-05, 'epoch': 0.10, 'throughput': 1234.5}", (1.2345, None, 2e-05)),
        ("0: {'loss': nan, 'grad_norm': inf, 'learning_rate': 0.0, 'epoch': 0.1}",
         (math.nan, math.inf, 0.0)),
        ("{\"loss\": 1.5, \"learning_rate\": null}", (1.5, None, None)),
    ],
)  # fmt: skip
def test_a_dict_that_is_sure(write: Write, line: str, expected: tuple) -> None:
    run = read_run("x", write(f"{line}\n{{'loss': 1.0}}\n{END}"))
    logged = run.steps[1]
    assert repr((logged.loss, logged.grad_norm, logged.lr)) == repr(expected)


@pytest.mark.parametrize("value", ["2,5", "'2,5'", "2.5%", "'12k'", "1_0.5", "tensor(2.5)", "''"])
def test_a_dict_that_is_not_ends_the_reading_with_it(write: Write, value: str) -> None:
    text = f"{{'loss': 2.5}}\n{{'loss': {value}, 'epoch': 1.0}}\n{END}"
    with pytest.raises(DataError, match=r"line 2: .*loss is .*which is ambiguous"):
        read_run("x", write(text))


def test_a_learning_rate_that_was_formatted_was_rounded(write: Write) -> None:
    lines = "{'loss': 1.2345, 'learning_rate': 2.0000e-05}\n{'loss': 1.0, 'learning_rate': 1.6e-05}"
    steps = read_run("x", write(f"{lines}\n{END}")).steps
    assert steps[1].rounding["lr"] == pytest.approx(5e-10)
    plain = "{'loss': 1.2345, 'learning_rate': 2e-05}\n{'loss': 1.0, 'learning_rate': 1.6e-05}"
    assert "lr" not in read_run("x", write(f"{plain}\n{END}")).steps[1].rounding


def bars_and_dicts(every: int, shown: int = 0) -> str:
    """A Trainer's terminal: bars, and behind each dict the bar again, `shown` steps further."""
    text = ""
    for step in range(1, 13):
        bar = f"\r {step}%|## | {step}/12 [00:01<00:02,  9.00it/s]"
        text += bar
        if step % every == 0:
            again = bar.replace(f"{step}/12", f"{step + shown}/12")
            text += f"\r     \r{{'loss': '{step}.5', 'grad_norm': '1.5', 'epoch': '1'}}\n{again}"
    return text


def test_progress_bars_tell_the_steps_of_dicts(write: Write) -> None:
    run = read_run("x", write(bars_and_dicts(4)))
    assert {s: (x.loss, x.mean_over) for s, x in run.steps.items()} == {
        4: (4.5, 4), 8: (8.5, 4), 12: (12.5, 4),
    }  # fmt: skip
    # Bars that go on, and are not drawn again, tell a later step.
    with pytest.raises(DataError, match="none names its step"):
        read_run("x", write(bars_and_dicts(4, shown=1)))


def test_dicts_without_steps_need_to_be_told(write: Write) -> None:
    text = "{'loss': '2.5', 'epoch': '0.5'}\n{'loss': '1.5', 'epoch': '1'}\n"
    with pytest.raises(DataError, match="--mean-over NAME=N"):
        read_run("x", write(text))
    run = read_run("x", write(text), HowLogged(mean_over=10))
    assert {s: x.mean_over for s, x in run.steps.items()} == {10: 10, 20: 10}
    with pytest.raises(DataError, match="2 lines .* about 50 steps"):
        read_run("x", write(text + END.replace("1.0,", "25.0,", 1)), HowLogged(mean_over=10))


def test_dicts_of_two_processes_are_not_counted_twice(write: Write) -> None:
    line = "{{'loss': '{0}.5', 'grad_norm': '1.{0}', 'learning_rate': '1e-05', 'epoch': '1'}}\n"
    text = "".join(line.format(step) * 2 for step in range(1, 5))
    with pytest.raises(DataError, match="line 2.*several processes"):
        read_run("x", write(text + END))


def test_llama_factory(write: Write) -> None:
    lines = [
        {"current_steps": s, "total_steps": 20, "loss": 3 - s / 10, "lr": 1e-5, "epoch": s / 10,
         "percentage": 5.0 * s, "elapsed_time": "0:00:05", "remaining_time": "0:00:25"}
        for s in (5, 10, 15)
    ]  # fmt: skip
    lines += [{"current_steps": 15, "total_steps": 20, "eval_loss": 2.25, "epoch": 1.5}]
    lines += [{"current_steps": 20, "total_steps": 20, "loss": None, "learning_rate": None}]
    path = write("".join(json.dumps(line) + "\n" for line in lines), "trainer_log.jsonl")
    run = read_run("x", path)
    assert {s: (x.loss, x.lr, x.mean_over) for s, x in run.steps.items()} == {
        5: (2.5, 1e-5, 5), 10: (2.0, 1e-5, 5), 15: (1.5, 1e-5, 5),
    }  # fmt: skip
    assert dict(run.heldout) == {15: 2.25}
    late = write("".join(json.dumps(line) + "\n" for line in lines[1:3]), "trainer_log.jsonl")
    assert [x.mean_over for x in read_run("x", late).steps.values()] == [None, 5]


# Means, and resumed runs --------------------------------------------------------------------------

LOSSES = {step: 1 + 4 / step for step in range(1, 61)}
OURS = Run(
    "ours", "ours", "metrics.jsonl", {step: LoggedStep(step, loss) for step, loss in LOSSES.items()}
)


def trained(
    sessions: Sequence[tuple[int, int]], every: int, version: int = 5, end: bool = True
) -> dict[str, Any]:
    """trainer_state.json of a Trainer that was started at each (from, to), as Trainer sums."""
    history: list[dict[str, Any]] = []
    for start, stop in sessions:
        history = [record for record in history if record["step"] <= start]
        summed, since, total = 0.0, start, 0.0
        for step in range(start + 1, stop + 1):
            summed += LOSSES[step]
            if step % every == 0:
                loss = summed / (step - since)
                history.append({"step": step, "loss": round(loss, 4) if version == 4 else loss})
                total, summed, since = total + summed, 0.0, step
        count = stop - start if version == 5 else stop
        rate = (stop - start if version == 5 else 60) / 100
        final = {"train_loss": (total + summed) / count, "train_runtime": 100.0}
        history += [{"step": stop, "train_steps_per_second": rate, **final}] if end else []
    return {"log_history": history, "max_steps": 60, "logging_steps": every}


@pytest.mark.parametrize("version", [4, 5])
@pytest.mark.parametrize(
    ("sessions", "every", "windows"),
    [
        ([(0, 60)], 10, {10: 10, 60: 10}),
        ([(0, 27), (25, 60)], 10, {20: 10, 30: 5, 60: 10}),
        ([(0, 27), (20, 60)], 10, {20: 10, 30: 10}),
        ([(0, 60)], 1, {1: 1, 60: 1}),
        ([(0, 9), (7, 60)], 1, {7: 1, 8: 1, 60: 1}),
        ([(0, 27), (26, 60)], 4, {24: 4, 28: 2, 32: 4}),
    ],
)
def test_a_resumed_trainers_mean_begins_at_the_resume(
    write: Write, version: int, sessions: list, every: int, windows: dict[int, int]
) -> None:
    """Only the end of a training tells that it was resumed; it is taken from there."""
    state = trained(sessions, every, version)
    if len(sessions) == 2 and version == 5:  # a run that was killed wrote no end
        assert sum("train_loss" in record for record in state["log_history"]) == 1
    run = read_run("hf", write(state, "trainer_state.json"))
    assert {s: run.steps[s].mean_over for s in windows} == windows
    assert compare([OURS, run]).verdict == AGREE


def test_a_training_that_was_continued_after_its_end(write: Write) -> None:
    state = trained([(0, 25)], 10)
    more = trained([(25, 60)], 10)
    state["log_history"] += more["log_history"]
    run = read_run("hf", write(state, "trainer_state.json"))
    assert {s: x.mean_over for s, x in run.steps.items()} == {
        10: 10, 20: 10, 30: 5, 40: 10, 50: 10, 60: 10,
    }  # fmt: skip
    assert compare([OURS, run]).verdict == AGREE


def test_a_resume_that_nothing_tells_is_found_and_asked_for(write: Write) -> None:
    state = trained([(0, 27), (25, 60)], 10, end=False)
    path = write(state, "trainer_state.json")
    result = compare([OURS, read_run("hf", path)])
    assert result.verdict == DIFFER
    (note,) = (note for note in result.pairs[0].notes if "resumed" in note)
    assert "mean of steps 26 to 30" in note and "--resumed-at hf=25" in note
    assert compare([OURS, read_run("hf", path, HowLogged(resumed_at=(25,)))]).verdict == AGREE
    # A loss that is wrong is not explained away.
    state["log_history"][2]["loss"] *= 1.5
    result = compare([OURS, read_run("hf", write(state, "trainer_state.json"))])
    assert result.verdict == DIFFER and not any("resumed" in n for n in result.pairs[0].notes)


def every_tenth(means: bool, form: str = "step {} loss {!r}\n") -> str:
    text = ""
    for last in range(10, 61, 10):
        part = [LOSSES[step] for step in range(last - 9, last + 1)]
        text += form.format(last, sum(part) / 10 if means else part[-1])
    return text


def test_a_log_of_every_tenth_step_needs_to_be_told(write: Write) -> None:
    single, means = (write(every_tenth(m), f"{m}.log") for m in (False, True))
    for path in (single, means):
        with pytest.raises(DataError, match="--mean-over x=1 or --mean-over x=10"):
            compare([OURS, read_run("x", path)])
    how = [HowLogged(mean_over=n) for n in (1, 10)]
    assert compare([OURS, read_run("x", single, how[0])]).verdict == AGREE
    assert compare([OURS, read_run("x", means, how[1])]).verdict == AGREE
    assert compare([OURS, read_run("x", single, how[1])]).verdict == DIFFER
    assert compare([OURS, read_run("x", means, how[0])]).verdict == DIFFER
    # Two logs of one kind can be compared with each other; the reader is told.
    result = compare([read_run("x", means), read_run("y", means)])
    assert result.verdict == AGREE and "assumed to mean the same" in result.notes[0]
    with pytest.raises(DataError, match="10 steps apart"):
        compare([read_run("x", means), read_run("y", single, how[0])])


@pytest.mark.parametrize(
    ("form", "means"),
    [
        ("Step {} | loss:{!r} lr:2e-05 \n", False),
        ("step {}/60  loss {!r}  512 supervised tok/s\n", False),
        ("Iter {}: Train loss {!r}, It/sec 1.0\n", True),
        (" iteration {}/ 60 | elapsed time per iteration (ms): 1.0 | lm loss: {!r} |\n", True),
    ],
)
def test_a_log_of_a_known_kind_is_not_asked_for(write: Write, form: str, means: bool) -> None:
    run = read_run("x", write(every_tenth(means, form)))
    assert run.undecided == 1
    assert {x.mean_over for x in run.steps.values()} == {10 if means else 1}
    assert compare([OURS, run]).verdict == AGREE


def test_json_lines_of_others_are_asked_for_and_ours_are_not(write: Write) -> None:
    lines = [{"step": s, "loss": LOSSES[s]} for s in range(10, 61, 10)]
    theirs = write("".join(json.dumps(line) + "\n" for line in lines), "theirs.jsonl")
    ours = write(
        "".join(json.dumps({"kind": "train"} | line) + "\n" for line in lines), "ours.jsonl"
    )
    assert read_run("x", theirs).undecided == 10 and read_run("x", ours).undecided == 1
    with pytest.raises(ConfigError, match="--mean-over.*own step"):
        read_run("x", ours, HowLogged(mean_over=10))


@pytest.mark.parametrize("value", ["2,5", None, [1], True])
def test_json_names_the_line(write: Write, value: object) -> None:
    text = '{"step": 1, "loss": 2.0}\n' + json.dumps({"step": 2, "loss": value}) + "\n"
    if value is None:
        assert read_run("x", write(text, "m.jsonl")).steps[2].loss is None
        return
    with pytest.raises(DataError, match=re.escape(f"m.jsonl, line 2: loss is {value!r}")):
        read_run("x", write(text, "m.jsonl"))
