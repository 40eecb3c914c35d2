"""Adapters in runs that are cut short and resumed: bit for bit, on another backend to rounding, and
never on another base."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interrupted import ALONE, Killed, agree, overrides, records, torchrun
from safetensors.torch import load_file, save_file

from torchprime.adapters.peft_format import WEIGHTS_NAME
from torchprime.checkpoint.run.catalog import Catalog
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.reader import CheckpointReader
from torchprime.config.entry import run_main
from torchprime.torch_native.train import main as native

STEPS = 6
ADAPTED = (
    "adapter=dora",
    "adapter.rank=4",
    "adapter.dropout=0.1",
    "task.neftune_noise_alpha=0.5",
    "adapter.base_dtype=int8",
    "export.adapter=adapter",
    f"task.max_steps={STEPS}",
    "eval.every_steps=3",
)
Run = Callable[[list[str]], int]
Command = Callable[..., list[str]]


def check_same(folder: Path, other: Path) -> None:
    """Every record, the exported adapter and the last checkpoint, bit for bit."""
    for kind in ("train", "eval"):
        assert records(folder, kind) == records(other, kind)
    assert [record["step"] for record in records(folder)] == list(range(1, STEPS + 1))
    ours, theirs = (load_file(each / "export" / WEIGHTS_NAME) for each in (folder, other))
    assert ours.keys() == theirs.keys() and len(ours) == 2 * 7 * 3  # layers, linears, A B norms
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(tensor.any() for name, tensor in ours.items() if "lora_B" in name)
    last = [
        CheckpointReader(open_storage(each / "checkpoints"), Catalog.name_of(STEPS))
        for each in (folder, other)
    ]
    names = last[0].tensor_names()
    assert set(names) == set(last[1].tensor_names())
    assert not any("base_layer" in name or "embed_tokens" in name for name in names)
    assert all(torch.equal(last[0].get(name), last[1].get(name)) for name in names)


@pytest.fixture
def resumed(
    command: Command, rows: tuple[Path, Path], tmp_path: Path, killed_after: Callable[[int], None]
) -> Callable[..., tuple[Path, Path, list[str]]]:
    """Runs once without a kill, and once with a kill after step 4 and a resume from step 3. Returns
    both folders, and the command of the latter."""

    def make(run: Run, *more: str) -> tuple[Path, Path, list[str]]:
        whole, folder = tmp_path / "whole", tmp_path / "run"
        assert run(command(*overrides(whole, rows[1]), *ADAPTED, *more)) == 0
        argv = command(*overrides(folder, rows[1]), *ADAPTED, *more)
        killed_after(4)
        with pytest.raises(Killed):
            run(argv)
        assert run(argv) == 0
        return whole, folder, argv

    return make


def test_native_resumes_exactly_and_on_no_other_base(
    resumed: Callable, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run: Run = lambda argv: run_main(native, argv)  # noqa: E731
    whole, folder, argv = resumed(run, *ALONE)
    assert "step_00000003" in capsys.readouterr().err
    check_same(folder, whole)
    assert records(folder)[-1]["loss"] < records(folder)[0]["loss"]
    longer = ["task.max_steps=8", "resume.allow_changes=[task.max_steps]"]
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] += 2**-20
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    assert run([*argv, *longer, f"model.pretrained_model={base}"]) == 2
    assert "refused      base: " in capsys.readouterr().err
    assert run([*argv, *longer, "adapter.rank=2"]) == 2
    said = capsys.readouterr().err
    assert "refused      adapter.rank: 4 -> 2" in said and "base" not in said
    check_same(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("ici_mesh.tensor=1", "ici_mesh.fsdp=4", "remat=scan_full")])
def test_xla_resumes_exactly(resumed: Callable, run: Run, more: tuple[str, ...]) -> None:
    whole, folder, _ = resumed(run, *more)
    check_same(folder, whole)


@pytest.mark.slow
def test_from_xla_to_two_native_processes_and_back(
    run: Run, command: Command, rows: tuple[Path, Path], tmp_path: Path,
    killed_after: Callable[[int], None], capsys: Any,
) -> None:  # fmt: skip
    on_four = (
        "ici_mesh.fsdp=4", "ici_mesh.tensor=1", "checkpoint.every_steps=2",
        "task.lr_scheduler.name=constant",  # whatever the length
    )  # fmt: skip
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert run(command(*overrides(whole, rows[1]), *ADAPTED, *on_four)) == 0
    argv = command(*overrides(folder, rows[1]), *ADAPTED, *on_four)
    killed_after(2)
    with pytest.raises(Killed):
        run(argv)
    # Two processes stop at a length of their own, since they can't be killed from here.
    shorter = ["task.max_steps=4", "resume.allow_changes=[task.max_steps]"]
    moved = [*argv, "ici_mesh.fsdp=2", "task.gradient_accumulation_steps=2"]
    code, said = torchrun(2, [*moved, *shorter])
    assert code == 0 and "step_00000002" in said, said[-3000:]
    shutil.rmtree(folder / "export")
    capsys.readouterr()
    assert run([*argv, shorter[1]]) == 0
    assert "step_00000004" in capsys.readouterr().err
    agree(folder, whole)
