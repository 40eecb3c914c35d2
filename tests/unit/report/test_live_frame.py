"""The picture of a running run: what it shows, on narrow terminals and with hostile names."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from torchprime.metrics.record import EvalRecord, StepRecord, TimeRecord
from torchprime.report.live import LiveRun
from torchprime.report.live_frame import BLOCKS, frame, sparkline

EVIL = "\x1b[2J[red]x[/red]\u202e\n\x07"
SCORE = {"value": 0.5, "count": 2, "low": 0.1, "high": 0.9, "interval": "wilson"}


@pytest.fixture
def live(tmp_path: Path, step_record: StepRecord) -> LiveRun:
    """A run at step 40 of 100, whose last record is 5 s old."""
    run = LiveRun(tmp_path / "first", now=lambda: 1005.0)
    run.total, run.starts, run.changed = 100, [0, 20], 1000.0
    run.about = "tiny, torch_xla on 4 x CPU"
    run.losses = [(step, 4.0 / step) for step in range(1, 41)]
    run.recent = [
        replace(
            step_record, step=40, loss=0.1, terms={"kl": 0.25}, source_losses={"a": 1.0}, mfu=0.41
        )
    ]
    first = EvalRecord(0, 2.0, 100, 1.0)
    scores = {"exact": SCORE}
    run.evaluations = [first, replace(first, step=40, eval_loss=1.25, scores=scores)]
    run.checkpoint = {"name": "step_00000040", "bytes": 12_000_000, "stall_seconds": 0.25}
    run.times = TimeRecord(40, 20, 0.0, 100.0, {"data": 2.0, "step": 90.0})
    return run


def drawn(run: LiveRun, width: int = 100, ascii_only: bool = False) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(frame(run, width, ascii_only))
    return out.getvalue()


def test_it_shows_what_one_wants_to_know(live: LiveRun) -> None:
    text = " ".join(drawn(live).split())
    for told in (
        "first: tiny, torch_xla on 4 x CPU",
        "running, last record 5s ago",
        "40/100 40.0%",
        "loss 0.1000",
        "0.1000 to 4.0000 since step 1",
        "terms kl 0.25",
        "by source a 1",
        "1 s/step, 512 supervised tok/s, 1,024 tok/s with padding, MFU 41.0%",
        "ETA 1m00s",
        "step 40: loss 1.2500 (step 0: 2.0000)",
        "exact 50.0% (10.0 to 90.0)",
        "step_00000040, 0.01 GB, paused the run for 0.25 s",
        "90.0% in steps, 2.0% waiting for data, of 1m40s since this start",
        "starts 2, resumed after step 20",
    ):
        assert told in text, told


@pytest.mark.parametrize("width", [20, 30, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal(width: int, live: LiveRun) -> None:
    text = drawn(live, width)
    assert max(map(len, text.splitlines())) <= width
    assert "40/100" in text


def test_ascii_is_enough(live: LiveRun) -> None:
    assert drawn(live, ascii_only=True).isascii()


def test_names_from_files_are_neither_codes_nor_markup(live: LiveRun) -> None:
    live.about = EVIL
    live.recent[-1] = replace(live.recent[-1], terms={EVIL: 1.0}, source_losses={EVIL: 2.0})
    live.evaluations[-1] = replace(live.evaluations[-1], scores={EVIL: SCORE})
    live.checkpoint = {"name": EVIL}
    text = drawn(live)
    assert not set("\x1b\x07\u202e") & set(text)
    assert text.count("[red]x[/red]") == 5


def test_states(live: LiveRun) -> None:
    live.now = lambda: 2000.0
    assert "last record 16m40s ago: evaluating, exporting or stopped" in drawn(live)
    live.finished = True
    assert "finished" in drawn(live)
    live.finished, live.changed = False, None
    assert "no record yet" in drawn(live)
    live.changed, live.total = 1000.0, 40
    assert "all steps are done" in drawn(live) and "ETA" not in drawn(live)
    live.total = None
    assert "waiting for the run to start" in drawn(live)


def test_a_sparkline_has_the_curve_and_fits() -> None:
    falling = [(step, 100.0 - step) for step in range(100)]
    assert sparkline(falling, 8) == BLOCKS[::-1]
    assert sparkline(falling[:3], 8) == "█▅▁"
    assert sparkline([(1, 2.0)], 8) == "" and sparkline([], 8) == ""
    assert sparkline([(1, 1.0), (2, math.nan), (3, 3.0)], 8) == "▁█"
    assert sparkline([(1, 1.0), (2, 1.0)], 8) == "▁▁"
    assert sparkline([(1, 0.0), (2, 1.0), (100, 1.0)], 3) == "▁ █"
