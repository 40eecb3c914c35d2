"""A run with a moving average of its weights: exported, exact after a resume, on both backends."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import interrupted
import pytest
import torch
from interrupted import ALONE, STEPS, Killed, assert_same_run, records

from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.checkpoint.run.catalog import Catalog
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.reader import CheckpointReader
from torchprime.cli.export import export_main
from torchprime.config.entry import run_main
from torchprime.torch_native.train import main as native

DECAY = 0.6


def last(folder: Path, step: int = STEPS) -> CheckpointReader:
    return CheckpointReader(open_storage(folder / "checkpoints"), Catalog.name_of(step))


def check(
    start: Callable[[list[str]], int],
    argv: Callable[[Path], list[str]],
    tmp_path: Path,
    killed_after: Callable[[int], None],
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(argv(whole)) == 0
    killed_after(7)
    with pytest.raises(Killed):
        start(argv(cut))
    assert start(argv(cut)) == 0
    assert_same_run(cut, whole)
    reader, exported = last(whole), SafetensorsReader(whole / "export")
    certificate = json.loads((whole / "export" / "certificate.json").read_text())
    assert certificate["passed"] and "the moving average in step_" in certificate["origin"]
    for name in exported.names():
        average, weight = reader.get(f"optimizer.ema.{name}"), reader.get(f"model.{name}")
        assert torch.equal(exported.get(name), average) and not torch.equal(average, weight)
    # What was measured at the end is what a run from the export measures before its first step.
    other = tmp_path / "other"
    further = (f"model.pretrained_model={whole / 'export'}", f"output_dir={tmp_path}")
    more = ("run_name=other", "task.max_steps=1", "task.ema_decay=null", *ALONE)
    assert run_main(native, [*argv(whole), *further, *more]) == 0
    measured = records(whole, "eval")[-1]["eval_loss"]
    assert records(other, "eval")[0]["eval_loss"] == pytest.approx(measured, rel=1e-6)
    raw = tmp_path / "raw"
    checkpoint = str(whole / "checkpoints" / Catalog.name_of(STEPS))
    assert export_main([checkpoint, "--raw", "--out", str(raw)]) == 0
    raw_reader = SafetensorsReader(raw)
    assert all(torch.equal(raw_reader.get(n), reader.get(f"model.{n}")) for n in raw_reader.names())


def test_native(
    command: Callable[..., list[str]], rows: tuple[Path, Path], tmp_path: Path,
    killed_after: Callable[[int], None],
) -> None:  # fmt: skip
    def argv(folder: Path) -> list[str]:
        more = (f"task.ema_decay={DECAY}", "checkpoint.every_steps=1")
        return command(*interrupted.overrides(folder, rows[1]), *ALONE, *more)

    check(lambda given: run_main(native, given), argv, tmp_path, killed_after)
    name = "model.norm.weight"
    average = last(tmp_path / "whole", 1).get(f"model.{name}")
    for step in range(2, STEPS + 1):
        reader = last(tmp_path / "whole", step)
        average = torch.lerp(average, reader.get(f"model.{name}"), 1 - DECAY)
        torch.testing.assert_close(reader.get(f"optimizer.ema.{name}"), average)


@pytest.mark.slow
def test_xla_on_four_devices(
    run: Callable[[list[str]], int], command: Callable[..., list[str]], rows: tuple[Path, Path],
    tmp_path: Path, killed_after: Callable[[int], None],
) -> None:  # fmt: skip
    def argv(folder: Path) -> list[str]:
        return command(*interrupted.overrides(folder, rows[1]), f"task.ema_decay={DECAY}")

    check(run, argv, tmp_path, killed_after)
