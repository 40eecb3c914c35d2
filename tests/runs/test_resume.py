"""Runs that are cut short and go on: bit for bit on the same mesh, to rounding on another."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from interrupted import (
    ALONE,
    EVERY,
    STEPS,
    Killed,
    agree,
    assert_same_run,
    overrides,
    records,
    torchrun,
)

from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.checkpoint.proof.certificate import hash_folder
from torchprime.checkpoint.run.catalog import Catalog
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.cli.resume_check import resume_check_main
from torchprime.config.compose import compose_config
from torchprime.config.entry import run_main
from torchprime.metrics import goodput
from torchprime.torch_native.train import main as native
from torchprime.training.hooks.checkpoint import NOW_FILE, CheckpointHook
from torchprime.training.optim import adamw_8bit
from torchprime.training.run import saver as saving

Run = Callable[[list[str]], int]
Command = Callable[..., list[str]]


@pytest.mark.parametrize("step", [5, 6])
def test_the_same_command_goes_on_exactly(
    step: int, whole: Path, run: Run, cut_short: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, argv = cut_short(step)
    assert len(records(folder)) == step
    assert run(argv) == 0
    assert f"resuming from {folder}/checkpoints/step_{step // EVERY * EVERY:08d}" in (
        capsys.readouterr().err
    )
    assert_same_run(folder, whole)
    facts = json.loads((folder / "run.json").read_text())
    assert [start["step"] for start in facts["starts"]] == [0, step // EVERY * EVERY]
    spent = facts["goodput"]["seconds"]
    assert sum(spent.values()) == pytest.approx(facts["goodput"]["wall_seconds"])
    # Runs of this process share compiled programs, so this one may not have compiled.
    assert spent["compile"] >= 0 and spent["evaluation"] > 0 and spent["lost"] > 0


def test_a_complete_run_is_left_alone(
    whole: Path, run: Run, command: Command, rows: tuple[Path, Path], capsys: Any
) -> None:
    before = (whole / "metrics.jsonl").read_bytes()
    assert run(command(*overrides(whole, rows[1]))) == 0
    assert "nothing left to do" in capsys.readouterr().err
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_a_lost_export_is_written_again(
    whole: Path, run: Run, command: Command, rows: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "export")
    assert run(command(*overrides(folder, rows[1]))) == 0
    assert_same_run(folder, whole)


def test_another_mesh_and_accumulation_go_on_to_rounding(
    whole: Path, run: Run, cut_short: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, argv = cut_short(6)
    moved = [
        *(each for each in argv if not each.startswith("ici_mesh")),
        "ici_mesh.data=4",
        "task.gradient_accumulation_steps=1",
        "remat.scan_layers=true",
    ]
    assert run(moved) == 0
    assert "harmless     ici_mesh.tensor: 2 -> 1" in capsys.readouterr().err
    for ours, theirs in zip(records(folder), records(whole), strict=True):
        assert ours["batch_hash"] == theirs["batch_hash"]
        assert ours["lr"] == theirs["lr"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


# The other backend -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def native_whole(
    command: Command, rows: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "native"
    argv = command(*overrides(folder, rows[1]), *ALONE)
    base = Path(compose_config(argv).model.pretrained_model or "")
    before = hash_folder(base)
    assert run_main(native, argv) == 0
    assert hash_folder(base) == before  # its weights began as the files, mapped
    return folder


def test_native_goes_on_exactly(
    native_whole: Path, command: Command, rows: tuple[Path, Path], tmp_path: Path,
    killed_after: Callable[[int], None],
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    argv = command(*overrides(folder, rows[1]), *ALONE)
    killed_after(5)
    with clocked(folder) as first, pytest.raises(Killed):
        run_main(native, argv)
    with clocked(folder) as second:
        assert run_main(native, argv) == 0
    assert [r["step"] for r in records(folder)] == list(range(1, STEPS + 1))
    assert_same_run(folder, native_whole)
    spent = json.loads((folder / "run.json").read_text())["goodput"]
    assert sum(spent["seconds"].values()) == pytest.approx(sum(first + second), rel=0.01)
    assert spent["starts"] == 2 and spent["seconds"]["other"] < 0.1 * sum(first + second)
    # Steps 4 and 5 were made again, and the second start-up would not have been needed.
    assert spent["seconds"]["lost"] > _start_up(folder)
    assert f"Goodput {spent['share']:.1%} of" in (folder / "report.md").read_text()
    assert "lost to restarts" in (folder / "report.html").read_text()


@contextmanager
def clocked(folder: Path) -> Iterator[list[float]]:
    """Give the seconds from here to the last line of times.jsonl, by another clock; the start of
    the process is here."""
    found, began = [], time.time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(goodput, "seconds_since_process_start", lambda: time.time() - began)
        yield found
    found.append((folder / goodput.TIMES).stat().st_mtime - began)


def _start_up(folder: Path) -> float:
    """The seconds of start-up of the last start."""
    return json.loads((folder / goodput.TIMES).read_text().splitlines()[-1])["seconds"]["start"]


def test_from_xla_to_native_and_back(
    whole: Path, native_whole: Path, run: Run, cut_short: Callable, capsys: Any,
    killed_after: Callable[[int], None],
) -> None:  # fmt: skip
    agree(native_whole, whole)
    folder, argv = cut_short(3)
    killed_after(7)
    with pytest.raises(Killed):
        run_main(native, [*argv, *ALONE])
    assert "step_00000003" in capsys.readouterr().err
    assert run(argv) == 0
    assert "step_00000006" in capsys.readouterr().err
    agree(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "adamw_8bit"])
def test_other_optimizers_go_on_from_xla_to_native(
    name: str, command: Command, rows: tuple[Path, Path], tmp_path: Path, run: Run,
    cut_short: Callable, killed_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:  # fmt: skip
    """To rounding, since XLA made the first gradients; test_process_resume.py has exact resumes."""
    for key in ("SMALLEST", "SMALLEST_BLOCK"):  # 8-bit state for a model of this size too
        monkeypatch.setattr(adamw_8bit, key, 1)
    chosen = (f"task.optimizer.name={name}", "ici_mesh.tensor=1", "ici_mesh.fsdp=4")
    straight = tmp_path / "straight"
    assert run(command(*overrides(straight, rows[1]), *chosen)) == 0
    folder, argv = cut_short(3, *chosen)
    killed_after(7)
    with pytest.raises(Killed):
        run_main(native, [*argv, "ici_mesh.fsdp=1"])
    assert "step_00000003" in capsys.readouterr().err
    assert run_main(native, [*argv, "ici_mesh.fsdp=1"]) == 0
    assert "step_00000006" in capsys.readouterr().err
    for ours, theirs in zip(records(folder), records(straight), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3 if "8bit" in name else 1e-5)


@pytest.mark.slow
def test_several_processes_write_one_checkpoint_and_any_number_goes_on(
    whole: Path, command: Command, rows: tuple[Path, Path], tmp_path: Path
) -> None:
    """Four processes, FSDP x tensor; then two, FSDP; then one."""
    folder = tmp_path / "run"
    allowed = "resume.allow_changes=[task.max_steps]"
    argv = [*command(*overrides(folder, rows[1])), allowed, "task.lr_scheduler.name=constant"]
    argv = [each for each in argv if not each.startswith("ici_mesh")]
    code, said = torchrun(4, [*argv, "ici_mesh.fsdp=2", "ici_mesh.tensor=2", "task.max_steps=4"])
    assert code == 0, said[-9000:]
    first = folder / "checkpoints/step_00000004"
    assert len(list(first.glob("*.distcp"))) == 4
    shutil.rmtree(folder / "export")
    code, said = torchrun(2, [*argv, "ici_mesh.fsdp=2", "task.max_steps=8"])
    assert code == 0 and "resuming from" in said and "step_00000004" in said, said[-3000:]
    shutil.rmtree(folder / "export")
    assert run_main(native, argv) == 0
    straight = tmp_path / "straight"
    assert run_main(native, [*argv, f"run_name={straight.name}"]) == 0
    agree(folder, straight)


# The checkpoint that a run resumes from -----------------------------------------------------------


def test_a_damaged_checkpoint_is_skipped(
    whole: Path, run: Run, cut_short: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, argv = cut_short(7)
    shard = folder / "checkpoints/step_00000006/__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert run(argv) == 0
    said = capsys.readouterr().err
    assert "checkpoint step_00000006 is skipped" in said and "__0_0.distcp is damaged" in said
    assert "resuming from" in said and "step_00000003" in said
    assert_same_run(folder, whole)
    assert (folder / "checkpoints/set_aside_1_step_00000006").is_dir()


def test_a_step_can_be_named(
    whole: Path, run: Run, cut_short: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, argv = cut_short(7)
    assert run([*argv, "resume=4"]) == 2
    assert "has no checkpoint of step 4. It has 3, 6." in capsys.readouterr().err
    assert run([*argv, "resume=3"]) == 0
    assert_same_run(folder, whole)


def test_never_refuses_and_a_path_begins_another_run(
    whole: Path, run: Run, command: Command, rows: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    assert run(command(*overrides(whole, rows[1]), "resume=never")) == 2
    assert "already holds another run" in capsys.readouterr().err
    other = tmp_path / "other"
    source = whole / "checkpoints/step_00000009"
    assert run(command(*overrides(other, rows[1]), f"resume={source}")) == 0
    assert records(other) == records(whole)[9:]
    nowhere = tmp_path / "third"
    assert run(command(*overrides(nowhere, rows[1]), f"resume={tmp_path}/no")) == 2
    assert "there is no checkpoint with a manifest.json" in capsys.readouterr().err
    assert not nowhere.exists()


def test_a_kill_before_the_first_checkpoint_begins_again(
    whole: Path, run: Run, cut_short: Callable
) -> None:
    folder, argv = cut_short(2)
    assert run(argv) == 0
    assert_same_run(folder, whole)
    kept = (folder / "metrics.before_1.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in kept] == ["eval", "train", "train"]


def test_changes_are_refused_or_allowed(
    run: Run, cut_short: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, argv = cut_short(3)
    before = sorted(p.name for p in folder.rglob("*"))
    assert run([*argv, "task.max_steps=13"]) == 2
    assert "questionable task.max_steps: 12 -> 13" in capsys.readouterr().err
    assert run([*argv, "seed=1"]) == 2
    assert "refused      seed: 42 -> 1" in capsys.readouterr().err
    assert run([*argv, "dataset.compute_loss_on=all"]) == 2
    assert "refused      data: " in capsys.readouterr().err
    assert sorted(p.name for p in folder.rglob("*")) == sorted([*before])
    allowed = ["task.max_steps=4", "resume.allow_changes=[task.max_steps]"]
    assert run([*argv, *allowed]) == 0
    assert [r["step"] for r in records(folder)] == [1, 2, 3, 4]


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`torchprime resume-check`: the exit code, and what it printed."""

    def run(*argv: object) -> tuple[int, str]:
        code = resume_check_main([str(each) for each in argv])
        return code, "".join(capsys.readouterr())

    return run


def test_resume_check_says_it_beforehand(whole: Path, tmp_path: Path, check: Callable) -> None:
    code, said = check(whole)
    assert code == 0 and "step_00000012: step 12, written by torch_xla" in said
    assert "the run is complete: nothing would be done" in said
    code, said = check(whole, "ici_mesh.tensor=1", "remat.policy=full")
    assert code == 0 and "harmless     remat.policy: none -> full" in said
    changed = ["task.optimizer.learning_rate=0.5", "dataset.compute_loss_on=all"]
    code, said = check(whole, *changed)
    assert code == 1 and "questionable task.optimizer.learning_rate: 0.01 -> 0.5" in said
    assert "refused      data: " in said
    assert "resume.allow_changes=[task.optimizer.learning_rate" in said
    assert check(whole, changed[0], "resume.allow_changes=[task.optimizer]")[0] == 0
    code, said = check(tmp_path)
    assert code == 2 and "holds no config.yaml" in said
    code, said = check(whole, "nonsense=1")
    assert code == 2 and "nonsense" in said


def test_resume_check_says_what_is_left(whole: Path, tmp_path: Path, check: Callable) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    longer = ["task.max_steps=20", "resume.allow_changes=[task.max_steps]"]
    assert "would resume from there, to step 20" in check(folder, *longer)[1]
    code, said = check(folder, "resume=6")
    assert code == 0 and "step_00000006" in said and "to step 12" in said
    shutil.rmtree(folder / "export")
    assert f"only the export to {folder}/export would be written" in check(folder)[1]
    (folder / "checkpoints" / "step_00000012" / "__0_0.distcp").write_bytes(b"")
    code, said = check(folder)
    assert code == 0 and "step_00000012 is skipped" in said and "to step 12" in said
    assert "step_00000009: step 9" in said


def test_resume_check_takes_options_of_groups(
    whole: Path, rows: tuple[Path, Path], check: Callable
) -> None:
    code, said = check(whole, "mesh=data2_fsdp2", "remat=full")
    assert code == 0 and "harmless     ici_mesh.data: 1 -> 2" in said
    assert "harmless     ici_mesh.tensor: 2 -> 1" in said and "remat.policy: none -> full" in said
    code, said = check(whole, "eval=none")
    assert code == 1 and "questionable eval: " in said
    code, said = check(whole, "dataset=file", f"dataset.file_dataset_path={rows[0]}")
    assert code == 0 and " dataset." not in said
    code, said = check(whole, "dataset=gsm8k")  # its source takes the place of the file
    assert code == 2 and "dataset.hf_dataset_name=openai/gsm8k" in said
    # As training composes it: what the named config says counts.
    code, said = check(whole, "-cn", "quickstart", "mesh=single")
    assert code == 1 and "questionable task.max_steps: 12 -> 150" in said


def test_resume_check_does_not_count_what_only_the_last_start_allowed(
    whole: Path, tmp_path: Path, check: Callable
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run"))
    path = folder / "config.yaml"
    kept = yaml.safe_load(path.read_text())
    kept["resume"] = {"source": "9", "allow_changes": ["task"]}
    kept["dataset"]["response_marker"] = None
    path.write_text(yaml.safe_dump(kept))
    code, said = check(folder, "task.max_steps=13")
    assert code == 1 and "note: the last start had resume.allow_changes=['task']" in said
    assert "step_00000012: step 12" in said
    code, said = check(folder, "task.max_steps=13", "resume.allow_changes=[task]")
    assert code == 0 and "note" not in said


# When checkpoints are written ---------------------------------------------------------------------


def test_a_signal_saves_and_stops(
    whole: Path, run: Run, command: Command, rows: tuple[Path, Path], tmp_path: Path, capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    argv = command(*overrides(folder, rows[1]))
    original = CheckpointHook.before_step

    def signalled(self: CheckpointHook, step: int) -> None:
        if step == 4:
            monkeypatch.setattr(CheckpointHook, "before_step", original)
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(CheckpointHook, "before_step", signalled)
    assert run(argv) == 75
    assert signal.getsignal(signal.SIGTERM) == before
    assert "stopped: SIGTERM after step 5" in capsys.readouterr().err
    assert len(records(folder)) == 5
    assert run(argv) == 0
    assert "step_00000005" in capsys.readouterr().err
    assert_same_run(folder, whole)


def test_a_file_asks_for_a_checkpoint(
    run: Run, command: Command, rows: tuple[Path, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    original = CheckpointHook.before_step

    def touch(self: CheckpointHook, step: int) -> None:
        if step == 1:
            (folder / NOW_FILE).touch()

    monkeypatch.setattr(CheckpointHook, "before_step", touch)
    argv = command(
        *overrides(folder, rows[1]), "task.max_steps=4", "checkpoint.every_steps=null",
        "checkpoint.every_minutes=600", "checkpoint.asynchronous=false",
    )  # fmt: skip
    assert run(argv) == 0
    monkeypatch.setattr(CheckpointHook, "before_step", original)
    written = records(folder, "checkpoint")
    assert [r["step"] for r in written] == [2, 4]
    assert all(r["stall_seconds"] == r["write_seconds"] and r["bytes"] > 1e5 for r in written)
    assert not (folder / NOW_FILE).exists()
    assert Catalog(open_storage(folder / "checkpoints")).pointed("latest") == "step_00000004"


def test_what_is_kept(run: Run, command: Command, rows: tuple[Path, Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    kept = ("checkpoint.keep_last=1", "checkpoint.keep_every=4", "checkpoint.every_steps=1")
    argv = command(*overrides(folder, rows[1]), *kept, "task.max_steps=6", "eval.every_steps=2")
    assert run([*argv, "task.optimizer.learning_rate=3.0"]) == 0
    losses = {r["step"]: r["eval_loss"] for r in records(folder, "eval") if r["step"]}
    best = min(losses, key=lambda step: losses[step])
    catalog = Catalog(open_storage(folder / "checkpoints"))
    assert catalog.steps() == sorted({best, 4, 6})
    assert catalog.pointed("best") == catalog.name_of(best)
    assert catalog.pointed("latest") == catalog.name_of(6)


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run_at_once(
    run: Run, command: Command, rows: tuple[Path, Path], tmp_path: Path, capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = tmp_path / "run"

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving, "write_shards", full)
    assert run(command(*overrides(folder, rows[1]), "task.max_steps=4")) == 2
    said = capsys.readouterr().err
    assert "checkpoint of step 3 NOT written: " in said and "no space" in said
    assert "error: the last checkpoint could not be written" in said
    assert [r["step"] for r in records(folder)] == [1, 2, 3, 4]
    assert SafetensorsReader(folder / "export").names()
    assert Catalog(open_storage(folder / "checkpoints")).steps() == []

    stopped = tmp_path / "stopped"
    plain = CheckpointHook.before_step
    asked = lambda self, step: step or os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    monkeypatch.setattr(CheckpointHook, "before_step", asked)
    assert run(command(*overrides(stopped, rows[1]), "task.max_steps=4")) == 2
    monkeypatch.setattr(CheckpointHook, "before_step", plain)
    said = capsys.readouterr().err
    assert "error: the last checkpoint could not be written" in said
    assert "everything is saved" not in said


def test_a_url_will_do(
    whole: Path, run: Run, command: Command, rows: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    place = "checkpoint.folder=memory://bucket/checkpoints"
    argv = command(*overrides(folder, rows[1]), place)
    allowed = "resume.allow_changes=[task.max_steps,task.lr_scheduler]"
    assert run([*argv, "task.max_steps=6"]) == 0
    catalog = Catalog(open_storage("memory://bucket/checkpoints/run"))
    assert catalog.steps() == [3, 6]
    shutil.rmtree(folder / "export")
    assert run([*argv, allowed]) == 0
    assert [r["batch_hash"] for r in records(folder)] == [r["batch_hash"] for r in records(whole)]
    assert catalog.steps() == [3, 6, 9, 12]
