"""What a run logged, whoever logged it: `read_run` makes a `Run` of any of these.

- A run's folder, or its `metrics.jsonl` (with `run.json` and `config.yaml` where they lie beside
  it). Any JSON lines with `step`, `loss` and perhaps `grad_norm` and `lr` will do.
- Hugging Face's `trainer_state.json`, or a folder that has one, itself or in a checkpoint.
- A text with the dicts that transformers' Trainer prints, {'loss': 2.1, 'grad_norm': 3.2, ...}.
- A text with lines such as `step 12/60 loss 1.23`, `Step: 12, loss: 1.23, lr: 1e-5` or
  `[ 12/60] loss=1.23 grad_norm=0.4`: a step and a loss, in any order, with whatever between them.

Three things would make honest runs look different, so they are kept with the numbers. Printed
numbers are rounded: each has in `rounding` what its last digit may hide. Trainer's losses are means
over the steps since its last log: `mean_over` says over how many. And a text that begins at step 0
counts started updates; ours and Trainer's count finished ones, so its steps are moved by one.
A step that was logged twice (a resumed run) has the values that were logged last.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import yaml

from torchprime.errors import DataError
from torchprime.metrics.writers import read_metrics

EXPECTED = (
    "expected a run's folder, a metrics.jsonl, a trainer_state.json of transformers, or a text log "
    "with a step and a loss on a line"
)
HF_DECIMALS = 4  # transformers before 5 rounds the losses it logs to so many


@dataclass(frozen=True)
class LoggedStep:
    """One training step as logged; None is what was not logged."""

    step: int  # finished updates, so the first is 1
    loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    supervised_tokens: int | None = None
    batch_hash: str | None = None
    supervised_tokens_per_s: float | None = None
    mean_over: int = 1  # the loss is the mean of so many steps, of which this is the last
    rounding: Mapping[str, float] = field(default_factory=dict)  # by field: half its last digit


@dataclass(frozen=True)
class Run:
    """A run as far as its logs tell."""

    label: str
    path: str  # as given
    source: str  # what was read
    steps: Mapping[int, LoggedStep]  # in order
    heldout: Mapping[int, float] = field(default_factory=dict)  # held-out loss by step
    heldout_rounding: Mapping[int, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)  # run.json
    config: Mapping[str, Any] = field(default_factory=dict)  # config.yaml
    notes: tuple[str, ...] = ()

    @property
    def dtype(self) -> str | None:
        """The dtype that the model computes in, or None if nothing tells."""
        model = self.facts.get("model")
        told = model.get("dtype") if isinstance(model, dict) else None
        return told or self.config.get("torch_dtype")


@dataclass
class _Log:
    """What one file holds."""

    source: str
    steps: list[LoggedStep]
    heldout: dict[int, float] = field(default_factory=dict)
    heldout_rounding: dict[int, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_run(label: str, path: str | Path) -> Run:
    """Read whatever `path` is.

    Raises:
        DataError: if nothing is there, it is of no known kind, or it holds no training loss.
    """
    file = _file_of(Path(path))
    if file.suffix == ".jsonl":
        log = _jsonl(file)
    elif file.suffix == ".json":
        log = _trainer_state(file)
    else:
        log = _text(file)
    steps = {logged.step: logged for logged in log.steps}
    if not any(logged.loss is not None for logged in steps.values()):
        raise DataError(f"run {label}: {file} has no training loss; {EXPECTED}")
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
    )


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
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"run {path}: cannot be read ({error.strerror}); {EXPECTED}") from error


def _mapping(path: Path, parse: Any) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = parse(_read(path))
    except (ValueError, yaml.YAMLError) as error:
        raise DataError(
            f"{path}: cannot be read ({str(error)[:200]}), expected what the trainer wrote; "
            "remove it to compare without what it tells"
        ) from error
    return values if isinstance(values, dict) else {}


# JSON ---------------------------------------------------------------------------------------------


def _jsonl(path: Path) -> _Log:
    try:
        records = read_metrics(path)
    except UnicodeDecodeError as error:
        raise DataError(f"run {path}: is not text ({error.reason}); {EXPECTED}") from error
    log = _Log("metrics.jsonl", [])
    for record in records:
        where = f"{path}, step {record.get('step')!r}"
        kind = record.get("kind", "train" if "loss" in record else None)
        if kind == "train":
            log.steps.append(_logged(record, where))
        elif kind == "eval" and (loss := _number(record, "eval_loss", where)) is not None:
            log.heldout[_step(record, where)] = loss
    return log


def _trainer_state(path: Path) -> _Log:
    try:
        state = json.loads(_read(path))
    except ValueError as error:
        raise DataError(f"run {path}: is no JSON ({error}); {EXPECTED}") from error
    history = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(history, list) or not all(isinstance(each, dict) for each in history):
        raise DataError(f"run {path}: has no list log_history; {EXPECTED}")
    log = _Log("trainer_state.json", [])
    before = 0
    for record in history:
        where = f"{path}, step {record.get('step')!r}"
        if "loss" in record:
            step = _step(record, where)
            # A resumed Trainer's history begins again at an earlier step.
            over = step - before if step > before else 1
            log.steps.append(_logged(record, where, over))
            before = step
        if (heldout := _number(record, "eval_loss", where)) is not None:
            log.heldout[_step(record, where)] = heldout
    _tell_means(log)
    _round_old_losses(log)
    return log


def _tell_means(log: _Log) -> None:
    most = max((logged.mean_over for logged in log.steps), default=1)
    if most > 1:
        log.notes.append(f"its losses are means over the steps since its last log (up to {most})")


def _round_old_losses(log: _Log) -> None:
    """Losses none of which has more than four decimals were rounded to four by Trainer."""
    losses = [logged.loss for logged in log.steps if logged.loss is not None]
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite or any(round(loss, HF_DECIMALS) != loss for loss in finite):
        return
    half = 0.5 * 10.0**-HF_DECIMALS
    log.steps = [replace(logged, rounding={"loss": half}) for logged in log.steps]
    log.notes.append(
        f"its losses are rounded to {HF_DECIMALS} decimals; the bands are widened by that"
    )


def _logged(record: Mapping[str, Any], where: str, mean_over: int = 1) -> LoggedStep:
    tokens = _number(record, "supervised_tokens", where)
    batch_hash = record.get("batch_hash")
    return LoggedStep(
        step=_step(record, where),
        loss=_number(record, "loss", where),
        grad_norm=_number(record, "grad_norm", where),
        lr=_number(record, "lr" if "lr" in record else "learning_rate", where),
        supervised_tokens=None if tokens is None else int(tokens),
        batch_hash=None if batch_hash is None else str(batch_hash),
        supervised_tokens_per_s=_number(record, "supervised_tokens_per_s", where),
        mean_over=mean_over,
    )


def _step(record: Mapping[str, Any], where: str) -> int:
    step = record.get("step")
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise DataError(f"run {where}: expected a whole number as step; {EXPECTED}")
    return step


def _number(record: Mapping[str, Any], name: str, where: str) -> float | None:
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise DataError(f"run {where}: {name} is {value!r}, expected a number or null")
    return float(value)


# Text ---------------------------------------------------------------------------------------------

_NUMBER = r"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|nan|inf(?:inity)?)"
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_DICT = re.compile(r"\{[^{}]*['\"](?:loss|eval_loss|train_runtime)['\"]\s*:[^{}]*\}")
_DICT_ITEM = re.compile(rf"['\"]([\w/.-]+)['\"]\s*:\s*(['\"]?)({_NUMBER})\2\s*[,}}]", re.IGNORECASE)
# `step 12/60`, `Step: 12`, `global_step=12`, `iter 12`, `[ 12/60]`; neither `s/step` nor `steps`.
_STEP = re.compile(
    r"(?<![\w/])(?:global[ _]?)?(?:step|iteration|iter)\s*[:=#]?\s*\[?\s*(\d+)"
    r"|\[\s*(\d+)\s*/\s*\d+\s*\]",
    re.IGNORECASE,
)
_NAMES = {
    "loss": r"(?:train(?:ing)?[ _/.-])?loss",
    "grad_norm": r"(?:train[_/.-])?(?:grad(?:ient)?[ _-]?norm|gnorm)",
    "lr": r"(?:train[_/.-])?(?:lr|learning[ _-]rate)",
    "eval_loss": r"eval[ _/.-]loss",
}
_VALUES = {
    name: re.compile(
        rf"(?<![\w/.-]){words}\s*[:=]?\s*[\[(]?\s*({_NUMBER})(?!\w|\.\d)", re.IGNORECASE
    )
    for name, words in _NAMES.items()
}
_RATE = re.compile(r"([\d,]+(?:\.\d+)?) supervised tok/s")
_EVALUATING = re.compile(r"\b(?:eval|evaluation|val|valid|validation|test)\b", re.IGNORECASE)
# How many digits a printed number is taken to have at least: trailing zeros may be cut off.
_LEAST_DIGITS = 3
_HF_DIGITS = 4  # transformers 5 prints '%.4g' in quotation marks


def _text(path: Path) -> _Log:
    lines = [_ANSI.sub("", line) for line in re.split(r"[\r\n]+", _read(path))]
    log = _dict_lines(path, lines)
    return log if log.steps else _step_lines(lines)


def _dict_lines(path: Path, lines: Iterable[str]) -> _Log:
    """What transformers' Trainer prints: it names no steps, so the lines are counted."""
    log = _Log("log lines of transformers", [])
    found: list[dict[str, str]] = []
    heldout: dict[int, str] = {}
    quoted, total = False, None
    for line in lines:
        for match in _DICT.finditer(line):
            items = _DICT_ITEM.findall(match.group())
            values = {name: text for name, _, text in items}
            if "loss" in values:
                found.append(values)
                quoted |= any(mark for name, mark, _ in items if name == "loss")
            elif "eval_loss" in values and found:
                heldout[int(found[-1].get("step", len(found)))] = values["eval_loss"]
            if {"train_runtime", "train_steps_per_second"} <= values.keys():
                total = float(values["train_runtime"]) * float(values["train_steps_per_second"])
    if not found:
        return log
    if not all("step" in values for values in found):
        _check_every_step(path, len(found), total)
        log.notes.append(f"its lines name no steps: counted as steps 1 to {len(found):,}")
    names = {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "lr"}
    columns = {ours: [v.get(theirs) for v in found] for theirs, ours in names.items()}
    numbers = [values.get("step", str(place)) for place, values in enumerate(found, start=1)]
    rows = _rows(
        [int(float(number)) for number in numbers], columns, _HF_DIGITS if quoted else None
    )
    log.steps = rows
    _add_heldout(log, heldout, _HF_DIGITS if quoted else None)
    if quoted:
        log.notes.append(_rounded_note())
    else:
        _round_old_losses(log)
    return log


def _check_every_step(path: Path, lines: int, total: float | None) -> None:
    # The rate is printed with three decimals, so the total is only about right.
    if total is not None and abs(total - lines) > max(1.0, 0.1 * lines):
        raise DataError(
            f"run {path}: {lines:,} lines with a loss for about {total:,.0f} steps, and none names "
            "its step; give the trainer_state.json of the same run, or log every step "
            "(logging_steps=1)"
        )


def _step_lines(lines: Iterable[str]) -> _Log:
    log = _Log("text log", [])
    steps: list[int] = []
    found: list[dict[str, str]] = []
    rates: list[float | None] = []
    heldout: dict[int, str] = {}
    for line in lines:
        step = _STEP.search(line)
        if step is None:
            continue
        number = int(step.group(1) or step.group(2))
        values = {name: text for name in _NAMES if (text := _printed(line, name)) is not None}
        if "eval_loss" in values:
            heldout[number] = values["eval_loss"]
        if "loss" in values:
            rate = _RATE.search(line)
            steps.append(number)
            found.append(values)
            rates.append(float(rate.group(1).replace(",", "")) if rate else None)
    if not found:
        return log
    if min(steps) == 0:
        steps = [step + 1 for step in steps]
        log.notes.append("its steps count from 0: moved by one")
    columns = {name: [v.get(name) for v in found] for name in ("loss", "grad_norm", "lr")}
    log.steps = _rows(steps, columns, _LEAST_DIGITS, rates)
    _add_heldout(log, heldout, _LEAST_DIGITS)
    log.notes.append(_rounded_note())
    return log


def _rounded_note() -> str:
    return "its numbers are rounded as printed; the bands are widened by that"


def _printed(line: str, name: str) -> str | None:
    for match in _VALUES[name].finditer(line):
        if name == "eval_loss" or not _EVALUATING.search(line[: match.start()]):
            return match.group(1)
    return None


def _rows(
    steps: Sequence[int],
    columns: Mapping[str, Sequence[str | None]],
    least_digits: int | None,
    rates: Sequence[float | None] | None = None,
) -> list[LoggedStep]:
    """The columns' texts as records; without `least_digits` they are exact."""
    halves = {
        name: half_digits(texts, least_digits) if least_digits else [None] * len(texts)
        for name, texts in columns.items()
    }
    values = {
        name: [None if text is None else float(text) for text in texts]
        for name, texts in columns.items()
    }
    return [
        LoggedStep(
            step=step,
            loss=values["loss"][place],
            grad_norm=values["grad_norm"][place],
            lr=values["lr"][place],
            supervised_tokens_per_s=rates[place] if rates else None,
            rounding={name: half for name, column in halves.items() if (half := column[place])},
        )
        for place, step in enumerate(steps)
    ]


def _add_heldout(log: _Log, texts: Mapping[int, str], least_digits: int | None) -> None:
    log.heldout = {step: float(text) for step, text in texts.items()}
    if least_digits:
        halves = half_digits(list(texts.values()), least_digits)
        log.heldout_rounding = {s: h for s, h in zip(texts, halves, strict=True) if h}


def half_digits(texts: Sequence[str | None], least_digits: int) -> list[float | None]:
    """What rounding may hide in each number of a printed column: half a unit of its last digit.

    A column is printed with a fixed number of decimals or of digits, and zeros at the end may be
    cut off. Which of the two it is need not be known: the larger of both halves is right for both,
    with the most decimals and the most digits that the column shows.
    """
    numbers = [_decimal(text) for text in texts]
    finite = [number for number in numbers if number is not None]
    most = max([least_digits, *(len(number.as_tuple().digits) for number in finite)])
    exponents = [e for n in finite if isinstance(e := n.as_tuple().exponent, int)]
    scientific = any("e" in text.lower() for text in texts if text and _decimal(text) is not None)
    fixed = 0.0 if scientific or not exponents else 0.5 * 10.0 ** min(*exponents, 0)
    halves: list[float | None] = []
    for number in numbers:
        if number is None:
            halves.append(None)
        elif number == 0:
            halves.append(fixed)
        else:
            halves.append(max(fixed, 0.5 * 10.0 ** (number.adjusted() - most + 1)))
    return halves


def _decimal(text: str | None) -> Decimal | None:
    try:
        number = Decimal(text or "nan")
    except InvalidOperation:
        return None
    return number if number.is_finite() else None
