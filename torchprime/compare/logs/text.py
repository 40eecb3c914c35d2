"""Text logs with a step and a loss on a line, as most trainers print them.

    step 12/60  loss 1.2345  grad_norm 0.98  lr 1.00e-04          ours
    Step 12 | loss:1.2345 lr:1e-05                                torchtune
    completed step: 11, seconds: 0.5, ..., loss: 1.234            MaxText, which counts from 0
    Epoch 1 | iter 48 step 12 | loss train: 1.234, ... (step)     LitGPT
    iteration 12/ 60 | ... | lm loss: 1.234567E+00 | ...          Megatron, means
    Iter 12: Train loss 1.234, Learning Rate 1.000e-05, ...       mlx-lm, means
    [rank0]: step: 12  loss: 1.2345  grad_norm: 0.98              torchtitan

A line is a training step if it has a step and a training loss, in any order and with any text
between them. An ambiguous number on such a line is an error that names the line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from torchprime.compare.logs.numbers_in_text import EXPECTED, Doubt, half_digits, printed_at
from torchprime.compare.logs.run import HowLogged, Log, LoggedStep, tell_means, with_windows
from torchprime.errors import DataError

LEAST_DIGITS = 3  # digits that a printed number is assumed to have: trailing zeros may be cut off
CONTROL = re.compile(
    r"\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # a title or a link
    r"|\x1b\[[0-9;?]*[A-Za-z]"
    r"|(?:\^\[)?\[[0-9]{1,2}(?:;[0-9]{1,3})*m"  # a colour code that lost its escape character
)
# `[rank0]:`, `[default3]:`, `(worker 1)`, and `0: ` of srun --label.
PROCESS = re.compile(
    r"\s*(?:[\[(]?(?:default|rank|worker|process|proc|node|gpu)[ _#-]?(?P<named>[0-9]+)[\])]?:?"
    r"|(?P<bare>[0-9]+):)(?=[\s\[])",
    re.IGNORECASE,
)
NAMED_STEP = re.compile(
    r"(?<![\w/])(?:global[ _]?)?(?P<name>step|iteration|iter)(?![\w-])\s*[:=#]?\s*\[?\s*",
    re.IGNORECASE,
)
BRACKETED_STEP = re.compile(r"\[\s*(?=[0-9][0-9,]*\s*/\s*[0-9])")
TORCHTUNE_BAR = re.compile(r"(?:^|\s)[0-9]+\|(?=[0-9]+\|Loss:)")
EPOCH = re.compile(r"\bepoch\s*[:=]?\s*\[?\s*([0-9]+)", re.IGNORECASE)
NAMES = {
    "loss": r"(?:train(?:ing)?[ _/.-])?loss(?:[ _/]train)?",
    "grad_norm": r"(?:train[_/.-])?(?:grad(?:ient)?[ _-]?norm|gnorm)",
    "lr": r"(?:train[_/.-])?(?:lr|learning[ _-]rate)",
    "eval_loss": r"eval[ _/.-]loss",
}
LM_LOSS = "lm[ _]loss"  # accepted only if no other loss is on the line
VALUE = r"(?<![\w/.-])(?:{})(?![\w/.])\s*[:=]?\s*[\[(]?\s*"
VALUES = {name: re.compile(VALUE.format(words), re.IGNORECASE) for name, words in NAMES.items()}
LM_VALUE = re.compile(VALUE.format(LM_LOSS), re.IGNORECASE)
RATE = re.compile(r"([0-9,]+(?:\.[0-9]+)?) supervised tok/s")
EVALUATING = re.compile(r"\b(?:eval|evaluation|val|valid|validation|test)\b", re.IGNORECASE)
# Words before "loss" that name another quantity than the step's training loss.
OTHER_LOSS = re.compile(
    r"\b(?:avg|average|running|smooth(?:ed)?|ema|best|lowest|min|max|aux(?:iliary)?)[ _-]$",
    re.IGNORECASE,
)
# Known formats: the meaning of their loss if records are several steps apart.
OF_ITS_STEP = re.compile(
    r"supervised tok/s|completed step:|^Step [0-9]+ \| \w+:|\|Loss: |\(step\)|consumed_tokens:"
)
OF_MEANS = re.compile(r"elapsed time per iteration|^Iter [0-9]+: Train loss ")
MAXTEXT_EVAL = re.compile(r"eval metrics after step: (?=[0-9])")


@dataclass(frozen=True)
class Line:
    """A line of a log, cleaned, with its number in the file."""

    number: int
    text: str
    process: int | None = None


@dataclass
class StepLine:
    """The numbers of one training step, as texts."""

    line: Line
    step: int
    texts: dict[str, str] = field(default_factory=dict)


def lines_of(text: str) -> Iterator[Line]:
    """Yield every line, and every part of one that a carriage return overwrites."""
    for number, line in enumerate(text.split("\n"), start=1):
        for part in line.split("\r"):
            clean = CONTROL.sub("", part)
            process = PROCESS.match(clean)
            if process is None:
                yield Line(number, clean)
            else:
                rank = int(process["named"] or process["bare"] or 0)
                yield Line(number, clean[process.end() :].strip(), rank)


def refuse_line(path: object, line: Line, problem: str, advice: str) -> DataError:
    """Return the error that names a line."""
    return DataError(f"run {path}, line {line.number}: {line.text[:160]!r}: {problem}. {advice}")


def read_step_lines(path: object, lines: Iterable[Line], how: HowLogged) -> Log:
    """Read a text log; without step lines the result has no steps.

    Raises:
        DataError: an ambiguous number, several steps on a line, steps that begin
            anew in each epoch, or several processes that log different losses.
    """
    log = Log("text log", [], means=None)
    found: list[StepLine] = []
    heldout: dict[int, str] = {}
    kinds: set[bool] = set()
    from_zero = False
    for line in lines:
        try:
            step_line = _step_line(line)
        except Doubt as doubt:
            advice = (
                f"{EXPECTED}. Write it so, take the line out, or give the run as JSON lines with "
                "step and loss."
            )
            raise refuse_line(path, line, f"{str(doubt)!r} is ambiguous", advice) from None
        if step_line is None:
            continue
        if "eval_loss" in step_line.texts:
            heldout[step_line.step] = step_line.texts.pop("eval_loss")
        if "loss" in step_line.texts:
            found.append(step_line)
            kinds |= {False} if OF_ITS_STEP.search(line.text) else set()
            kinds |= {True} if OF_MEANS.search(line.text) else set()
            from_zero |= "completed step:" in line.text
    if not found:
        return log
    log.means = kinds.pop() if len(kinds) == 1 else None
    found = one_process(path, found)
    _check_epochs(path, found)
    _number_steps(log, found, heldout, from_zero)
    if log.means:
        log.steps = with_windows(log.steps, how)
        tell_means(log)
    return log


def _step_line(line: Line) -> StepLine | None:
    """Return the line's numbers; None if it is neither a training step nor its evaluation.

    Raises:
        Doubt: it is one, with an ambiguous number.
    """
    if "loss" not in line.text.lower():
        return None
    maxtext = MAXTEXT_EVAL.search(line.text)
    if maxtext is not None:
        step = printed_at(line.text, maxtext.end(), whole=True)
        loss = _value(line.text, VALUES["loss"], trained=False)
        if step is None or loss is None:
            return None
        return StepLine(line, int(step), {"eval_loss": loss})
    texts, doubts = {}, []
    for name, pattern in VALUES.items():
        try:
            texts[name] = _value(line.text, pattern, trained=name != "eval_loss")
            if name == "loss" and texts[name] is None:
                texts[name] = _value(line.text, LM_VALUE)
        except Doubt as doubt:
            texts[name] = "?"
            doubts.append(doubt)
    if texts["loss"] is None and texts["eval_loss"] is None:
        return None
    step = _step(line.text)
    if step is None:
        return None
    for doubt in doubts:
        raise doubt
    return StepLine(line, int(step), {name: text for name, text in texts.items() if text})


def _value(text: str, name: re.Pattern[str], *, trained: bool = True) -> str | None:
    """Return the first number after the name; for a training loss, not after a word for
    evaluation."""
    for match in name.finditer(text):
        before = text[: match.start()]
        if trained and (EVALUATING.search(before) or OTHER_LOSS.search(before)):
            continue
        value = printed_at(text, match.end())
        if value is not None:
            return value
    return None


def _step(text: str) -> str | None:
    """Return the step of the line; if it has both `iter` and `step`, that of `step`."""
    bar = TORCHTUNE_BAR.search(text)
    if bar is not None:
        return text[bar.end() :].partition("|")[0]
    named = [
        (match["name"].lower(), number)
        for match in NAMED_STEP.finditer(text)
        if (number := printed_at(text, match.end(), whole=True)) is not None
    ]
    steps = [number for name, number in named if name == "step"]
    if steps and len(named) > len(steps) and "loss train" in text and "(step)" not in text:
        return None  # LitGPT's micro-batches of an unfinished step
    if named:
        return (steps or [number for _, number in named])[0]
    brackets = list(BRACKETED_STEP.finditer(text))
    if len(brackets) > 1:
        raise Doubt(text[brackets[0].start() :].partition("]")[0] + "] and another")
    return printed_at(text, brackets[0].end(), whole=True) if brackets else None


# Facts from several lines -------------------------------------------------------------------------


def one_process(path: object, found: Sequence[StepLine]) -> list[StepLine]:
    """Return the lines of one process, if all processes logged the same values for a step.

    Raises:
        DataError: they did not, or most steps have several lines without a process.
    """
    named = [each.line.process for each in found if each.line.process is not None]
    if len(set(named)) > 1:
        first = min(named)
        kept = [each for each in found if each.line.process in (first, None)]
        losses: dict[int, dict[str, Line]] = {}
        for each in kept:
            losses.setdefault(each.step, {})[each.texts["loss"]] = each.line
        for each in found:
            theirs = losses.get(each.step, {})
            if each.texts["loss"] not in theirs:
                raise _several(path, each.line, next(iter(theirs.values()), None))
        return kept
    again = [
        (a, b) for a, b in zip(found, found[1:], strict=False)
        if a.step == b.step and a.texts["loss"] != b.texts["loss"]
    ]  # fmt: skip
    if len(again) > 1 and 4 * len(again) >= len({each.step for each in found}):
        raise _several(path, again[0][1].line, again[0][0].line)
    return list(found)


def _several(path: object, line: Line, other: Line | None) -> DataError:
    told = "" if other is None else f", and line {other.number} another"
    return refuse_line(
        path,
        line,
        f"it has a loss of its step{told}: lines of several processes or micro-batches",
        "Give the log of the one process that logs the mean of all, or JSON lines with step and "
        "loss.",
    )


def _check_epochs(path: object, found: Sequence[StepLine]) -> None:
    epochs = [(each, m) for each in found if (m := EPOCH.search(each.line.text))]
    for (before, old), (after, new) in zip(epochs, epochs[1:], strict=False):
        if after.step <= before.step and int(new[1]) > int(old[1]):
            raise refuse_line(
                path,
                after.line,
                f"its step is {after.step:,} in epoch {new[1]}, after {before.step:,} in epoch "
                f"{old[1]}: steps begin again in each epoch",
                "Expected updates since the start of the run; give it as JSON lines with step and "
                "loss.",
            )


def _number_steps(
    log: Log, found: Sequence[StepLine], heldout: dict[int, str], from_zero: bool
) -> None:
    """Fill the log with steps that count finished updates; a text that begins at step 0 counts
    started ones."""
    moved = 1 if from_zero or min(each.step for each in found) == 0 else 0
    columns = {
        name: [each.texts.get(name) for each in found] for name in ("loss", "grad_norm", "lr")
    }
    rates = [RATE.search(each.line.text) for each in found]
    log.steps = rows(
        [each.step + moved for each in found],
        columns,
        dict.fromkeys(columns, LEAST_DIGITS),
        [None if rate is None else float(rate[1].replace(",", "")) for rate in rates],
    )
    if moved:
        log.notes.append("its steps count from 0: moved by one")
    if heldout and moved and not from_zero:
        log.notes.append(
            "its held-out losses are not compared: with steps from 0, nothing tells whether they "
            "are of before or after the step"
        )
    else:
        add_heldout(log, {step + moved: text for step, text in heldout.items()}, LEAST_DIGITS)
    log.notes.append("its numbers are rounded as printed; the bands are widened by that")


def rows(
    steps: Sequence[int],
    columns: dict[str, list[str | None]],
    least_digits: dict[str, int | None],
    rates: Sequence[float | None] | None = None,
) -> list[LoggedStep]:
    """Return the columns' texts as records; a column without `least_digits` is exact."""
    halves = {
        name: half_digits(texts, least) if (least := least_digits[name]) else [None] * len(texts)
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


def add_heldout(log: Log, texts: dict[int, str], least_digits: int | None) -> None:
    """Add held-out losses by step."""
    log.heldout = {step: float(text) for step, text in texts.items()}
    if least_digits:
        halves = half_digits(list(texts.values()), least_digits)
        log.heldout_rounding = {s: h for s, h in zip(texts, halves, strict=True) if h}
