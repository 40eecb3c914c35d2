"""`torchprime watch RUN`: a live view of a run in the terminal, also over ssh.

It only reads the run's folder, so it works for a run of any process on any host that sees the
folder, and does not disturb it. Ctrl-C leaves it.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.live import Live

from torchprime.cli.shared.arguments import make_parser, run_command
from torchprime.config.paths import local_path
from torchprime.errors import DataError
from torchprime.metrics.record import EvalRecord, StepRecord
from torchprime.metrics.writers import record_line
from torchprime.report.live import METRICS, LiveRun
from torchprime.report.live_frame import frame
from torchprime.text.terminal import print_lines, print_text, say

EPILOG = """\
RUN is a folder, <output_dir>/<run_name>; it may not be there yet. On a terminal the view is drawn
again and again until the run has finished; elsewhere each new record is a line. Exit code: 0; 2 if
a file of the run is damaged, and for --once if there is no run.
"""


def watch_main(argv: list[str]) -> int:
    """Run `watch` with the arguments after it; return the exit code."""
    parser = make_parser("torchprime watch", "Show a run while it goes on.", EPILOG)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--once", action="store_true", help="print the present state and exit")
    parser.add_argument(
        "--every", metavar="SECONDS", type=_seconds, default=1.0, help="between two looks (1)"
    )
    return run_command(parser, argv, _watch)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.05 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not from 0.05 to 3600")
    return value


def _watch(given: argparse.Namespace) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name may have letters that it lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    run, console = LiveRun(local_path("RUN", given.run)), Console(file=sys.stdout)
    if given.once:
        return _once(run, console)
    try:
        if console.is_terminal and not console.is_dumb_terminal:
            _draw(run, console, given.every)
        else:
            _print(run, given.every)
    except KeyboardInterrupt:  # the way to leave
        return 0
    return 0


def _draw(run: LiveRun, console: Console, every: float) -> None:
    """Redraw the view in its place."""
    with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:

        def show(records: Sequence[dict[str, Any]]) -> None:
            live.update(frame(run, console.width, _ascii_only(console)), refresh=True)

        _follow(run, every, show)


def _print(run: LiveRun, every: float) -> None:
    """Print a line for each new record."""
    if not (run.folder / METRICS).exists():
        say(f"waiting for records of {run.folder}")

    def show(records: Sequence[dict[str, Any]]) -> None:
        lines = [line for record in records if (line := _line(run, record)) is not None]
        if lines:
            print_lines(lines)

    _follow(run, every, show)
    say(f"{run.folder} has finished")


def _line(run: LiveRun, record: dict[str, Any]) -> str | None:
    if record["kind"] == "train":
        return record_line(StepRecord.from_dict(record), run.total or 0)
    if record["kind"] == "eval":
        return record_line(EvalRecord.from_dict(record), run.total or 0)
    return None


def _follow(run: LiveRun, every: float, show: Callable[[Sequence[dict[str, Any]]], None]) -> None:
    """Show the run until it has finished."""
    while True:
        show(run.update())
        if run.finished:
            return
        time.sleep(every)


def _once(run: LiveRun, console: Console) -> int:
    run.update()
    if not run.is_there:
        raise DataError(f"RUN: {run.folder} holds no run yet, expected <output_dir>/<run_name>.")
    text = io.StringIO()
    paper = Console(
        file=text,
        width=console.width,
        force_terminal=console.is_terminal,
        no_color=console.no_color,
    )
    paper.print(frame(run, console.width, _ascii_only(console)))
    print_text(text.getvalue(), "backslashreplace", coloured=True)
    return 0


def _ascii_only(console: Console) -> bool:
    return not console.encoding.startswith("utf")
