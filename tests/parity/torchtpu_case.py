"""One small training, for a worker in each environment: model, rows and options from a description.

It needs nothing but this package and torch, so both environments make the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchprime.adapters.apply import apply_adapter
from torchprime.adapters.axes import adapter_patterns
from torchprime.adapters.spec import AdapterSpec
from torchprime.config.compose import compose_config
from torchprime.data.blocks.batch import Batch
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM, initial_tensor
from torchprime.sharding import ShardingTable
from torchprime.training.backend import StepOptions
from torchprime.training.optim.adamw import AdamW

VOCABULARY, BLOCKS, LENGTH, STEPS, LR = 64, 16, 16, 10, 1e-2
LAYERS = 3
HF = {
    "model_type": "llama",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
}
GEMMA2 = {
    "model_type": "gemma2",
    "head_dim": 8,
    "query_pre_attn_scalar": 12,
    "sliding_window": 5,
    "attn_logit_softcapping": 0.5,
    "final_logit_softcapping": 1.5,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}


class Case(NamedTuple):
    """A training that both sides run."""

    model: CausalLM
    table: ShardingTable
    options: StepOptions
    optimizer: AdamW
    start: dict[str, Tensor]


def make_case(way: dict[str, Any]) -> Case:
    """Return the training of a description: `accumulation`, `lora` with a rank, and `gemma2`."""
    with torch.device("meta"):
        model = CausalLM(architecture_from_hf(HF | (GEMMA2 if way.get("gemma2") else {})))
    shipped = compose_config(["model.pretrained_model=x", "task.max_steps=1"]).sharding
    patterns = dict(shipped.parameters)
    if way.get("lora"):
        apply_adapter(model, AdapterSpec(way["lora"], float(way["lora"])))
        patterns = adapter_patterns(patterns, ("fsdp",))
    table = ShardingTable(patterns, shipped.activations, 10**6)
    # An epsilon above the rounding of tiny gradients, which Adam would enlarge.
    optimizer = AdamW(eps=1e-3, weight_decay=0.1)
    options = StepOptions(way.get("accumulation", 1), 3, max_grad_norm=0.5, num_sources=2)

    def start_of(name: str, shape: torch.Size) -> Tensor:
        # Larger adapters enlarge rounding from step to step, on every backend, and so do larger
        # weights behind Gemma's norms.
        small = 0.05 if ".lora_" in name else 0.1 if way.get("gemma2") else 0.2
        return initial_tensor(name, shape, small, 7)

    start = {
        name: start_of(name, p.shape) if p.dim() else torch.tensor(n)
        for n, (name, p) in enumerate(model.named_parameters())
    }
    return Case(model, table, options, optimizer, start)


def make_batch(step: int, length: int = LENGTH) -> Batch:
    """Return packed rows: two segments and padding in most blocks, an empty block, weights."""
    rng = np.random.default_rng(step)
    shape = (BLOCKS, length)
    ids = rng.integers(1, VOCABULARY, shape, dtype=np.int32)
    cuts = np.sort(rng.integers(3, length + 1, (BLOCKS, 2)), axis=1)
    cuts[-1] = 0
    place = np.arange(length, dtype=np.int32)[None]
    first, second = place < cuts[:, :1], place < cuts[:, 1:]
    segments = np.where(first, 1, np.where(second, 2, 0)).astype(np.int32)
    positions = np.where(first, place, np.where(second, place - cuts[:, :1], 0)).astype(np.int32)
    following = np.pad(segments[:, 1:], ((0, 0), (0, 1)))
    supervised = (segments > 0) & (following == segments) & (rng.random(shape) < 0.7)
    targets = np.where(supervised, np.roll(ids, -1, axis=1), -100).astype(np.int32)
    weights = (rng.integers(1, 4, shape) * supervised).astype(np.float32)
    sources = ((segments + place) % 2).astype(np.int32)
    ids = np.where(segments > 0, ids, 0).astype(np.int32)
    return Batch(ids, targets, weights, positions, segments, sources)
