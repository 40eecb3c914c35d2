"""Adapters on 4 virtual devices against a plain PyTorch loop: losses, weights after ten steps."""

from __future__ import annotations

import adapted
import pytest
import reference
import torch
from adapted import Way

from torchprime.adapters.apply import trainable
from torchprime.adapters.spec import AdapterSpec
from torchprime.torch_xla_models import placement
from torchprime.torch_xla_models.remat import Remat

SCAN = {"remat": Remat("full", scan_layers=True)}
LORA = AdapterSpec(rank=4, alpha=8)

WAYS = {
    "lora-dropout-scan-remat-accumulate2": Way(
        {"fsdp": 4}, AdapterSpec(rank=4, alpha=8, dropout=0.1), 2, SCAN
    ),
    "nf4-dora-tensor": Way(
        {"fsdp": 2, "tensor": 2}, AdapterSpec(rank=4, alpha=8, dora=True, base_type="nf4")
    ),
}


@pytest.fixture(scope="module")
def trained(shipped_table):
    """Each way, trained once: the plain model, its numbers, start, the backend, its numbers."""
    done: dict[str, tuple] = {}

    def get(way: str):
        if way not in done:
            chosen = WAYS[way]
            plain = adapted.make_model(chosen, shipped_table)
            start = {n: p.detach().clone() for n, p in plain.named_parameters()}
            expected = adapted.train(plain, chosen.spec.dropout > 0)
            backend = adapted.make_backend(chosen, start, shipped_table)
            numbers, compiles = [], []
            for step in range(adapted.STEPS):
                before = backend.compiles()
                batch = backend.put(reference.make_batch(step), chosen.accumulation)
                numbers.append(backend.read(backend.train_step(batch, adapted.LR)))
                compiles.append(backend.compiles() - before)
            done[way] = plain, expected, start, backend, numbers, compiles
        return done[way]

    return get


@pytest.mark.parametrize("way", WAYS)
def test_losses_norms_and_weights_are_those_of_plain_pytorch(way: str, trained) -> None:
    plain, expected, start, backend, numbers, compiles = trained(way)
    assert [n.loss for n in numbers] == pytest.approx(expected["losses"], rel=1e-5)
    assert [n.grad_norm for n in numbers] == pytest.approx(expected["norms"], rel=1e-5)
    assert compiles == [1] + [0] * (adapted.STEPS - 1)
    ours = dict(backend.weights())
    assert ours.keys() == trainable(plain).keys()
    for name, weight in trainable(plain).items():
        assert (weight - start[name]).abs().max() > 1e-2, name
        torch.testing.assert_close(ours[name], weight.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_the_base_stays_bit_for_bit(way: str, trained) -> None:
    _, _, start, backend, _, _ = trained(way)
    frozen = {n: p for n, p in backend.model.named_parameters() if not p.requires_grad}
    assert len(frozen) + len(backend.state.parameters) == len(backend.placed)
    for name, parameter in frozen.items():
        entry = backend.placed[name]
        first = [start[hf_name] for hf_name in entry.hf_names]
        host = placement.from_local_shards(parameter.detach())
        assert torch.equal(host, torch.stack(first) if entry.stacked else first[0]), name
