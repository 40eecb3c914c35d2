"""The logs of transformers' Trainer and of programs built on it: TRL, Axolotl, LLaMA-Factory.

    trainer_state.json               its log_history
    {'loss': 2.1, 'grad_norm': 3.2}  the dicts it prints, in text, among progress bars
    trainer_log.jsonl                LLaMA-Factory's, with `current_steps` and `lr`

A logged loss is the mean over the steps since the last record. A resumed Trainer loses the sum so
far: its first record is the mean since the resume. trainer_state.json does not say that a
run was resumed. The last record reveals the last resume (`_resumed_at`), and the user may name it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from torchprime.compare.logs.numbers_in_text import Doubt, is_exact, printed_at
from torchprime.compare.logs.run import HowLogged, Log, LoggedStep, tell_means, with_windows
from torchprime.compare.logs.text import Line, StepLine, add_heldout, one_process, refuse_line, rows
from torchprime.errors import DataError

DECIMALS = 4  # decimals to which transformers before 5 rounds the losses it logs
DIGITS = 4  # transformers 5 prints '%.4g' in quotation marks
DICT = re.compile(r"\{[^{}]*['\"](?:loss|eval_loss|train_runtime)['\"]\s*:[^{}]*\}")
ITEM = r"['\"]{}['\"]\s*:\s*(?P<mark>['\"]?)"
ITEMS = {
    name: re.compile(ITEM.format(name))
    for name in (
        "loss", "grad_norm", "learning_rate", "eval_loss", "step", "epoch",
        "train_runtime", "train_steps_per_second",
    )
}  # fmt: skip
BAR = re.compile(r"\s*[0-9]+%\|[^|]*\| *([0-9]+)/([0-9]+) \[")
OURS = {"loss": "loss", "grad_norm": "grad_norm", "learning_rate": "lr"}


# JSON ---------------------------------------------------------------------------------------------


def finish_history(
    log: Log, history: Sequence[Mapping[str, Any]], state: Mapping[str, Any], how: HowLogged
) -> None:
    """Set the windows and rounding errors of a trainer_state.json's records.

    Args:
        log: with `steps` as the file has them.
        state: the whole file.
    """
    ends = [
        record["step"] for record in history[:-1]
        if "train_runtime" in record and isinstance(record.get("step"), int)
    ]  # fmt: skip
    last = history[-1] if history else {}
    exact = round_old_losses(log)
    log.steps = with_windows(log.steps, how, whole=True, ends=ends)
    begun = _resumed_at(log.steps, last, state.get("max_steps"), exact)
    if begun and begun not in (*ends, *how.resumed_at):
        log.steps = with_windows(log.steps, how, whole=True, ends=[*ends, begun])
        log.notes.append(f"it was resumed at step {begun:,}, as its last record says")
    tell_means(log)


def _resumed_at(
    steps: Sequence[LoggedStep], last: Mapping[str, Any], max_steps: object, exact: bool
) -> int | None:
    """Return the step at which the last start of a finished training began, if the last record
    tells.

    Trainer ends with `train_loss`: the losses summed since that start, over the number of its
    steps (5.x) or of all steps (4.x); and with `train_runtime` and `train_steps_per_second`, whose
    product is the number of its steps (5.x) or of all (4.x).
    """
    end, told = last.get("step"), last.get("train_loss")
    if not isinstance(end, int) or not steps or "train_runtime" not in last:
        return None
    if isinstance(told, float) and math.isfinite(told) and max(s.step for s in steps) == end:
        near = 1e-6 * abs(told) if exact else 10.0**-DECIMALS
        with np.errstate(all="ignore"):  # losses may be infinite, and fit nothing then
            starts, totals = _sums_since(steps, end)
            fits = np.abs(totals / end - told) <= near
            if exact:
                fits |= np.abs(totals / (end - starts) - told) <= near
        return int(starts[fits.argmax()]) if fits.any() else None
    rate, seconds = last.get("train_steps_per_second"), last["train_runtime"]
    if not isinstance(rate, float) or not isinstance(seconds, float):
        return None
    if not math.isfinite(rate * seconds):
        return None
    count = round(rate * seconds)
    # The rate has three decimals. 4.x gives the run's length, whenever it was resumed.
    if 0.0006 * seconds > 0.5 or count >= end or count == max_steps:
        return None
    return end - count


def _sums_since(steps: Sequence[LoggedStep], end: int) -> tuple[np.ndarray, np.ndarray]:
    """Return each step before the end, and the sum of the losses behind it had a mean begun there.

    A record counts `min(mean_over, step - start)` times: the sum is straight between the places
    where a record begins or ends. Left out are steps with a record of an unknown mean behind them.
    """
    latest = {each.step: each for each in steps}
    unknown = [e.step for e in latest.values() if e.loss is None or e.mean_over is None]
    known = [each for each in latest.values() if each.step > max(unknown, default=0)]
    bends: dict[int, float] = {0: 0.0, end: 0.0}
    for each in known:
        loss, over = each.loss or 0.0, each.mean_over or 1
        bends[each.step] = bends.get(each.step, 0.0) + loss
        bends[each.step - over] = bends.get(each.step - over, 0.0) - loss
    places = np.array(sorted(bends))
    slopes = -np.cumsum([bends[place] for place in places[::-1].tolist()])[::-1][1:]
    pieces = slopes * np.diff(places)
    at_places = np.append(-np.cumsum(pieces[::-1])[::-1], 0.0)
    starts = np.arange(max(unknown, default=0), end)
    return starts, np.interp(starts, places, at_places)


def round_old_losses(log: Log) -> bool:
    """Set the rounding error of losses if none has more than four decimals: Trainer rounded them to
    four.

    Returns:
        True if they were not: they are exact.
    """
    losses = [logged.loss for logged in log.steps if logged.loss is not None]
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite or any(round(loss, DECIMALS) != loss for loss in finite):
        return True
    half = 0.5 * 10.0**-DECIMALS
    log.steps = [
        replace(logged, rounding={**logged.rounding, "loss": half}) for logged in log.steps
    ]
    log.notes.append(
        f"its losses are rounded to {DECIMALS} decimals; the bands are widened by that"
    )
    return False


# Text ---------------------------------------------------------------------------------------------


class _Bars:
    """The steps that a progress bar shows around the dicts.

    Trainer clears its bar, prints the dict and draws the bar again, which then is up to date.
    """

    def __init__(self) -> None:
        self.length: str | None = None
        self.latest = 0
        self.before: list[int] = []
        self.behind: list[int | None] = []

    def see(self, text: str) -> None:
        """Record the progress bar in a piece of the log, if it is the training's."""
        if (bar := BAR.match(text)) is None or self.length not in (None, bar[2]):
            return
        self.length, self.latest = bar[2], int(bar[1])
        if self.behind and self.behind[-1] is None:
            self.behind[-1] = self.latest

    def pass_dict(self) -> None:
        """Record that a dict with a loss is printed at this place."""
        self.before.append(self.latest)
        self.behind.append(None)

    def steps(self) -> list[int] | None:
        """Return the step of each dict; None if the bars are ambiguous: one is missing, or they
        continue without being redrawn."""
        told = [bar for bar in self.behind if bar is not None]
        rising = all(a < b for a, b in pairwise(told))
        again = sum(a == b for a, b in zip(self.before, told, strict=False))
        sure = len(told) == len(self.behind) and rising and 2 * again >= len(told)
        return told if sure else None


def read_printed_dicts(path: object, lines: Iterable[Line], how: HowLogged) -> Log:
    """Read the dicts that Trainer prints; without any the log has no steps.

    They usually contain no step. The progress bar that is drawn again after each of them gives
    its step; without bars the lines are counted, which needs a record of every step, or
    `how.mean_over`.

    Raises:
        DataError: steps that cannot be told, an ambiguous number, or several
            processes that log different losses.
    """
    log = Log("log lines of transformers", [], means=True)
    found: list[StepLine] = []
    bars = _Bars()
    total: float | None = None
    heldout: dict[int, str] = {}  # key: the index in `found` of the record before
    ends: list[int] = []
    marks: set[str] = set()
    for line in lines:
        dicts = list(DICT.finditer(line.text))
        if not dicts:
            bars.see(line.text)
        for match in dicts:
            texts = _items(path, line, match.group(), marks)
            if "loss" in texts:
                found.append(StepLine(line, 0, texts))
                bars.pass_dict()
            elif "eval_loss" in texts and found:
                heldout[len(found) - 1] = texts["eval_loss"]
            if {"train_runtime", "train_steps_per_second"} <= texts.keys():
                total = float(texts["train_runtime"]) * float(texts["train_steps_per_second"])
                ends.append(len(found))
    if not found:
        return log
    steps = _steps_of(path, found, bars, total, how, log)
    numbered = [replace(each, step=step) for each, step in zip(found, steps, strict=True)]
    kept = one_process(path, numbered)
    _fill(log, kept, {steps[place]: text for place, text in heldout.items()}, "'" in marks)
    at = [steps[place - 1] for place in ends if 0 < place < len(found)]
    log.steps = with_windows(log.steps, how, ends=at)
    tell_means(log)
    return log


def _items(path: object, line: Line, text: str, marks: set[str]) -> dict[str, str]:
    """Return the dict's numbers as texts, by its own names; `marks` gets the quotation mark of
    losses."""
    texts = {}
    for name, pattern in ITEMS.items():
        if (match := pattern.search(text)) is None:
            continue
        close = text.find(match["mark"], match.end()) if match["mark"] else -1
        value = text[match.end() : close] if close >= 0 else text[match.end() :].rstrip("}")
        value = value if close >= 0 else re.split(r",\s*['\"]", value)[0].strip()
        if value.lower() in ("none", "null"):
            continue
        try:
            number = printed_at(value, 0)
            if number is None or len(number) != len(value.replace(",", "")):
                raise Doubt(value)
        except Doubt:
            raise refuse_line(
                path,
                line,
                f"{name} is {value[:40]!r}, which is ambiguous",
                "Expected a number with a decimal point, as Trainer prints it. Give the "
                "trainer_state.json of the same run.",
            ) from None
        texts[name] = number
        if name == "loss":
            marks.add("'" if match["mark"] else "")
    return texts


def _steps_of(
    path: object,
    found: Sequence[StepLine],
    bars: _Bars,
    total: float | None,
    how: HowLogged,
    log: Log,
) -> list[int]:
    """Return the steps of the dicts: named, read from the bars, or counted."""
    if all("step" in each.texts for each in found):
        return [_named_step(path, each) for each in found]
    if (told := bars.steps()) is not None:
        log.notes.append("its lines name no steps: taken from the progress bars after them")
        return told
    apart = how.mean_over or 1
    _check_same_line(path, found)
    # The rate is printed with three decimals, so the total is only about right.
    if total is not None and abs(total - apart * len(found)) > max(float(apart), 0.1 * total):
        raise _uncounted(path, f"{len(found):,} lines with a loss for about {total:,.0f} steps")
    if total is None and how.mean_over is None:
        raise _uncounted(path, f"{len(found):,} lines with a loss, no line of the end of training")
    log.notes.append(
        f"its lines name no steps: counted as steps {apart} to {apart * len(found):,}"
        + (f", {apart} apart" if apart > 1 else "")
    )
    return [apart * place for place in range(1, len(found) + 1)]


def _named_step(path: object, found: StepLine) -> int:
    step = float(found.texts["step"])
    if not math.isfinite(step) or step < 0:
        raise refuse_line(
            path, found.line, f"step is {step}", "Expected a whole number of updates."
        )
    return int(step)


def _uncounted(path: object, told: str) -> DataError:
    return DataError(
        f"run {path}: {told}, and none names its step; give the trainer_state.json of the same "
        "run, log every step (logging_steps=1), or say --mean-over NAME=N with its logging_steps"
    )


def _check_same_line(path: object, found: Sequence[StepLine]) -> None:
    """Raise an error if lines are repeated: they come from several processes, and would be counted
    twice."""
    same = [b for a, b in pairwise(found) if a.texts == b.texts and "grad_norm" in a.texts]
    if len(same) > 1 and 4 * len(same) >= len(found):
        raise refuse_line(
            path,
            same[0].line,
            "the line appears twice, as several processes print it",
            "Give the log of one process, or the trainer_state.json of the same run.",
        )


def _fill(log: Log, found: Sequence[StepLine], heldout: Mapping[int, str], quoted: bool) -> None:
    columns: dict[str, list[str | None]] = {
        ours: [each.texts.get(theirs) for each in found] for theirs, ours in OURS.items()
    }
    # Python prints floats in full; a number in another form was formatted and rounded.
    printed = {
        name: quoted or not all(is_exact(t) for t in texts if t and math.isfinite(float(t)))
        for name, texts in columns.items()
    }
    digits: dict[str, int | None] = {n: DIGITS if printed[n] else None for n in columns}
    log.steps = rows([each.step for each in found], columns, digits)
    add_heldout(log, dict(heldout), DIGITS if quoted else None)
    if any(printed.values()):
        log.notes.append("its numbers are rounded as printed; the bands are widened by that")
    if not printed["loss"]:
        round_old_losses(log)
