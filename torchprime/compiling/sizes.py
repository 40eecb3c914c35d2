"""The settings and sizes of a config's step, from which the report calculates."""

from __future__ import annotations

from typing import Any

import torch

from torchprime.compiling.theory import Sizes, Weight
from torchprime.config.schema import TrainConfig
from torchprime.models.architecture import Architecture
from torchprime.sharding import shard_count
from torchprime.training.setup.adapter import build_model
from torchprime.training.setup.plan import loss_chunk, stored_parameters
from torchprime.training.setup.recipe import adapter_of, checked_table, model_of


def settings(config: TrainConfig) -> dict[str, Any]:
    """Return the config values that affect the step's memory and time."""
    c = config
    return {
        "torch_dtype": c.torch_dtype,
        "block_size": c.dataset.block_size,
        "global_batch_size": c.task.global_batch_size,
        "gradient_accumulation_steps": c.task.gradient_accumulation_steps,
        "optimizer": c.task.optimizer.name,
        "master_weights": c.task.optimizer.master_weights and c.torch_dtype != "float32",
        "loss_chunks": c.task.loss_chunks,
        "scan_layers": c.remat.scan_layers,
        "remat": c.remat.policy,
        "attention_kernel": c.model.attention_kernel,
        "adapter": _adapter_settings(c),
    }


def _adapter_settings(config: TrainConfig) -> dict[str, Any] | None:
    adapter = adapter_of(config)  # with `adapter.pretrained` its folder describes it
    if adapter is None:
        return None
    spec = adapter.spec
    return {
        "rank": spec.rank,
        "base_dtype": spec.base_type,
        "dora": spec.dora,
        "dropout": spec.dropout,
        "targets": list(spec.targets),
        "layers": None if spec.layers is None else list(spec.layers),
        "modules_to_train": list(spec.modules_to_train),
    }


def step_sizes(config: TrainConfig, a: Architecture) -> Sizes:
    """Return the sizes that the report's arithmetic needs, checked against the sharding table.

    Raises:
        ConfigError: a run of the config would be refused.
    """
    mesh, dtype = config.mesh_shape(), getattr(torch, config.torch_dtype)
    adapter = adapter_of(config)
    model = model_of(config, a, dtype)
    stored = stored_parameters(model)
    plain = stored if adapter is None else stored_parameters(build_model(a, None, dtype))
    _, specs = checked_table(config, model)
    along = {axis: size if axis == "fsdp" else 1 for axis, size in mesh.items()}
    rows = config.task.micro_batch_size // (mesh["data"] * mesh["fsdp"])
    return Sizes(
        shapes={name: p.shape for name, p in plain.items()},
        weights={
            name: Weight(
                shape=p.shape,
                itemsize=p.dtype.itemsize,
                trained=p.trained,
                pieces=shard_count(specs[name], along),
                shards=shard_count(specs[name], mesh),
            )
            for name, p in stored.items()
        },
        fsdp=mesh["fsdp"],
        tensor=mesh["tensor"],
        data=mesh["data"],
        weight_bytes=dtype.itemsize,
        windows=tuple(layer.window for layer in a.layers),
        hidden=a.hidden_size,
        ffn=a.intermediate_size,
        vocab=a.vocab_size,
        heads=a.num_attention_heads,
        kv_heads=a.num_key_value_heads,
        head_size=a.head_dim,
        tied=a.tie_word_embeddings,
        block_size=config.dataset.block_size,
        rows=rows,
        accumulation=config.task.gradient_accumulation_steps,
        loss_chunk=loss_chunk(config, model, rows),
        recomputed=config.remat.recomputed,
        norm_after=a.norms != "pre",
        dora=adapter is not None and adapter.spec.dora,
        dropout=adapter is not None and adapter.spec.dropout > 0,
    )
