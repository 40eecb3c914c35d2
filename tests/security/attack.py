"""One attack: what a stranger lays down, what a user then runs, and what must not have happened.

Each group of attacks is a module with a list ATTACKS; test_attacks.py runs all of them in the same
way. A new row needs a name, `lay` (makes the hostile input), `call` (a command, or a function of
ours; its exit code and what it said) and `says` (a pattern of the one message).

Around every attack lies bait: files, a folder and a pipe in `Ground.outside`. After the call all of
it must be as it was, whatever the exit code.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from torchprime.cli.main import main as torchprime_main
from torchprime.config.entry import run_main
from torchprime.errors import UserError
from torchprime.torch_native.train import main as native_main

# Control characters but the ends of lines and progress bars, and marks of direction.
RAW = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
HANGS_AFTER = 120  # s; those that end take a few
Said = tuple[int, str]  # an exit code, and all that was printed


@dataclass(frozen=True)
class Samples:
    """The files that attacks begin with: made once, copied for each.

    Attributes:
        run: with checkpoints of steps 1 and 2, held-out rows and an export.
        prepared: both sides of a split of the rows, and their leaks, as `SPLIT` asks for them.
    """

    model: Path
    rows: Path
    run: Path
    prepared: Path


@dataclass
class Ground:
    """The folders of one attack, and the calls a user makes in them.

    Attributes:
        here: the user's folder; the working directory of the call.
        outside: what nobody may touch: `file`, `folder/file`, `pipe`.
    """

    samples: Samples
    here: Path
    outside: Path
    capsys: pytest.CaptureFixture[str]
    monkeypatch: pytest.MonkeyPatch
    kept: dict[str, Any] = field(default_factory=dict)  # what `lay` leaves for `then`

    def model(self) -> Path:
        """A copy of the model, to be spoilt."""
        return self._copy(self.samples.model, "model")

    def run(self) -> Path:
        """A copy of the run, in which it would go on: outputs/run."""
        return self._copy(self.samples.run, "outputs/run")

    def checkpoint(self) -> Path:
        """The last checkpoint of a copy of the run."""
        return self.run() / "checkpoints" / "step_00000002"

    def prepared(self) -> Path:
        """A copy of the prepared rows, which `prepare(*SPLIT)` would find."""
        return self._copy(self.samples.prepared, "prepared")

    def _copy(self, source: Path, name: str) -> Path:
        there = self.here / name
        if not there.exists():
            shutil.copytree(source, there, symlinks=True)
        return there

    # Calls ----------------------------------------------------------------------------------------

    def train(self, *overrides: str) -> Said:
        """The training command on one CPU; the model is the copy if there is one."""
        return self._said(lambda: run_main(native_main, self._argv(overrides)))

    def prepare(self, *overrides: str) -> Said:
        """`torchprime prepare` with what `train` has."""
        return self.torchprime("prepare", *self._argv(overrides))

    def inspect(self, *overrides: str) -> Said:
        """`torchprime inspect` with what `train` has."""
        return self.torchprime("inspect", *self._argv(overrides))

    def _argv(self, overrides: Sequence[str]) -> list[str]:
        model = self.here / "model"
        given = {
            "model.pretrained_model": model if model.exists() else self.samples.model,
            "dataset": "file",
            "dataset.file_dataset_path": self.samples.rows,
            "dataset.prepared_dir": self.here / "prepared",
            **RUN,
            **dict(each.split("=", 1) for each in overrides),
        }
        return [f"{key}={value}" for key, value in given.items()]

    def torchprime(self, *argv: object) -> Said:
        return self._said(lambda: torchprime_main([str(each) for each in argv]))

    def calls(self, function: Callable[[], object]) -> Said:
        """A function of ours; a UserError is what a command would make of it."""

        def framed() -> int:
            try:
                function()
            except UserError as error:
                print(f"error: {error}")
                return error.exit_code
            return 0

        return self._said(framed)

    def _said(self, call: Callable[[], int]) -> Said:
        self.capsys.readouterr()
        code = call()
        return code, "".join(self.capsys.readouterr())


# The shortest run that writes everything; an attack may override.
RUN: Mapping[str, object] = {
    "dataset.block_size": 64,
    "dataset.leak_check": "off",
    "task.global_batch_size": 2,
    "task.max_steps": 2,
    "task.loss_chunks": 1,
    "task.optimizer.learning_rate": 0.01,
    "task.export_checkpoint_path": "null",
    "checkpoint.every_steps": 1,
    "checkpoint.asynchronous": "false",
    "checkpoint.keep_last": "null",
    "isolation_probe": "false",
    "logging_steps": 1,
    "output_dir": "outputs",
    "run_name": "run",
}


SPLIT = ("dataset.leak_check=warn", "dataset.eval_fraction=0.5")


@dataclass(frozen=True)
class Attack:
    """A row of the table.

    Attributes:
        says: a pattern of the message, of which there is one line starting with `error: ` unless
            the exit code is 0.
        then: what else must hold afterwards.
        needs_root: other users' files cannot be made otherwise.
    """

    name: str
    lay: Callable[[Ground], object]
    call: Callable[[Ground], Said]
    says: str
    code: int = 2
    then: Callable[[Ground], object] = lambda ground: None
    slow: bool = False
    needs_root: bool = False


def parameters(attacks: list[Attack]) -> list[Any]:
    """For pytest: the rows, with their names and marks."""
    names = [attack.name for attack in attacks]
    assert len(set(names)) == len(names), "two attacks have the same name"
    return [
        pytest.param(attack, id=attack.name, marks=[pytest.mark.slow] if attack.slow else [])
        for attack in attacks
    ]


def carry_out(attack: Attack, ground: Ground) -> None:
    """Run a row and see that it did nothing but say so."""
    if attack.needs_root and os.geteuid() != 0:
        pytest.skip("only root can make files of other users")
    attack.lay(ground)
    before = snapshot(ground.outside)
    signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(HANGS_AFTER)
    try:
        code, said = attack.call(ground)
    finally:
        signal.alarm(0)
    assert snapshot(ground.outside) == before, "something outside was touched"
    assert "Traceback" not in said, said
    assert not RAW.search(said), f"raw on the terminal: {said!r}"
    assert code == attack.code, said
    assert re.search(attack.says, said, re.DOTALL), said
    if code:
        assert len(re.findall("^error: |: error: ", said, re.MULTILINE)) == 1, said
    attack.then(ground)


def _hangs(*_: object) -> None:
    raise AssertionError(f"the command did not end within {HANGS_AFTER} s")


def snapshot(folder: Path) -> dict[str, tuple[object, ...]]:
    """Kind, mode, content and time of everything in a folder."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        facts = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(facts.st_mode) else None
        found[str(path.relative_to(folder))] = (facts.st_mode, content, facts.st_mtime_ns)
    return found


def lay_bait(folder: Path) -> Path:
    """Make the files that no attack may touch."""
    (folder / "folder").mkdir(parents=True)
    (folder / "file").write_text("precious")
    (folder / "folder" / "file").write_text("precious, too")
    os.mkfifo(folder / "pipe")
    return folder
