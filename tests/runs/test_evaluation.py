"""Held-out measurements decide the best step, early stopping and the exported weights.

A grader of the test's own gives each evaluation the score that the test wants, whatever the model
answers; the real command runs around it.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import Killed

from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.checkpoint.proof.certificate import read_certificate
from torchprime.checkpoint.run.catalog import BEST, LATEST, Catalog
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.reader import CheckpointReader
from torchprime.config.entry import run_main
from torchprime.evaluation.heldout import HeldoutLoss
from torchprime.torch_native.train import main as native
from torchprime.training.hooks import evaluation
from torchprime.training.run import saver as saving

Run = Callable[[list[str]], int]
Command = Callable[..., list[str]]
ASKED = 3  # prompts at each evaluation
ANSWERS = (
    f"eval.generate.max_examples={ASKED}",
    "eval.generate.max_new_tokens=4",
    "eval.generate.batch_size=4",
)

SCRIPTED = '''
"""A grader that gives the n-th evaluation the n-th value."""

values = []
calls = 0


def grade(sample):
    global calls
    calls += 1
    return values[(calls - 1) // {asked}]


def broken(sample):
    raise ValueError("no idea")


def shy(sample):
    return None
'''


@pytest.fixture
def scripted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Lets a test say what each evaluation's score is, the base's first."""
    folder = tmp_path / "graders"
    folder.mkdir()
    name = f"scripted_{tmp_path.name.replace('-', '_')}"
    (folder / f"{name}.py").write_text(SCRIPTED.format(asked=ASKED))
    monkeypatch.syspath_prepend(str(folder))
    module = __import__(name)

    def script(*values: float) -> None:
        module.values, module.calls = list(values), 0

    script.path = f"{name}:grade"  # type: ignore[attr-defined]
    script.module = name  # type: ignore[attr-defined]
    return script


@pytest.fixture
def evaluated(
    command: Command, rows: tuple[Path, Path], tmp_path: Path, scripted: Any
) -> Callable[..., list[str]]:
    """A command that answers and grades every second of 8 steps."""

    def make(*more: str) -> list[str]:
        return command(
            f"output_dir={tmp_path}",
            "run_name=run",
            "task.max_steps=8",
            "logging_steps=1",
            "eval=file",
            f"eval.file_dataset_path={rows[1]}",
            "eval.every_steps=2",
            *ANSWERS,
            f"eval.graders=[{{name: right, kind: python, path: '{scripted.path}'}}]",
            "selection.ranking=[right desc, eval_loss asc]",
            "task.export_checkpoint_path=export",
            *more,
        )

    return make


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    reader = SafetensorsReader(folder)
    return {name: reader.get(name) for name in reader.names()}


def test_the_best_step_is_kept_and_exported(
    evaluated: Callable[..., list[str]], run: Run, scripted: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    scripted(0.0, 0.0, 1.0, 0.0, 0.0)  # step 4 of 8
    assert run(evaluated("export.which=best")) == 0
    folder = tmp_path / "run"
    catalog = Catalog(open_storage(folder / "checkpoints"))
    # Of its own accord the run writes the best so far (2, then 4) and the last.
    assert catalog.steps() == [4, 8]
    assert (catalog.pointed(BEST), catalog.pointed(LATEST)) == ("step_00000004", "step_00000008")
    with CheckpointReader(catalog.storage, "step_00000004") as reader:
        assert reader.manifest.scores["right"] == 1.0
        assert reader.manifest.best_metric == {"step": 4, "scores": reader.manifest.scores}
        exported = weights_of(folder / "export")
        assert all(torch.equal(reader.get(f"model.{n}"), w) for n, w in exported.items())
    certificate = read_certificate(folder / "export")
    assert certificate.metrics["right"] == 1.0 and "step_00000004" in certificate.origin
    said = capsys.readouterr().err
    assert "the best step is 4: exporting" in said
    table = [line for line in said.splitlines() if line.strip().startswith(("base", "right"))]
    assert table[0].split("  ")[-1] and "last (step 8)" in table[0] and "best (step 4)" in table[0]
    assert "right (n=3)" in table[1] and "100.0% (43.9 to 100.0)" in table[1]
    report = (folder / "report.md").read_text()
    assert "| base | last (step 8) | best (step 4) |" in report and "step_00000004" in report
    assert "3 now right" in report and "report.html" in said


def test_what_is_written_of_answers(
    evaluated: Callable[..., list[str]], run: Run, scripted: Any, tmp_path: Path,
) -> None:  # fmt: skip
    scripted(0.0, 1.0, 1.0)
    assert run(evaluated("task.max_steps=4", "task.export_checkpoint_path=null")) == 0
    folder = tmp_path / "run"
    assert [r["step"] for r in records(folder, "eval")] == [0, 2, 4]
    last = records(folder, "eval")[-1]
    assert last["scores"]["right"]["value"] == 1.0 and last["scores"]["right"]["count"] == ASKED
    assert 0 < last["share_of_run"] < 1 and last["generated_tokens"] > 0
    logged = [r["loss"] for r in records(folder, "train")]
    assert last["train_loss"] == pytest.approx(sum(logged[2:4]) / 2)
    files = sorted(path.name for path in (folder / "evaluations").iterdir())
    assert files == [f"step_{step:08d}.jsonl" for step in (0, 2, 4)]
    samples = [json.loads(line) for line in (folder / "evaluations" / files[-1]).open()]
    assert len(samples) == ASKED and samples[0]["grades"] == {"right": 1.0}
    keys = {"row_id", "prompt", "output", "reference", "stopped", "tokens", "grades"}
    assert set(samples[0]) == keys and samples[0]["prompt"].startswith("say ")
    # `last` is the default: nothing is kept that was not asked for.
    assert not (folder / "checkpoints").exists()


def test_nothing_passes_the_gates(
    evaluated: Callable[..., list[str]], run: Run, scripted: Any, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    scripted(0.0, 0.5, 0.5)
    argv = evaluated("task.max_steps=4", "export.which=best", "selection.gates=['right >= 0.9']")
    assert run(argv) == 0
    folder = tmp_path / "run"
    assert Catalog(open_storage(folder / "checkpoints")).pointed(BEST) is None
    marked = read_certificate(folder / "export").metrics["selection"]
    assert isinstance(marked, str)
    assert marked == "no step qualifies (the last one: not right >= 0.9); the last step"
    assert marked in (folder / "export" / "README.md").read_text()
    assert f"export.which=best: {marked} is exported instead" in capsys.readouterr().err


FORGETTING = "eval_loss[general] <= base + 0.25"


def test_a_run_that_forgets_cannot_be_the_best(
    evaluated: Callable[..., list[str]], scripted: Any, tmp_path: Path, rows: tuple[Path, Path],
    killed_after: Callable[[int], None], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Of two sources the second's loss rises: with the gate step 2 is best, without it step 8.
    The run is killed in between, and the resumed one still knows the base's loss."""
    general = [2.0, 2.25, 2.5, 2.75, 3.0]

    def measured(backend: Any, data: Any, batch_size: int) -> HeldoutLoss:
        assert data.source_names == ["own", "general"]
        loss = general.pop(0)
        return HeldoutLoss(1.0 + loss, {"own": 4.0 - loss, "general": loss})

    monkeypatch.setattr(evaluation, "heldout_loss", measured)
    sources = (
        f"{{name: own, file_dataset_path: {rows[1]}}}, "
        f"{{name: general, file_dataset_path: {rows[0]}, generate: false}}"
    )
    scripted(*[1.0] * 5)
    given = (
        *ALONE, "eval.file_dataset_path=null", f"eval.sources=[{sources}]",
        "dataset.leak_check=off", "selection.ranking=['eval_loss[own] asc']",
        "checkpoint.every_steps=1", "checkpoint.keep_last=9",
    )  # fmt: skip
    argv = evaluated(*given, f"selection.gates=['{FORGETTING}']")
    killed_after(5)
    with pytest.raises(Killed):
        run_main(native, argv)
    assert run_main(native, argv) == 0
    folder = tmp_path / "run"
    assert "step_00000002" in origin_of(folder)
    said = capsys.readouterr().err
    told = f"{FORGETTING} = 2.25"
    assert f"gate {told}: 1 of 4 steps pass, not 4, 6, 8" in said
    assert "eval_loss[own] 1.5000  eval_loss[general] 2.5000" in said
    report = (folder / "report.md").read_text()
    assert "1 of 4 | 4, 6, 8" in report
    page = (folder / "report.html").read_text()
    assert "<td>1 of 4</td><td>4, 6, 8</td>" in page and "held out, general" in page
    asked = [json.loads(line) for line in (folder / "evaluations" / "step_00000002.jsonl").open()]
    assert all(rows[1].name in each["row_id"] for each in asked)
    (folder / "export").rename(folder / "first")
    assert run_main(native, evaluated(*given)) == 0
    assert "after 8 updates" in origin_of(folder)


STOPPING = (
    "selection.early_stopping.metric=right",
    "selection.early_stopping.mode=max",
    "selection.early_stopping.patience=2",
)


@pytest.mark.parametrize("backend", ["xla", "native"])
def test_early_stopping_ends_the_run_whole(
    evaluated: Callable[..., list[str]], run: Run, scripted: Any, tmp_path: Path, backend: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """It stops after step 6, exports the best one's weights, and is then complete."""
    scripted(0.0, 1.0, 0.0, 0.0, 1.0)
    alone = ("ici_mesh.fsdp=1", "ici_mesh.tensor=1") if backend == "native" else ()
    argv = evaluated(*STOPPING, "export.which=best", *alone)
    start = run if backend == "xla" else lambda argv: run_main(native, argv)
    assert start(argv) == 0
    folder = tmp_path / "run"
    assert [r["step"] for r in records(folder, "train")] == [1, 2, 3, 4, 5, 6]
    said = capsys.readouterr().err
    assert "early stopping after step 6: right has not improved by more than 0 in 2" in said
    catalog = Catalog(open_storage(folder / "checkpoints"))
    assert (catalog.pointed(BEST), catalog.pointed(LATEST)) == ("step_00000002", "step_00000006")
    assert "step_00000002" in read_certificate(folder / "export").origin
    assert start(argv) == 0
    assert "complete; there is nothing left to do" in capsys.readouterr().err


def test_a_run_that_goes_on_decides_as_if_it_had_not_stopped(
    evaluated: Callable[..., list[str]], run: Run, scripted: Any, tmp_path: Path,
    killed_after: Callable[[int], None],
) -> None:  # fmt: skip
    """Killed after step 5: patience and the best so far are those of the records before."""
    scripted(0.0, 1.0, 0.0, 0.0, 1.0)
    argv = evaluated(*STOPPING, "export.which=best", "checkpoint.every_steps=1")
    killed_after(5)
    with pytest.raises(Killed):
        run(argv)
    assert run(argv) == 0
    folder = tmp_path / "run"
    assert [r["step"] for r in records(folder, "eval")] == [0, 2, 4, 6]
    assert "step_00000002" in read_certificate(folder / "export").origin


# Checkpoints that are not as a smooth run leaves them ---------------------------------------------

ALONE = ("ici_mesh.fsdp=1", "ici_mesh.tensor=1", "export.which=best", "checkpoint.keep_last=1",
         "checkpoint.asynchronous=false")  # fmt: skip


def origin_of(folder: Path) -> str:
    return read_certificate(folder / "export").origin


def test_a_best_step_that_could_not_be_written_is_none(
    evaluated: Callable[..., list[str]], scripted: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The disk is full at step 4, the best; later ones are compared with what there is."""
    original = saving.Saver._write_folder

    def full(self: saving.Saver, snapshot: Any, tensors: Any) -> int:
        if snapshot.step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, snapshot, tensors)

    monkeypatch.setattr(saving.Saver, "_write_folder", full)
    scripted(0.0, 0.5, 1.0, 0.7, 0.0)
    assert run_main(native, evaluated(*ALONE)) == 0
    assert "step_00000006" in origin_of(tmp_path / "run")
    assert "best (step 6)" in capsys.readouterr().err


@pytest.mark.slow
def test_going_back_forgets_what_came_behind(
    evaluated: Callable[..., list[str]], scripted: Any, tmp_path: Path
) -> None:
    scripted(0.0, 0.2, 0.5, 0.9, 0.1)
    assert run_main(native, evaluated(*ALONE, "checkpoint.keep_every=4")) == 0
    folder = tmp_path / "run"
    assert "step_00000006" in origin_of(folder)
    (folder / "export").rename(folder / "first")
    scripted(0.3, 0.1)  # of steps 6 and 8
    assert run_main(native, evaluated(*ALONE, "resume=4")) == 0
    assert "step_00000004" in origin_of(folder)
    assert Catalog(open_storage(folder / "checkpoints")).pointed(BEST) == "step_00000004"
    steps = [record["step"] for record in records(folder, "eval")]
    assert steps == [0, 2, 4, 6, 8]


def test_a_kill_before_the_pointer_loses_no_best(
    evaluated: Callable[..., list[str]], scripted: Any, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    original = saving.Saver._point_and_retain

    def killed(self: saving.Saver, name: str) -> None:
        if name.endswith("4"):
            monkeypatch.setattr(saving.Saver, "_point_and_retain", original)
            raise Killed
        original(self, name)

    monkeypatch.setattr(saving.Saver, "_point_and_retain", killed)
    scripted(0.0, 0.5, 1.0, 0.7, 0.0)
    argv = evaluated(*ALONE, "checkpoint.keep_best=0")
    with pytest.raises(Killed):
        run_main(native, argv)
    assert run_main(native, argv) == 0
    assert "step_00000004" in origin_of(tmp_path / "run")


@pytest.mark.slow
def test_another_rule_chooses_anew(
    evaluated: Callable[..., list[str]], scripted: Any, tmp_path: Path
) -> None:
    scripted(0.0, 0.2, 0.9, 0.5, 0.1)
    assert run_main(native, evaluated(*ALONE)) == 0
    folder = tmp_path / "run"
    assert "step_00000004" in origin_of(folder)
    (folder / "export").rename(folder / "first")
    stricter = "selection.gates=['right >= 0.95']"
    assert run_main(native, evaluated(*ALONE, stricter)) == 0
    selection = read_certificate(folder / "export").metrics["selection"]
    assert isinstance(selection, str) and "no step qualifies" in selection
    assert Catalog(open_storage(folder / "checkpoints")).pointed(BEST) is None


def test_records_that_are_gone_change_no_decision(
    evaluated: Callable[..., list[str]], scripted: Any, tmp_path: Path,
    killed_after: Callable[[int], None],
) -> None:  # fmt: skip
    """As on another machine, where only the checkpoints are: they have the history too."""
    scripted(0.0, 1.0, 0.0, 0.0, 1.0)
    argv = evaluated(*STOPPING, *ALONE, "checkpoint.every_steps=1")
    killed_after(5)
    with pytest.raises(Killed):
        run_main(native, argv)
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert run_main(native, argv) == 0
    assert [r["step"] for r in records(tmp_path / "run", "train")] == [6]
    assert [r["step"] for r in records(tmp_path / "run", "eval")] == [6]
    assert "step_00000002" in origin_of(tmp_path / "run")


@pytest.mark.slow
def test_processes_answer_while_a_thread_writes(
    evaluated: Callable[..., list[str]], scripted: Any, tmp_path: Path, repo_dir: Path
) -> None:
    """Checkpoint and evaluation at every step: what both exchange never gets mixed up."""
    argv = evaluated(
        "ici_mesh.fsdp=2", "ici_mesh.tensor=1", "export.which=best", "checkpoint.every_steps=1",
        "eval.every_steps=1", "eval.graders=[{name: right, kind: non_empty}]",
    )  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ended = subprocess.run(
        [*launch, "-m", "torchprime.torch_native.train", *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", "USE_TORCH_XLA": "0"},
        capture_output=True, text=True, cwd=repo_dir,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert [r["step"] for r in records(tmp_path / "run", "eval")] == list(range(9))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["selection.gates=['right > nan']"], "selection.gates[0]: given 'right > nan'"),
        (["export.which=best", "eval.every_steps=null"], "eval.every_steps: given null"),
        (["eval.graders=[{name: seconds, kind: json}]"], "eval.graders[0].name: given 'seconds'"),
        (["selection.gates=['rihgt > 0.5']"], "selection.gates[0]: given 'rihgt'"),
        (["selection.early_stopping.metric=f1"], "selection.early_stopping.metric: given 'f1'"),
        (["eval.graders=[{name: a, kind: regex, pattern: '('}]"], "eval.graders[0].pattern"),
        (["eval.graders=[{name: a, kind: rouge}]"], "eval.graders[0].kind: given 'rouge'"),
        (["eval.graders=[{kind: json}]"], "eval.graders[0].name: given null"),
        (["eval.generate.max_examples=0"], "eval.generate.max_examples: given 0"),
        (["eval.generate.every_steps=3"], "eval.generate.every_steps: given 3"),
        (
            ["eval.file_dataset_path=null", "eval.every_steps=null"],
            "eval.generate.max_examples: given 3",
        ),
    ],
)
def test_mistakes_are_told_before_anything_is_read(
    evaluated: Callable[..., list[str]], run: Run, tmp_path: Path, given: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert run(evaluated("selection.ranking=[eval_loss asc]", *given)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_grader_that_breaks_names_itself_and_the_row(
    evaluated: Callable[..., list[str]], run: Run, scripted: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for function, message in (("broken", "no idea"), ("shy", "applies to none of the 3")):
        grader = (
            f"eval.graders=[{{name: right, kind: python, path: '{scripted.module}:{function}'}}]"
        )
        assert run(evaluated(grader, f"run_name={function}")) == 2
        assert message in capsys.readouterr().err


def test_samples_that_cannot_be_written_are_a_message(
    evaluated: Callable[..., list[str]], scripted: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(evaluation, "write_text", full)
    scripted(*[0.0] * 5)
    assert run_main(native, evaluated(*ALONE)) != 0
    said = capsys.readouterr().err
    assert "cannot be written: [Errno 28]" in said and "Traceback" not in said


def test_rows_that_the_preparation_left_out_are_not_asked(
    evaluated: Callable[..., list[str]], scripted: Any, tmp_path: Path
) -> None:
    path = tmp_path / "some.jsonl"
    lines = [{"prompt": "x" * n, "completion": "y"} for n in (130, 5, 6, 7)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    scripted(*[0.0] * 3)
    argv = evaluated(
        *ALONE, "task.max_steps=4", f"eval.file_dataset_path={path}",
        "dataset.max_rejected_fraction=0.5",
    )  # fmt: skip
    assert run_main(native, argv) == 0
    samples = (tmp_path / "run/evaluations/step_00000000.jsonl").read_text().splitlines()
    assert [len(json.loads(line)["prompt"]) for line in samples] == [5, 6, 7]


def test_a_prompt_that_leaves_no_room_is_named(
    evaluated: Callable[..., list[str]], run: Run, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "x" * 130, "completion": "y"}) + "\n")
    argv = evaluated(
        f"eval.file_dataset_path={path}", "dataset.max_rejected_fraction=1.0",
        "dataset.truncation=left",
    )  # fmt: skip
    assert run(argv) == 2
    said = capsys.readouterr().err
    assert "the prompt of held-out row" in said and "128 positions" in said


def test_overfitting_is_told_with_its_numbers(
    evaluated: Callable[..., list[str]], run: Run, scripted: Any, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The training loss of these rows falls; the held-out loss is made to rise from step 2 on."""
    losses = iter([9.0, 1.0, 1.1, 1.2, 1.0])
    monkeypatch.setattr(evaluation, "heldout_loss", lambda *_: HeldoutLoss(next(losses), None))
    scripted(*[0.0] * 5)
    assert run(evaluated("task.export_checkpoint_path=null")) == 0
    said = capsys.readouterr().err.splitlines()
    told = [line for line in said if line.startswith("overfitting")]
    assert len(told) == 1
    assert "from step 2 to 6 the held-out loss rose from 1.0000 over 1.1000 to 1.2000" in told[0]


def test_losses_by_source_are_those_of_the_sources_alone(
    command: Command, run: Run, tmp_path: Path, rows: tuple[Path, Path]
) -> None:
    """A split mixture's total loss lies between the losses of its sources."""
    parts = ",".join(
        f"{{name: {name}, file_dataset_path: {path}}}"
        for name, path in zip("ab", rows, strict=True)
    )
    argv = command(
        "dataset.file_dataset_path=null", f"dataset.mixture=[{parts}]",
        "dataset.eval_fraction=0.4", "dataset.leak_check=off", f"output_dir={tmp_path}",
        "run_name=mixed", "task.max_steps=1", "task.export_checkpoint_path=null",
    )  # fmt: skip
    assert run(argv) == 0
    for record in records(tmp_path / "mixed", "eval"):
        losses = record["source_losses"]
        assert set(losses) == {"a", "b"}
        low, high = sorted(losses.values())
        assert low < record["eval_loss"] < high
