"""A tiny decoder beside transformers' own with the same weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_llama import tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM

V, B, S = 64, 3, 12


@pytest.fixture(scope="session")
def hf_config() -> LlamaConfig:
    return tiny_llama(V, hidden_size=64, intermediate_size=128, attention_bias=True)


@pytest.fixture
def make_theirs(hf_config: LlamaConfig) -> Callable[[], PreTrainedModel]:
    """Makes transformers' model with random weights and biases, the same each time."""

    def make() -> PreTrainedModel:
        torch.manual_seed(5)
        model = AutoModelForCausalLM.from_config(hf_config, attn_implementation="eager")
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        return model

    return make


@pytest.fixture
def ours(hf_config: LlamaConfig, make_theirs: Callable[[], PreTrainedModel]) -> CausalLM:
    """Our model with those weights."""
    model = CausalLM(architecture_from_hf(hf_config.to_dict()))
    model.load_state_dict(make_theirs().state_dict())
    return model


@pytest.fixture(scope="session")
def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(0, V, (B, S), generator=generator) for _ in range(50)]


@pytest.fixture(scope="session")
def our_loss() -> Callable[[CausalLM, Tensor], Tensor]:
    """The mean next-token loss by our decoder."""

    def loss(model: CausalLM, ids: Tensor) -> Tensor:
        positions = torch.arange(S).expand(B, S)
        logits = model.logits(ids, positions, torch.ones_like(ids))
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, V), ids[:, 1:].reshape(-1)
        )

    return loss
