"""The export at the end: its target is tried at the start; if it fails all the same, the weights
are kept, and the message has the command that exports them."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from read_only import make_read_only

from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.url_storage import UrlStorage
from torchprime.cli.main import main
from torchprime.errors import CheckpointError
from torchprime.metrics.record import StepRecord
from torchprime.training.hooks.metrics import MetricsHook

Printed = pytest.CaptureFixture[str]
Run = Callable[[list[str]], int]
Argv = Callable[..., list[str]]


def contents(folder: Path) -> dict[str, bytes]:
    """All but the certificate, which says where the logits came from."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    assert files.pop("certificate.json")
    return files


@pytest.fixture
def argv(command: Callable[..., list[str]], tmp_path: Path) -> Argv:
    """A run without checkpoints that exports."""

    def make(export: object, *more: str) -> list[str]:
        place = [f"output_dir={tmp_path}", "run_name=run", f"task.export_checkpoint_path={export}"]
        return command(*place, "logging_steps=2", "isolation_probe=false", *more)

    return make


@pytest.fixture(scope="module")
def undisturbed(command, run: Run, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert run(command(f"output_dir={out}", "run_name=run", "task.export_checkpoint_path=export",
                       "logging_steps=2", "isolation_probe=false")) == 0  # fmt: skip
    return out / "run" / "export"


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Lets something happen once, in the middle of the run."""

    def arm(happen: Callable[[], object]) -> None:
        plain, pending = MetricsHook.on_record, [happen]

        def on_record(self: MetricsHook, record: StepRecord) -> None:
            plain(self, record)
            if pending:
                pending.pop()()

        monkeypatch.setattr(MetricsHook, "on_record", on_record)

    return arm


def error_of(capsys: Printed) -> str:
    printed = capsys.readouterr().err
    assert "Traceback" not in printed and printed.count("error: ") == 1, printed
    return printed.split("error: ")[1].strip()


def command_in(message: str) -> list[str]:
    """Return the arguments of the command that the message names."""
    program, *rest = shlex.split(message.rsplit(": ", 1)[1])
    assert program == "torchprime"
    return rest


def test_a_disk_that_fills_up_does_not_cost_the_weights(
    run: Run, argv: Argv, undisturbed: Path, meanwhile, small_disk: Path, tmp_path: Path,
    capsys: Printed, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("USE_TORCH_XLA", "1")  # put back on leaving, whatever main makes of it
    ballast = small_disk / "ballast"
    meanwhile(lambda: ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 20_000)))
    assert run(argv(small_disk / "export")) == 2
    message = error_of(capsys)
    assert "has no room" in message and not (small_disk / "export").exists()
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000004"
    assert f"The weights are in {checkpoint}. To export them: torchprime export" in message
    ballast.unlink()
    assert main(command_in(message)) == 0
    assert contents(small_disk / "export") == contents(undisturbed)
    assert run(argv(small_disk / "export")) == 0
    assert "complete; there is nothing left to do" in capsys.readouterr().err


def test_a_place_that_becomes_read_only_has_the_last_checkpoint(
    run: Run, argv: Argv, undisturbed: Path, meanwhile, small_disk: Path, tmp_path: Path,
    capsys: Printed,
) -> None:  # fmt: skip
    meanwhile(lambda: make_read_only(small_disk))
    given = argv(small_disk / "export", "checkpoint.every_steps=4")
    assert run(given) == 2
    message = error_of(capsys)
    assert "Read-only" in message and "right to write there" in message
    assert command_in(message) == [
        "export", f"{tmp_path}/run/checkpoints/step_00000004", "--out", f"{small_disk}/export",
    ]  # fmt: skip
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert run(given) == 0, "the same command resumes from there, too"
    assert contents(small_disk / "export") == contents(undisturbed)


def test_an_export_to_a_url(
    run: Run, argv: Argv, undisturbed: Path, tmp_path: Path, capsys: Printed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("USE_TORCH_XLA", "1")
    url = f"memory://final/{tmp_path.name}/out"

    def cut(*_: object) -> None:
        raise CheckpointError("the network is gone")

    with monkeypatch.context() as broken:
        broken.setattr(UrlStorage, "send", cut)
        assert run(argv(url)) == 2
    message = error_of(capsys)
    kept = tmp_path / "run" / "export_to_send"
    assert message.startswith("the network is gone\nThe export is whole, in ")
    assert command_in(message) == ["export", str(kept), "--out", url]
    assert not (tmp_path / "run" / "checkpoints").exists(), "the weights are in the export"
    assert main(command_in(message)) == 0

    shutil.rmtree(tmp_path / "run")
    other = f"{url}-again"
    assert run(argv(other, "checkpoint.every_steps=4", "task.sample_prompts=0")) == 0
    assert f"exported to {other}: " in capsys.readouterr().err
    assert not kept.exists()
    for place in (url, other):
        storage = open_storage(place)
        for name, content in contents(undisturbed).items():
            assert storage.read_bytes(name) == content
        assert storage.exists("certificate.json") and not storage.exists(".incomplete")
    assert run(argv(other, "checkpoint.every_steps=4", "task.sample_prompts=0")) == 0
    assert "nothing left to do" in capsys.readouterr().err


def test_what_would_fail_at_the_end_is_refused_at_the_start(
    run: Run, argv: Argv, small_disk: Path, tmp_path: Path, capsys: Printed
) -> None:
    (tmp_path / "file").write_text("")
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(small_disk).free - 1_020_000))

    def refused(export: object, *more: str) -> str:
        assert run(argv(export, *more)) == 2
        assert not (tmp_path / "run").exists(), "a run's folder was made"
        return error_of(capsys)

    for export in (".", "..", "checkpoints", "tensorboard/x", "metrics.jsonl", tmp_path):
        message = refused(export)
        assert message.startswith("task.export_checkpoint_path: the export would go to"), message
    assert "is not a folder" in refused(tmp_path / "file" / "out")
    assert "the export 1." in refused(small_disk / "out")
    ballast.write_bytes(bytes(ballast.stat().st_size - 500_000))
    both = refused("out", f"checkpoint.folder={small_disk}", "checkpoint.every_steps=1",
                   "dataset.block_size=64", f"output_dir={small_disk}")  # fmt: skip
    assert "a checkpoint 0." in both and "the export 1." in both
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,nr_inodes=9", str(small_disk)], check=True)
    assert "inodes left" in refused(small_disk / "out")
    subprocess.run(["mount", "-o", "remount,ro,nr_inodes=0", str(small_disk)], check=True)
    assert "Read-only" in refused(small_disk / "out")
    with pytest.MonkeyPatch.context() as store:
        memory = open_storage("memory://x")
        assert isinstance(memory, UrlStorage)
        store.setattr(memory._fs.__class__, "pipe_file", no_credentials)
        assert "can't be used" in refused("memory://x/y")
        assert "cannot hold checkpoints" in refused("out", "checkpoint.folder=memory://x/y",
                                                    "checkpoint.every_steps=1")  # fmt: skip
    assert not list(small_disk.iterdir())


def no_credentials(*_: object, **__: object) -> None:
    raise PermissionError("no credentials")
