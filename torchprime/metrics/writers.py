"""Writers of records: `metrics.jsonl` first, then trackers and the terminal.

The loop passes every record to every `Writer` in turn and closes them at the end. `metrics.jsonl`
is the primary record: each line is flushed when it is written, so a killed run loses no line. A
line torn by a crash is removed when the next run appends. The others show the same records;
trackers/ has those that show them elsewhere.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from torchprime.config.sections.evaluation import source_loss
from torchprime.errors import DataError, RuntimeSetupError
from torchprime.files.atomic import open_plain, read_regular_text
from torchprime.metrics.record import (
    CheckpointRecord,
    EvalRecord,
    GradedScore,
    Record,
    SpikeRecord,
    StepRecord,
    TimeRecord,
    from_json,
    to_json,
)
from torchprime.text.terminal import say
from torchprime.text.terminal import shown as shown_text

MOST_BYTES = 2**30  # of a log, which is held whole


class Writer(Protocol):
    def write(self, record: Record) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """Writer of one line per record to `path`, flushed at once and fsynced on close."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._telling():
            descriptor = open_plain(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            # Unbuffered: closing has nothing left to write that could fail.
            self._file = open(descriptor, "r+b", buffering=0)  # noqa: SIM115
            _cut_torn_line(self._file)

    def write(self, record: Record | TimeRecord) -> None:
        line = memoryview((to_json(record) + "\n").encode())
        with self._telling():
            while line:
                line = line[self._file.write(line) :]

    def sync(self) -> None:
        """Wait until the lines are on the disk."""
        with self._telling():
            os.fsync(self._file.fileno())

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RuntimeSetupError(
                f"{self._path} cannot be written: {error.strerror}. Make room or give this user "
                "the right to write there; the same command then resumes from the run's newest "
                "checkpoint, if it wrote any."
            ) from error

    def close(self) -> None:
        if not self._file.closed:
            with closing(self._file):
                self.sync()


def _cut_torn_line(file: FileIO) -> None:
    """Remove an incomplete last line of a crashed run, to which the next record would be
    appended."""
    content = file.readall()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        file.truncate(whole)


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return all records of a `metrics.jsonl` in file order, without a last line that is being
    written."""
    try:
        text = read_regular_text(Path(path), MOST_BYTES)
    except UnicodeDecodeError as error:
        raise DataError(
            f"metrics file {path}: is not text ({error.reason}); expected the metrics.jsonl in a "
            "run's folder, <output_dir>/<run_name>/"
        ) from error
    except OSError as error:
        raise DataError(
            f"metrics file {path}: cannot be read ({error.strerror}); "
            "expected the metrics.jsonl in a run's folder, <output_dir>/<run_name>/"
        ) from error
    *lines, _torn = text.split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(from_json(line))
        except ValueError as error:
            raise DataError(
                f"metrics file {path}, line {number}: got {line[:80]!r} ({error}), expected one "
                "JSON object as the trainer writes it; remove the line or repeat the run"
            ) from error
    return records


class ConsoleWriter:
    """Writer of a progress bar if `stream` (default stderr) is a terminal, else of plain lines.

    `start_step` is the number of updates that a resumed run has already done.
    """

    def __init__(self, total_steps: int, start_step: int = 0, stream: TextIO | None = None) -> None:
        self._total_steps = total_steps
        self._stream = sys.stderr if stream is None else stream
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                unit="step",
                file=self._stream,
                dynamic_ncols=True,
            )

    def sync(self) -> None:
        """Do nothing: lines are printed at once."""

    def write(self, record: Record) -> None:
        if isinstance(record, CheckpointRecord):  # the writer that failed has reported it
            return
        if self._bar is None:
            say(record_line(record, self._total_steps), self._stream)
        elif isinstance(record, EvalRecord | SpikeRecord):
            self._bar.write(shown_text(record_line(record, self._total_steps)), file=self._stream)
        else:
            self._bar.set_postfix_str(
                f"loss {record.loss:.4f}, lr {record.lr:.2e}, "
                f"{record.supervised_tokens_per_s:,.0f} supervised tok/s",
                refresh=False,
            )
            self._bar.update(record.step - self._bar.n)
            self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def record_line(record: StepRecord | EvalRecord | SpikeRecord, total_steps: int) -> str:
    """Return a record as a line for a terminal."""
    parts = [f"step {record.step}/{total_steps}"]
    if isinstance(record, SpikeRecord):
        parts.append(record.describe())
    elif isinstance(record, StepRecord):
        remaining = (total_steps - record.step) * record.step_seconds
        parts += [
            f"loss {record.loss:.4f}",
            *(f"{name} {value:.4g}" for name, value in (record.terms or {}).items()),
            f"grad_norm {record.grad_norm:.2f}",
            f"lr {record.lr:.2e}",
            f"{record.supervised_tokens_per_s:,.0f} supervised tok/s",
            f"{record.step_seconds:.2f} s/step",
            f"ETA {format_duration(remaining)}",
        ]
    else:
        parts += [
            f"eval_loss {record.eval_loss:.4f}",
            f"eval_perplexity {record.eval_perplexity:.2f}",
            *_source_losses(record),
            f"{record.eval_supervised_tokens:,} supervised tokens",
            *(f"{name} {shown(score)}" for name, score in (record.scores or {}).items()),
            f"{record.seconds:.1f} s",
        ]
    return "  ".join(parts)


def _source_losses(record: EvalRecord) -> list[str]:
    """Return the held-out loss of each source that has one, as texts."""
    losses = (record.source_losses or {}).items()
    return [f"{source_loss(name)} {loss:.4f}" for name, loss in losses if loss is not None]


def shown(score: GradedScore) -> str:
    """Return a score with its interval: `71.0% (64.4 to 76.9)` for passes, else `12.3 (11.8 to
    12.9)`."""
    value, low, high = score["value"], score["low"], score["high"]
    if score["interval"] == "wilson":
        return f"{value:.1%} ({100 * low:.1f} to {100 * high:.1f})"
    return f"{value:.3g} ({low:.3g} to {high:.3g})"


def format_duration(seconds: float) -> str:
    """Return `42s`, `3m10s` or `2h05m`; `?` if the duration is unknown."""
    if not math.isfinite(seconds):
        return "?"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minute:02d}m"
    return f"{minute}m{second:02d}s" if minute else f"{second}s"
