"""Optimizers with parameter groups and a moving average, in one process and in two.

From the same gradients two processes compute the same weights, averages and state as one, bit for
bit. So in real runs only the order differs in which gradients are summed over tokens. 8-bit AdamW
can enlarge such a difference, to the next of its levels.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from forks import ForkServer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "torch_xla_models"))

import reference  # noqa: E402
from small_optimizers import EMA_DECAY, NAMES, gradient  # noqa: E402

WORKER = Path(__file__).parent / "optimizer_worker.py"


@pytest.fixture(scope="module")
def found(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tensors of one process and of two, each resumed on the way."""
    out = tmp_path_factory.mktemp("optimizers")
    groups = [fork_server.group(size, WORKER, str(out)) for size in (1, 2)]
    for ended in [rank.end() for group in groups for rank in group]:
        assert ended.code == 0, ended.printed[-3000:]
    return out


def tensors(folder: Path, name: str, size: int) -> dict[str, Tensor]:
    return torch.load(folder / f"{name}.{size}.pt", weights_only=True)


@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one_bit_for_bit(name: str, found: Path) -> None:
    one, two = tensors(found, name, 1), tensors(found, name, 2)
    assert one.keys() == two.keys()
    torch.testing.assert_close(one.pop("held_out"), two["held_out"], rtol=1e-6, atol=0)
    for key, tensor in one.items():
        assert torch.equal(two[key], tensor), key


@pytest.mark.parametrize("name", NAMES)
def test_groups_and_averages_are_those_of_a_loop(name: str, found: Path) -> None:
    """The loop has torch's optimizers, or the definitions, and the average's formula."""
    ours, expected = tensors(found, name, 2), naive(name)
    frozen = [n for n, start in expected["start"].items() if n not in expected["averages"]]
    assert len(frozen) == 3 and all(f"optimizer.ema.{n}" not in ours for n in frozen)
    for n, start in expected["start"].items():
        weight = ours[f"model.{n}"]
        if n in frozen:
            assert torch.equal(weight, start)
            continue
        moved = (expected["weights"][n] - start).abs().max()
        for kind, value in (("weights", weight), ("averages", ours[f"optimizer.ema.{n}"])):
            error = (value - expected[kind][n]).abs()
            # 8 bits may round a value between two levels to the other one.
            assert error.max() < (2e-2 if name == "adamw_8bit" else 1e-4) * moved, (kind, n)
            assert error.mean() < 1e-4 * moved, (kind, n)
        assert (weight - ours[f"optimizer.ema.{n}"]).abs().max() > 0.1 * moved
    torch.testing.assert_close(ours["held_out"], expected["of_averages"]["loss"], rtol=1e-4, atol=0)
    if name == "adamw_8bit":
        codes = ours["optimizer.exp_avg_codes.model.layers.1.self_attn.q_proj.weight"]
        assert codes.dtype == torch.uint8


def naive(name: str) -> dict[str, dict[str, Tensor]]:
    _, model = reference.make_model(tied=False)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = reference.make_optimizer(name, reference.in_groups(model), model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    averages: dict[str, Tensor] = {}
    for step in range(reference.STEPS):
        for n, p in trained.items():
            p.grad = gradient(n, p.shape, step)
        optimizer.step()
        now = {n: p.detach().clone() for n, p in trained.items()}
        before = averages or now
        averages = {n: EMA_DECAY * before[n] + (1 - EMA_DECAY) * now[n] for n in now}
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.load_state_dict(averages, strict=False)
    loss = reference.loss_of(model, reference.make_batch(99)).detach()
    return {
        "start": start,
        "weights": weights,
        "averages": averages,
        "of_averages": {"loss": loss},
    }
