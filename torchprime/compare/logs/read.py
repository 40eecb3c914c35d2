"""Reader of a run's log: `read_run` makes a `Run` of any of these formats.

- A run's folder, or its `metrics.jsonl` (with `run.json` and `config.yaml` if they are in the same
  folder). Any JSON lines with `step`, `loss` and perhaps `grad_norm` and `lr` are accepted;
  LLaMA-Factory's trainer_log.jsonl too.
- Hugging Face's `trainer_state.json`, or a folder that has one, itself or in a checkpoint; or a
  text with the dicts that transformers' Trainer prints (trainer.py).
- A text with a step and a loss on a line (text.py).

Four properties of logs would make equal runs look different, so they are stored with the numbers:

- Printed numbers are rounded: `rounding` has the possible error of each.
- Some losses are means over steps: `mean_over` is the number of steps. If records are several steps
  apart and the log does not tell if their losses are means, `undecided` is set, and the user is
  asked.
- A text that begins at step 0 counts started updates; ours and Trainer's count finished ones, so
  its steps are increased by one.
- A step that was logged twice (a resumed run) has the values that were logged last.

An ambiguous number is an error that names its line; no number is cut or guessed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from torchprime.compare.logs.run import (
    HowLogged,
    Log,
    LoggedStep,
    Run,
    tell_means,
    usual_distance,
    with_windows,
)
from torchprime.compare.logs.text import lines_of, read_step_lines
from torchprime.compare.logs.trainer import (
    finish_history,
    read_printed_dicts,
    round_old_losses,
)
from torchprime.errors import ConfigError, DataError
from torchprime.files.atomic import read_regular_text
from torchprime.metrics.writers import MOST_BYTES, read_metrics

EXPECTED = (
    "expected a run's folder, a metrics.jsonl, a trainer_state.json of transformers, or a text log "
    "with a step and a loss on a line"
)
MOST_STEPS = 10**7  # of a run: each that a loss stands for is held
EXPECTED_STEP = f"expected a whole number up to {MOST_STEPS:,}"
UNTOLD = HowLogged()


def read_run(label: str, path: str | Path, how: HowLogged = UNTOLD) -> Run:
    """Read the log at `path`, whatever its format.

    Raises:
        DataError: if nothing is there, it is of no known kind, it holds no training loss, or a
            number in it is ambiguous.
        ConfigError: if `how` contradicts the log.
    """
    file = _file_of(Path(path))
    if file.suffix == ".jsonl":
        log = _jsonl(file, how)
    elif file.suffix == ".json":
        log = _trainer_state(file, how)
    else:
        lines = list(lines_of(_read(file)))
        log = read_printed_dicts(file, lines, how)
        log = log if log.steps else read_step_lines(file, lines, how)
    if (last := max((each.step for each in log.steps), default=0)) > MOST_STEPS:
        raise DataError(f"run {label}: {file} has a step {last}, {EXPECTED_STEP}; {EXPECTED}")
    if not any(logged.loss is not None for logged in log.steps):
        raise DataError(f"run {label}: {file} has no training loss; {EXPECTED}")
    undecided = _decide(label, log, how)
    steps = {logged.step: logged for logged in log.steps}
    beside = file.parent if file.suffix == ".jsonl" else None
    return Run(
        label=label,
        path=str(path),
        source=log.source,
        steps=dict(sorted(steps.items())),
        heldout=dict(sorted(log.heldout.items())),
        heldout_rounding=log.heldout_rounding,
        facts=_mapping(beside / "run.json", json.loads) if beside else {},
        config=_mapping(beside / "config.yaml", yaml.safe_load) if beside else {},
        notes=tuple(log.notes),
        undecided=undecided,
    )


def _decide(label: str, log: Log, how: HowLogged) -> int:
    """Set the windows of losses that the log or the user says are means; set `Run.undecided`."""
    for option, given in (("--mean-over", how.mean_over), ("--resumed-at", how.resumed_at)):
        if log.means is False and given and given != 1:
            raise ConfigError(
                f"{option}: given for {label}, but each loss in its {log.source} is of its own "
                "step; leave the option out"
            )
    means = bool(how.mean_over and how.mean_over > 1) if log.means is None else False
    if means:
        log.steps = with_windows(log.steps, how)
        tell_means(log)
    if log.means is not None or how.mean_over is not None:
        return 1
    return usual_distance(logged.step for logged in log.steps)


def _file_of(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in ("metrics.jsonl", "trainer_state.json"):
        if (path / name).is_file():
            return path / name
    saved = [
        (int(number), state)
        for state in path.glob("checkpoint-*/trainer_state.json")
        if (number := state.parent.name.removeprefix("checkpoint-")).isdecimal()
    ]
    if not saved:
        raise DataError(
            f"run {path}: neither metrics.jsonl nor trainer_state.json in it; {EXPECTED}"
        )
    return max(saved)[1]


def _read(path: Path) -> str:
    try:
        text = read_regular_text(path, MOST_BYTES, "replace")
        return text.replace("\r\n", "\n").replace("\r", "\n")  # progress bars end lines, too
    except OSError as error:
        raise DataError(f"run {path}: cannot be read ({error.strerror}); {EXPECTED}") from error


def _mapping(path: Path, parse: Callable[[str], object]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = parse(_read(path))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(
            f"{path}: cannot be read ({str(error)[:200]}), expected what the trainer wrote; "
            "remove it to compare without its facts"
        ) from error
    return values if isinstance(values, dict) else {}


# JSON ---------------------------------------------------------------------------------------------


def _jsonl(path: Path, how: HowLogged) -> Log:
    records = read_metrics(path)
    if any("current_steps" in record for record in records):
        return _trainer_log(path, records, how)
    log = Log("metrics.jsonl", [])
    for number, record in enumerate(records, start=1):
        where = f"{path}, line {number}"
        kind = record.get("kind", "train" if "loss" in record else None)
        if kind == "train":
            log.steps.append(_logged(record, where))
            log.means = log.means if "kind" in record else None  # not a training record
        elif kind == "eval" and (loss := _number(record, "eval_loss", where)) is not None:
            log.heldout[_step(record, where)] = loss
    return log


def _trainer_log(path: Path, records: list[dict[str, Any]], how: HowLogged) -> Log:
    """Read LLaMA-Factory's trainer_log.jsonl."""
    log = Log("trainer_log.jsonl of LLaMA-Factory", [], means=True)
    for number, record in enumerate(records, start=1):
        where = f"{path}, line {number}"
        record = {**record, "step": record.get("current_steps")}
        if record.get("loss") is not None:
            log.steps.append(_logged(record, where))
        if (heldout := _number(record, "eval_loss", where)) is not None:
            log.heldout[_step(record, where)] = heldout
    round_old_losses(log)
    log.steps = with_windows(log.steps, how)
    tell_means(log)
    return log


def _trainer_state(path: Path, how: HowLogged) -> Log:
    try:
        state = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"run {path}: is not JSON ({error}); {EXPECTED}") from error
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list) or not all(isinstance(each, dict) for each in history):
        raise DataError(f"run {path}: has no list log_history; {EXPECTED}")
    log = Log("trainer_state.json", [], means=True)
    for place, record in enumerate(history):
        where = f"{path}, log_history[{place}]"
        if "loss" in record:
            log.steps.append(_logged(record, where))
        if (heldout := _number(record, "eval_loss", where)) is not None:
            log.heldout[_step(record, where)] = heldout
    finish_history(log, history, state, how)
    return log


def _logged(record: Mapping[str, Any], where: str) -> LoggedStep:
    tokens = _number(record, "supervised_tokens", where)
    batch_hash = record.get("batch_hash")
    return LoggedStep(
        step=_step(record, where),
        loss=_number(record, "loss", where),
        grad_norm=_number(record, "grad_norm", where),
        lr=_number(record, "lr" if "lr" in record else "learning_rate", where),
        supervised_tokens=None if tokens is None or not isfinite(tokens) else int(tokens),
        batch_hash=None if batch_hash is None else str(batch_hash),
        supervised_tokens_per_s=_number(record, "supervised_tokens_per_s", where),
    )


def _step(record: Mapping[str, Any], where: str) -> int:
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or not 0 <= step <= MOST_STEPS:
        raise DataError(f"run {where}: step is {step!r:.40}, {EXPECTED_STEP}; {EXPECTED}")
    return step


def _number(record: Mapping[str, Any], name: str, where: str) -> float | None:
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"run {where}: {name} is {value!r}, expected a number or null")
    try:
        return float(value)
    except OverflowError:
        raise DataError(
            f"run {where}: {name} is a number of {len(str(value)):,} digits, which no float holds"
        ) from None
