"""A run's checkpoint with what an export needs, made without a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torchprime.checkpoint.hf.card import CardFacts
from torchprime.checkpoint.hf.export_facts import FACTS, ExportFacts
from torchprime.checkpoint.hf.folder import HfFolder
from torchprime.checkpoint.run.shards import TensorShards, write_shards
from torchprime.checkpoint.run.storage import Storage
from torchprime.files.atomic import write_json

NAME = "step_00000007"


def facts_of(checkpoint, **changes: Any) -> ExportFacts:
    fields: dict[str, Any] = dict(
        spec=checkpoint.spec,
        dtype=torch.float32,
        max_shard_bytes=30_000,
        stop_ids=(0,),
        base_model="some/model",
        base_folder=str(checkpoint.folder),
        step=7,
        card=CardFacts(name="tuned", base_model="some/model", versions={"torch": "2"}),
        metrics={"train loss of the last step": 1.25},
        fingerprints={"data": "d" * 64},
    )
    return ExportFacts(**{**fields, **changes})


def hf_folder(checkpoint, facts: ExportFacts, tokenizer_folder: Path) -> HfFolder:
    """The folder that a run would export."""
    return HfFolder(
        layout=facts.layout,
        config=checkpoint.config,
        generation_config={"temperature": 0.5},
        tokenizer_folder=tokenizer_folder,
        eos_token_id=0,
    )


def trained(checkpoint, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    weights = checkpoint.reader.weights(checkpoint.spec)
    return {n: (t + torch.randn_like(t) * 1e-3).to(dtype) for n, t in weights}


def saver(run_checkpoint, tokenizer_folder) -> Callable[..., None]:
    """Return a function that writes a run's checkpoint, each tensor in two parts."""

    def halves(key: str, tensor: torch.Tensor) -> TensorShards:
        parts = run_checkpoint.cut(key, tensor, (2, *[1] * (tensor.dim() - 1)))
        chunks = [chunk for part in parts for chunk in part.chunks]
        return dataclasses.replace(
            parts[0], chunks=chunks, read=lambda: [value for part in parts for value in part.read()]
        )

    def run(
        storage: Storage,
        checkpoint,
        weights: dict[str, torch.Tensor],
        *,
        name: str = NAME,
        facts: ExportFacts | None = None,
        more: dict[str, torch.Tensor] | None = None,
        keep: Callable[[Path], object] = lambda folder: None,
    ) -> None:
        facts = facts or facts_of(checkpoint)
        tensors = {f"model.{name}": tensor for name, tensor in weights.items()} | (more or {})
        with storage.create(name) as writer:
            write_shards(writer, [halves(key, tensor) for key, tensor in tensors.items()])
            with writer.local_folder("hf") as folder:
                small = hf_folder(checkpoint, facts, tokenizer_folder)
                small.write_small_files(folder, facts.card_text())
                write_json(folder / FACTS, facts.to_dict())
                keep(folder)
            run_checkpoint.finish(writer)

    return run
