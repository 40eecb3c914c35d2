"""One picture of a running run for a terminal: a table of names and values, made with rich.

All texts of the run's files go through `shown`, and none is read as markup.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from torchprime.metrics.goodput import DATA, STEP
from torchprime.metrics.record import EvalRecord, StepRecord
from torchprime.metrics.writers import format_duration
from torchprime.metrics.writers import shown as shown_score
from torchprime.report.live import LiveRun
from torchprime.text.terminal import shown

BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "_.-=+*#@"
LABELS = 12  # cells of the first column with its margin
WIDEST = 72  # cells of the curve and the bar
QUIET = 10  # times of a logged stretch after which a silent run is suspicious
LEAST_QUIET = 60.0  # seconds


def frame(run: LiveRun, width: int, ascii_only: bool = False) -> Table:
    """Return the picture for a terminal of so many cells."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold", ratio=1)
    room = max(8, min(WIDEST, width - LABELS))
    for label, value in _rows(run, room, ascii_only):
        table.add_row(label, value if isinstance(value, Text) else Text(_clean(value)))
    return table


def _clean(text: str) -> str:
    return " ".join(shown(text).split())


def _rows(run: LiveRun, room: int, ascii_only: bool) -> Iterator[tuple[str, str | Text]]:
    yield "run", f"{run.folder.absolute().name}: {run.about}" if run.about else str(run.folder)
    if not run.is_there:
        yield "state", Text("waiting for the run to start", style="yellow")
        return
    yield "state", _state(run)
    step = run.recent[-1].step if run.recent else max([0, *run.starts])
    yield "step", _progress(step, run.total or 0, room, ascii_only)
    if run.recent:
        yield from _training(run, run.recent[-1], room, ascii_only)
    if run.evaluations:
        yield from _evaluations(run.evaluations)
    if run.checkpoint is not None:
        yield "checkpoint", _checkpoint(run.checkpoint)
    if run.times is not None and run.times.wall_seconds > 0:
        spent, wall = run.times.seconds, run.times.wall_seconds
        shares = [f"{spent.get(use, 0.0) / wall:.1%} {name}" for use, name in USES.items()]
        yield "time", f"{', '.join(shares)}, of {format_duration(wall)} since this start"
    if len(run.starts) > 1:
        yield (
            "starts",
            f"{len(run.starts)}, resumed after step {', '.join(map(str, run.starts[1:]))}",
        )


USES = {STEP: "in steps", DATA: "waiting for data"}


def _state(run: LiveRun) -> Text:
    if run.finished:
        return Text("finished", style="green")
    if run.changed is None:
        return Text("no record yet", style="yellow")
    if run.recent and run.recent[-1].step == run.total:
        return Text("all steps are done, the report is not written yet", style="green")
    quiet = max(0.0, run.now() - run.changed)
    told = f"last record {format_duration(quiet)} ago"
    steps = [step for step, _ in run.losses[-2:]]
    between = (run.seconds_per_step() or 0.0) * (steps[-1] - steps[0] if len(steps) > 1 else 1)
    if quiet > max(LEAST_QUIET, QUIET * between):
        return Text(f"{told}: evaluating, exporting or stopped", style="yellow")
    return Text(f"running, {told}", style="green")


def _progress(step: int, total: int, room: int, ascii_only: bool) -> Text:
    share = min(1.0, step / total) if total else 0.0
    told = f"{step:,}/{total:,} {share:.1%} "
    cells = max(0, room - len(told))
    full, empty = ("#", "-") if ascii_only else ("━", "╺")
    done = round(share * cells)
    return Text.assemble(told, (full * done, "green"), (empty * (cells - done), "dim"))


def _training(
    run: LiveRun, last: StepRecord, room: int, ascii_only: bool
) -> Iterator[tuple[str, str | Text]]:
    yield "loss", f"{last.loss:.4f}"
    curve = sparkline(run.losses, room, ASCII if ascii_only else BLOCKS)
    if curve:
        values = [loss for _, loss in run.losses if math.isfinite(loss)]
        yield "", Text(curve, style="cyan")
        yield "", f"{min(values):.4f} to {max(values):.4f} since step {run.losses[0][0]:,}"
    for label, parts in (("terms", last.terms), ("by source", last.source_losses)):
        told = [f"{name} {value:.4g}" for name, value in (parts or {}).items() if value is not None]
        if told:
            yield label, ", ".join(told)
    yield "gradient", f"norm {last.grad_norm:.3g}, learning rate {last.lr:.2e}"
    yield "rate", _rate(last)
    seconds = run.seconds_per_step()
    if seconds is not None and run.total and last.step < run.total:
        yield "ETA", format_duration((run.total - last.step) * seconds)
    yield "memory", _memory(last)


def _rate(last: StepRecord) -> str:
    parts = [
        f"{last.step_seconds:.3g} s/step",
        f"{last.supervised_tokens_per_s:,.0f} supervised tok/s",
        f"{last.slot_tokens_per_s:,.0f} tok/s with padding",
    ]
    if last.mfu is not None:
        parts.append(f"MFU {last.mfu:.1%}")
    return ", ".join(parts)


def _memory(last: StepRecord) -> str:
    device = last.device_memory_bytes
    parts = [] if device is None else [f"device {device / 1e9:.2f} GB"]
    return ", ".join([*parts, f"host {last.host_memory_bytes / 1e9:.2f} GB"])


def _evaluations(found: Sequence[EvalRecord]) -> Iterator[tuple[str, str]]:
    last = found[-1]
    yield "evaluation", f"step {last.step:,}: loss {last.eval_loss:.4f}{_before(found)}"
    for name, score in (last.scores or {}).items():
        yield "", f"{name} {shown_score(score)}"


def _before(found: Sequence[EvalRecord]) -> str:
    return f" (step {found[0].step:,}: {found[0].eval_loss:.4f})" if len(found) > 1 else ""


def _checkpoint(record: Mapping[str, object]) -> str:
    size, stall = record.get("bytes"), record.get("stall_seconds")
    told = f"{record.get('name')}"
    if isinstance(size, int):
        told += f", {size / 1e9:.2f} GB"
    return f"{told}, paused the run for {stall:.2f} s" if isinstance(stall, float) else told


def sparkline(points: Sequence[tuple[int, float]], room: int, marks: str = BLOCKS) -> str:
    """Draw values by step in at most `room` characters; each shows the mean of its steps."""
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    first, last = finite[0][0], finite[-1][0]
    cells = min(room, len(finite))
    found: list[list[float]] = [[] for _ in range(cells)]
    for step, value in finite:
        place = (step - first) * cells // max(1, last - first + 1)
        found[place].append(value)
    means = [sum(each) / len(each) if each else None for each in found]
    low, high = min(m for m in means if m is not None), max(m for m in means if m is not None)
    size = (high - low) or 1.0
    return "".join(
        " " if mean is None else marks[min(len(marks) - 1, int((mean - low) / size * len(marks)))]
        for mean in means
    )
