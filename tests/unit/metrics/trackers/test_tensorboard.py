"""TensorBoard's files, read by its own reader."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchprime.metrics.record import CheckpointRecord, EvalRecord, StepRecord
from torchprime.metrics.trackers.tensorboard import TensorBoard
from torchprime.metrics.trackers.tracker import Table, TrackedRun, Tracker, scalars

EVAL = EvalRecord(step=10, eval_loss=math.log(4), eval_supervised_tokens=1500, seconds=2.04)


def text_of(events: EventAccumulator, tag: str) -> str:
    (event,) = events.Tensors(f"{tag}/text_summary")
    return event.tensor_proto.string_val[0].decode()


def test_it_gets_numbers_config_and_answers(tmp_path: Path, step_record: StepRecord) -> None:
    run = TrackedRun("first", tmp_path, {"seed": 42, "model": {"pretrained_model": "<b>x"}})
    tracker: Tracker = TensorBoard(run)
    assert tracker.open() is None
    for record in (step_record, EVAL, CheckpointRecord(10, "step_10", 7, 0.1, 0.2)):
        tracker.log(record.step, scalars(record))
    tracker.table(10, Table(["output", "exact"], [["a|b <script>", 1.0], ["c", None]]))
    tracker.close("finished")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/lr", "eval/loss", "eval/perplexity", "checkpoint/bytes"} <= tags
    assert not tags & {"train/step", "train/batch_hash", "train/kind", "train/mfu"}
    (loss,) = events.Scalars("train/loss")
    assert (loss.step, loss.value) == (10, pytest.approx(1.2345))
    (perplexity,) = events.Scalars("eval/perplexity")
    assert (perplexity.step, perplexity.value) == (10, pytest.approx(4))
    assert '"seed": 42' in text_of(events, "config")
    assert r"| a\|b &lt;script> | 1.0 |" in text_of(events, "samples")
    assert not (tmp_path / "trackers").exists(), "it needs no folder beside its own"


def test_points_after_the_resumed_step_are_replaced(tmp_path: Path) -> None:
    for first_step, value in ((0, 1.0), (2, 2.0)):
        tracker = TensorBoard(TrackedRun("first", tmp_path, {}, first_step=first_step))
        tracker.open()
        for step in range(first_step + 1, 5):
            tracker.log(step, {"train/loss": value})
        tracker.close("finished")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(each.step, each.value) for each in events.Scalars("train/loss")]
    assert found == [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0)]
