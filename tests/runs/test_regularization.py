"""Fisher information from the command, and runs that are held near their base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forks import ForkServer
from interrupted import ALONE, REPO, Killed, assert_same_run, overrides, records
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from torchprime.checkpoint.fisher import MANIFEST, FisherFolder
from torchprime.cli.fisher import fisher_main
from torchprime.config.entry import run_main
from torchprime.data.blocks.order import batch_indices
from torchprime.torch_native.train import main as native
from torchprime.training.fisher import one_by_one

EXAMPLES = 6
Run = Callable[[list[str]], int]
Command = Callable[..., list[str]]
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def measured(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Fisher information of a few examples, on XLA with fsdp 2 x tensor 2."""
    out = tmp_path_factory.mktemp("fisher") / "fisher"
    argv = ["--out", str(out), f"--examples={EXAMPLES}", "--backend", "xla", *command()]
    assert fisher_main(argv) == 0
    return out


@pytest.fixture(scope="module")
def in_float64(command: Command, order_of: Callable, tiny: Path) -> tuple[list[Gradients], float]:
    """The gradient of each example's summed loss, by transformers in float64, one at a time; and
    the sum of all weights."""
    order = order_of(command())
    data = one_by_one(order.data)
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float64)
    found, total = [], 0.0
    for number in range(EXAMPLES):
        batch = data.batch(batch_indices(data.num_blocks, order.seed, number, 1))
        length = int(np.count_nonzero(batch.segment_ids))
        logits = model(torch.from_numpy(batch.input_ids[:, :length]).long()).logits[0]
        targets = torch.from_numpy(batch.targets[0, :length]).long()
        losses = F.cross_entropy(logits, targets, reduction="none")
        weights = torch.from_numpy(batch.loss_weights[0, :length]).double()
        model.zero_grad()
        (losses * weights).sum().backward()
        total += weights.sum().item()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return found, total


def check_values(folder: Path, gradients: list[Gradients], total: float) -> None:
    fisher = FisherFolder(folder)
    assert fisher.facts.examples == EXAMPLES
    assert fisher.facts.supervised_weight == pytest.approx(total)
    for name in gradients[0]:
        expected = torch.stack([each[name].square() for each in gradients]).sum(0) / total
        scale = expected.max().item()
        assert scale > 0
        torch.testing.assert_close(
            fisher.get(name).double(), expected, rtol=1e-4, atol=1e-6 * scale, msg=name
        )


def test_fisher_is_that_of_a_float64_loop_over_examples(measured: Path, in_float64: Any) -> None:
    gradients, total = in_float64
    check_values(measured, gradients, total)
    assert json.loads((measured / MANIFEST).read_text())["formula"].startswith("sum over examples")


def test_the_square_of_the_batchs_gradient_is_another_number(in_float64: Any) -> None:
    gradients, total = in_float64
    name = "model.layers.0.mlp.down_proj.weight"
    each = torch.stack([gradient[name] for gradient in gradients])
    one_at_a_time, together = each.square().sum() / total, each.sum(0).square().sum() / total
    assert together > 1.5 * one_at_a_time


@pytest.mark.slow
def test_two_native_processes_find_the_same(
    command: Command, in_float64: Any, fork_server: ForkServer, tmp_path: Path
) -> None:
    out = tmp_path / "fisher"
    mesh = ("ici_mesh.fsdp=2", "ici_mesh.tensor=1")
    argv = ["fisher", "--out", str(out), "--examples", str(EXAMPLES), *command(*mesh)]
    main = REPO / "torchprime" / "cli" / "main.py"
    for ended in [rank.end() for rank in fork_server.group(2, main, *argv)]:
        assert ended.code == 0, ended.printed[-3000:]
    check_values(out, *in_float64)


def near_the_base(fisher: Path) -> tuple[str, ...]:
    """Both terms; they share one copy of the base."""
    return (
        f"regularization.ewc.fisher={fisher}",
        "regularization.ewc.strength=30",
        "regularization.kl.coefficient=0.2",
        "regularization.kl.on=all",
    )


def test_native_resumes_exactly_near_its_base_and_on_no_other_base_or_fisher(
    measured: Path, command: Command, rows: Any, tiny: Path, tmp_path: Path,
    killed_after: Callable[[int], None], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    held = near_the_base(measured)
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert run_main(native, command(*overrides(whole, rows[1]), *ALONE, *held)) == 0
    argv = command(*overrides(folder, rows[1]), *ALONE, *held)
    killed_after(5)
    with pytest.raises(Killed):
        run_main(native, argv)
    assert run_main(native, argv) == 0
    said = capsys.readouterr().err
    assert "step_00000003" in said and "reference 0.00" in said
    assert_same_run(folder, whole)
    for name in ("ewc", "kl"):
        terms = [record["terms"][name] for record in records(folder)]
        assert terms[0] == pytest.approx(0, abs=1e-6) and terms[-1] > 1e-4
    assert records(folder)[-1]["loss"] > sum(records(folder)[-1]["terms"].values())

    longer = ["task.max_steps=13", "resume.allow_changes=[task.max_steps]"]
    longer += ["task.export_checkpoint_path=null"]
    other = Path(shutil.copytree(measured, tmp_path / "other"))
    assert run_main(native, [*argv, *longer, f"regularization.ewc.fisher={other}"]) == 0
    values = load_file(other / "model.safetensors")
    values["model.norm.weight"][0] += 1
    save_file(values, other / "model.safetensors", {"format": "pt"})
    assert run_main(native, [*argv, f"regularization.ewc.fisher={other}"]) == 2
    assert "have changed since they were written" in capsys.readouterr().err
    base = changed_base(tiny, tmp_path / "base")
    assert run_main(native, [*argv, f"model.pretrained_model={base}"]) == 2
    assert "is of a base with the fingerprint" in capsys.readouterr().err


def changed_base(tiny: Path, folder: Path) -> Path:
    shutil.copytree(tiny, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] += 2**-20
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.slow
def test_xla_resumes_exactly_near_its_base(
    measured: Path, command: Command, rows: Any, tmp_path: Path, run: Run,
    killed_after: Callable[[int], None],
) -> None:  # fmt: skip
    held = (*near_the_base(measured), "remat=scan")
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert run(command(*overrides(whole, rows[1]), *held)) == 0
    argv = command(*overrides(folder, rows[1]), *held)
    killed_after(5)
    with pytest.raises(Killed):
        run(argv)
    assert run(argv) == 0
    assert_same_run(folder, whole)


@pytest.fixture
def refused(command: Command, run: Run, capsys: Any, tmp_path: Path) -> Iterator[Callable]:
    def check(*more: str) -> str:
        assert run(command(f"output_dir={tmp_path / 'out'}", "run_name=mine", *more)) == 2
        printed = capsys.readouterr().err
        assert "Traceback" not in printed and not (tmp_path / "out").exists()
        return printed

    yield check


def test_a_fisher_folder_that_is_none_or_of_another_model(
    measured: Path, refused: Callable, tmp_path: Path
) -> None:
    strength = "regularization.ewc.strength=1"
    missing = tmp_path / "missing"
    assert "torchprime fisher" in refused(f"regularization.ewc.fisher={missing}", strength)
    other = Path(shutil.copytree(measured, tmp_path / "other"))
    values = load_file(other / "model.safetensors")
    values["lm_head.weight"] = values["lm_head.weight"][:-1].clone()
    del values["model.norm.weight"]
    save_file(values, other / "model.safetensors", {"format": "pt"})
    said = refused(f"regularization.ewc.fisher={other}", strength)
    assert "lm_head.weight (model [260, 16], file [259, 16])" in said
    assert "model.norm.weight (model [16], file none)" in said
    (other / MANIFEST).write_text("{}")
    assert "it lacks format_version" in refused(f"regularization.ewc.fisher={other}", strength)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["adapter=lora", "adapter.rank=4"], "adapter.rank: given 4, expected null"),
        (["-m", "seed=1,2"], "-m: given with torchprime fisher"),
    ],
)
def test_the_command_refuses(
    more: list[str], message: str, command: Command, tmp_path: Path, capsys: Any
) -> None:
    flags = [each for each in more if each.startswith("-")]
    given = [each for each in more if not each.startswith("-")]
    out = tmp_path / "fisher"
    assert fisher_main(["--out", str(out), *flags, *command(*given)]) == 2
    assert message in capsys.readouterr().err and not out.exists()
