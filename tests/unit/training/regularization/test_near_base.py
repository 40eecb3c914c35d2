"""The divergence from the base in a step: its weights, its base, its place in the loss."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from torchprime.adapters.apply import apply_adapter
from torchprime.adapters.spec import AdapterSpec
from torchprime.data.blocks.batch import Batch
from torchprime.losses.chunks import Projection
from torchprime.losses.cross_entropy import LossSums
from torchprime.losses.divergence import BaseOutput
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM, initial_tensor
from torchprime.training.backend import StepOptions
from torchprime.training.regularization.near_base import Kl, NearBase, base_of, weights_of_all
from torchprime.training.step import FIELDS, counted_weights, host_fields

CONFIG = {"model_type": "llama", "vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}


def batch() -> Batch:
    segments = np.array([[1, 1, 2, 2, 2, 0], [1, 1, 0, 0, 0, 0]], np.int32)
    targets = np.array([[3, -100, -100, 4, -100, -100], [5, -100] + [-100] * 4], np.int32)
    weights = np.where(targets >= 0, 2.5, 0).astype(np.float32)
    zeros = np.zeros_like(segments)
    return Batch(zeros, targets, weights, zeros, segments)


def test_all_real_tokens_have_one_weight_whose_sum_the_step_divides_by() -> None:
    weights = weights_of_all(batch())
    real = torch.from_numpy(batch().segment_ids > 0)
    assert weights[real].unique().numel() == 1 and not weights[~real].any()
    assert weights.sum().item() == pytest.approx(batch().weight_sum)


@pytest.mark.parametrize(("seed", "noise"), [(None, 0.0), (3, 0.0), (3, 5.0)])
def test_each_tokens_weight_is_found_among_the_fields(seed: int | None, noise: float) -> None:
    kl = Kl(1.0, "all")
    options = StepOptions(kl=kl, random_seed=seed, noise_alpha=noise)
    fields = host_fields(batch(), options)
    assert len(fields) == len(FIELDS) + 1 + (seed is not None) + (noise > 0)
    assert torch.equal(counted_weights(fields, kl, options), weights_of_all(batch()))


def test_supervised_tokens_count_by_their_loss_weights() -> None:
    kl = Kl(1.0, "supervised")
    fields = host_fields(batch(), StepOptions(kl=kl))
    assert len(fields) == len(FIELDS)
    assert counted_weights(fields, kl, StepOptions(kl=kl)).tolist() == batch().loss_weights.tolist()


def model() -> CausalLM:
    made = CausalLM(architecture_from_hf({**CONFIG, **HEADS}))
    with torch.no_grad():
        for name, weight in made.named_parameters():
            weight.copy_(initial_tensor(name, weight.shape, 0.3, seed=1))
    return made


INPUTS = (torch.arange(8)[None] % 29, torch.arange(8)[None], torch.ones(1, 8, dtype=torch.int32))


def test_the_base_runs_with_its_own_weights_and_without_gradient() -> None:
    trained, other = model(), copy.deepcopy(model())
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.5)
    weights = {name: p.detach() for name, p in other.named_parameters()}
    found = base_of(trained, weights)(*INPUTS)
    assert torch.equal(found.hidden, other(*INPUTS).detach())
    assert torch.equal(found.output.weight, other.output_weight)
    assert not found.hidden.requires_grad
    assert not torch.equal(found.hidden, trained(*INPUTS))


def test_an_adapters_base_is_the_model_without_it() -> None:
    plain = model()
    expected = plain(*INPUTS).detach()
    apply_adapter(plain, AdapterSpec(rank=2, alpha=4, dora=True))
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if "lora_" in name and weight.is_floating_point():
                weight.normal_(0.0, 0.5)
    assert torch.equal(base_of(plain, None)(*INPUTS).hidden, expected)
    assert not torch.equal(plain(*INPUTS), expected)  # on again


def test_the_divergence_is_a_part_of_the_loss_and_its_last_term() -> None:
    def sums(value: float, *terms: float) -> LossSums:
        total, each = torch.tensor(value), torch.full((1, 2), value / 2)
        return LossSums(total, torch.tensor(4.0), each, tuple(map(torch.tensor, terms)))

    nothing = torch.zeros(())
    output = Projection(nothing)
    base = BaseOutput(nothing, output)
    near = NearBase(Kl(0.5, "all"), lambda *_: sums(6.0), base, nothing)
    loss = near.add(sums(8.0, 1.0), nothing, output)
    assert (loss.loss_sum.item(), loss.weight_sum.item()) == (11.0, 4.0)
    assert loss.each.tolist() == [[4.0, 4.0]]
    assert [term.item() for term in loss.terms] == [1.0, 3.0]
