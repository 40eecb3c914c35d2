"""Runs in two processes: exact after a resume with every optimizer, and as in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import interrupted
import pytest
import torch
from forks import ForkServer
from interrupted import ALONE, STEPS, assert_same_run, poison, records

from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.checkpoint.run.catalog import Catalog
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.reader import CheckpointReader
from torchprime.config.entry import run_main
from torchprime.torch_native.train import main
from torchprime.training.optim import adamw_8bit

JOB = Path(__file__).parent / "resume_job.py"
POISONED = (7, 8)
LR = 0.01  # of the run
EMA = "task.ema_decay=0.6"
GROUPS = (
    "task.optimizer.groups=[{pattern: model.embed_tokens, frozen: true}, "
    "{pattern: model.layers.0, lr_factor: 0.5}, {pattern: lm_head, weight_decay: 0.3}]"
)
CASES = {
    "adamw": (
        *(EMA, "task.spike.window=4", "task.spike.deviations=5", "task.spike.action=skip"),
        "logging_steps=4",
    ),
    "muon": (),
    "lion": (),
    "sgd": (),
    "adafactor": (),
    "adamw_8bit": (EMA, GROUPS),
}


SLOW = ("lion", "muon", "sgd", "adafactor")
CHECKPOINT = Catalog.name_of(STEPS)


@pytest.fixture(scope="module")
def argv_of(command: Callable[..., list[str]], rows: tuple[Path, Path]) -> Callable[..., list[str]]:
    def make(name: str, folder: Path, *more: str) -> list[str]:
        chosen = (f"task.optimizer.name={name}", *CASES[name])
        return command(*interrupted.overrides(folder, rows[1]), *chosen, *more)

    return make


@pytest.fixture(scope="module")
def in_two(
    argv_of: Callable[..., list[str]], fork_server: ForkServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:  # fmt: skip
    """The folder of a case's two runs, `whole` and `cut`, in two processes; each case runs once."""

    @cache
    def get(name: str) -> Path:
        out = tmp_path_factory.mktemp(name)
        mesh = ("ici_mesh.fsdp=2", "ici_mesh.tensor=1")
        given: dict[str, Any] = {way: argv_of(name, out / way, *mesh) for way in ("whole", "cut")}
        # In the middle of two spikes, and of two checkpoints.
        given |= {"killed_after": POISONED[0], "poisoned": POISONED}
        for ended in [rank.end() for rank in fork_server.group(2, JOB, json.dumps(given))]:
            assert ended.code == 0, ended.printed[-3000:]
        return out

    return get


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES]
)
def test_a_resume_is_exact(name: str, in_two: Callable[[str], Path]) -> None:
    folder = in_two(name)
    assert_same_run(folder / "cut", folder / "whole")
    assert len(json.loads((folder / "cut" / "run.json").read_text())["starts"]) == 2


@pytest.fixture
def in_one(
    argv_of: Callable[..., list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Path]:
    """The folder of the same run in one process."""
    for key in ("SMALLEST", "SMALLEST_BLOCK"):
        monkeypatch.setattr(adamw_8bit, key, 1)
    poison(monkeypatch, POISONED)

    def get(name: str) -> Path:
        assert run_main(main, argv_of(name, tmp_path / name, *ALONE)) == 0
        return tmp_path / name

    return get


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint."""
    reader = CheckpointReader(open_storage(folder / "checkpoints"), CHECKPOINT)
    return {name: reader.get(name) for name in reader.tensor_names()}


def test_averages_and_spikes_are_those_of_one_process(
    in_one: Callable[[str], Path], in_two: Callable[[str], Path]
) -> None:
    """The same updates are skipped, and the average of the weights agrees to fp32's rounding."""
    one, two = in_one("adamw"), in_two("adamw") / "whole"
    skipped = records(one, "spike")
    assert [each["step"] for each in skipped] == list(POISONED)
    for ours, theirs in zip(records(two, "spike"), skipped, strict=True):
        for key, value in theirs.items():
            near = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert ours[key] == near, key
    ours, theirs = tensors(two), tensors(one)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    exported = SafetensorsReader(two / "export")
    for name in exported.names():
        average = ours[f"optimizer.ema.{name}"]
        assert torch.equal(exported.get(name), average)
        assert not torch.equal(average, ours[f"model.{name}"])


def test_8_bit_state_is_that_of_one_process_but_for_few_levels(
    in_one: Callable[[str], Path], in_two: Callable[[str], Path]
) -> None:
    """From equal gradients the state is equal (tests/unit/torch_native/test_state.py). The
    gradients of two processes differ in their last bits, which moves few values to the next level,
    and their weights by a small part of an update."""
    ours, theirs = tensors(in_two("adamw_8bit") / "whole"), tensors(in_one("adamw_8bit"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        error = (ours[name].float() - tensor.float()).abs()
        if "_codes." in name:
            assert (error > 0).float().mean() < 0.02, name
        elif name.startswith(("model.", "optimizer.ema.")):
            assert error.max() < 0.1 * LR and error.mean() < 1e-4 * LR, name
            assert ("embed_tokens" not in name) or not error.any()
    assert sum("_codes." in name for name in theirs) == 2 * 15
