"""Records in metrics.jsonl and on the terminal."""

from __future__ import annotations

import io
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest

from torchprime.errors import DataError
from torchprime.metrics.record import EvalRecord, StepRecord
from torchprime.metrics.writers import (
    ConsoleWriter,
    JsonlWriter,
    Writer,
    format_duration,
    read_metrics,
)

EVAL = EvalRecord(step=10, eval_loss=math.log(4), eval_supervised_tokens=1500, seconds=2.04)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_every_record_is_on_disk_as_soon_as_it_is_written(
    tmp_path: Path, step_record: StepRecord
) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    writer: Writer = JsonlWriter(path)
    writer.write(step_record)
    assert len(path.read_text().splitlines()) == 1
    writer.write(EVAL)
    lines = path.read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["train", "eval"]
    writer.close()
    writer.close()  # closing twice is allowed: a failing run closes on its way out too


def test_closing_syncs_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step_record: StepRecord
) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(step_record)
    assert not synced
    writer.close()
    assert len(synced) == 1


def test_a_second_writer_appends_after_cutting_a_torn_line(
    tmp_path: Path, step_record: StepRecord
) -> None:
    path = tmp_path / "metrics.jsonl"
    for torn in ("", '{"kind": "train", "st'):
        writer = JsonlWriter(path)
        writer.write(step_record)
        writer.close()
        with path.open("a") as file:
            file.write(torn)
    JsonlWriter(path).close()
    assert [record["step"] for record in read_metrics(path)] == [10, 10]
    assert path.read_text().endswith("}\n")


def test_reading_gives_nan_back_and_skips_a_line_still_being_written(
    tmp_path: Path, step_record: StepRecord
) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write(replace(step_record, loss=math.nan))
    writer.close()
    with path.open("a") as file:
        file.write('{"kind": "tr')
    (record,) = read_metrics(path)
    assert math.isnan(record["loss"])


def test_reading_names_the_malformed_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(DataError, match=r"line 2: got 'not json'"):
        read_metrics(path)


def test_reading_a_missing_file_says_which_was_expected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.jsonl.*No such file.*expected the metrics"):
        read_metrics(tmp_path / "nowhere.jsonl")


def test_plain_lines_when_the_stream_is_no_terminal(step_record: StepRecord) -> None:
    stream = io.StringIO()
    writer: Writer = ConsoleWriter(total_steps=200, stream=stream)
    writer.write(step_record)
    writer.write(EVAL)
    writer.close()
    assert stream.getvalue() == (
        "step 10/200  loss 1.2345  grad_norm 0.98  lr 1.00e-04  512 supervised tok/s  "
        "1.00 s/step  ETA 3m10s\n"
        "step 10/200  eval_loss 1.3863  eval_perplexity 4.00  1,500 supervised tokens  2.0 s\n"
    )


def test_a_bar_with_an_eta_on_a_terminal(step_record: StepRecord) -> None:
    stream = Terminal()
    writer: Writer = ConsoleWriter(total_steps=200, stream=stream)
    writer.write(step_record)
    shown = stream.getvalue().rsplit("\r", 1)[-1]
    assert "10/200" in shown
    assert "5%" in shown
    assert "<" in shown, "tqdm shows [elapsed<remaining"
    assert "loss 1.2345, lr 1.00e-04, 512 supervised tok/s" in shown
    writer.write(EVAL)
    assert "step 10/200  eval_loss 1.3863" in stream.getvalue()
    writer.close()


def test_a_resumed_run_s_bar_starts_where_it_left(step_record: StepRecord) -> None:
    stream = Terminal()
    writer = ConsoleWriter(total_steps=200, start_step=100, stream=stream)
    assert "100/200" in stream.getvalue()
    writer.write(replace(step_record, step=110))
    writer.close()
    assert "110/200" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (190, "3m10s"),
        (3599.7, "1h00m"),
        (7500, "2h05m"),
        (math.nan, "?"),
        (math.inf, "?"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
