"""The end of a run: weights leave the device, become a Hugging Face folder, and are proved.

Proof has two parts. The files are read back and every tensor's bytes must be those that left the
device; and transformers, loading the folder, must compute the logits that the trainer computes. The
second needs the model in host memory, so it is done when there is room, and said when not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchprime.atomic import atomic_folder
from torchprime.checkpoint.card import model_card
from torchprime.checkpoint.export import ExportResult, check_export, export_hf
from torchprime.checkpoint.verify import compare_logits, read_back
from torchprime.training.backend import Backend
from torchprime.training.model_files import ModelFiles

# Largest difference of logits between the trainer and transformers, relative to the largest logit.
# fp32 differs by rounding order only (measured 1e-6 to 1e-5). bf16 rounds every activation to 8
# bits, each 2^-9 off, in an order that differs between the two: a few roundings add up.
LOGIT_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
PROBE_TOKENS = 64


class Exporter:
    """Writes and proves exports of one run's model."""

    def __init__(
        self,
        files: ModelFiles,
        *,
        dtype: torch.dtype,
        max_shard_bytes: int,
        card_facts: Mapping[str, Any],
        probe: list[int],
        chat_template: str | None,
        stop_ids: Sequence[int],
        say: Callable[[str], None],
    ) -> None:
        self.files, self.dtype, self.max_shard_bytes = files, dtype, max_shard_bytes
        self.card_facts, self.probe, self.say = card_facts, probe[:PROBE_TOKENS], say
        self.chat_template, self.stop_ids = chat_template, stop_ids

    def check(self, out: Path) -> None:
        """Raise what `write` would raise about the target, before the run."""
        check_export(
            out,
            spec=self.files.shapes,
            config=self.files.hf_config,
            dtype=self.dtype,
            tokenizer_folder=self.files.tokenizer.folder,
            eos_token_id=self.files.tokenizer.eos_id,
            max_shard_bytes=self.max_shard_bytes,
            chat_template=self.chat_template,
        )

    def write_sharded(self, out: Path, backend: Backend) -> None:
        """Leave the weights in shards instead (convert_to_safetensors=false): no conversion, no
        proof."""
        with atomic_folder(out) as folder:
            backend.save_sharded(str(folder))
        self.say(f"wrote shards to {out} (torch.distributed.checkpoint, not a Hugging Face folder)")

    def write(
        self, out: Path, backend: Backend, metrics: Mapping[str, Any], *, prove_logits: bool = True
    ) -> ExportResult | None:
        """Export the backend's weights to `out` and prove it; other processes only hand over.

        Every process takes part in bringing a sharded tensor to a host and in computing logits, so
        all do the same of these in the same order, also where the first one fails to write.
        """
        weights = backend.weights()
        together = backend.process_count > 1
        if backend.process_index != 0:
            self._take_part(weights, backend, prove_logits)
            return None
        try:
            result = self._export(out, weights, metrics)
        except BaseException:
            if together:
                self._take_part(weights, backend, prove_logits)
            raise
        no_room = self._no_room()
        trained = backend.logits(self.probe) if prove_logits and (together or not no_room) else None
        read_back(out, result.hashes)
        checked = f"{len(result.hashes)} tensors read back equal the trained weights"
        if trained is None or no_room:
            compared = f"logits not compared{no_room if prove_logits else ''}"
        else:
            compared = self._compare(out, trained)
        self.say(f"exported to {out}: {checked}; {compared}")
        return result

    def _take_part(
        self, weights: Iterator[tuple[str, Tensor]], backend: Backend, prove_logits: bool
    ) -> None:
        """What is left of a process' share in an export that another one writes."""
        for _ in weights:
            pass
        if prove_logits:
            backend.logits(self.probe)

    def _export(
        self, out: Path, weights: Iterator[tuple[str, Tensor]], metrics: Mapping[str, Any]
    ) -> ExportResult:
        return export_hf(
            out,
            weights=weights,
            spec=self.files.shapes,
            config=self.files.hf_config,
            dtype=self.dtype,
            tokenizer_folder=self.files.tokenizer.folder,
            eos_token_id=self.files.tokenizer.eos_id,
            generation_config=self._generation_config(),
            card=model_card({**self.card_facts, "metrics": metrics}),
            max_shard_bytes=self.max_shard_bytes,
            chat_template=self.chat_template,
        )

    def _generation_config(self) -> dict[str, Any] | None:
        """The source's, with the stop tokens that were trained: a server looks here for them."""
        found = self.files.generation_config()
        trained = [i for i in self.stop_ids if i != self.files.tokenizer.eos_id]
        if not trained:
            return found
        known = (found or {}).get("eos_token_id", self.files.hf_config.get("eos_token_id"))
        stops = [] if known is None else [known] if isinstance(known, int) else list(known)
        return {**(found or {}), "eos_token_id": list(dict.fromkeys([*stops, *trained]))}

    def _no_room(self) -> str:
        """Why transformers cannot load the export here, in brackets; empty if it can."""
        needed = 2 * self.files.num_parameters * self.dtype.itemsize
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed <= free:
            return ""
        return (
            f" (transformers needs about {needed / 1e9:.1f} GB of host memory, {free / 1e9:.1f} GB "
            "are free)"
        )

    def _compare(self, out: Path, trained: Tensor) -> str:
        ids = torch.tensor([self.probe]).numpy()
        tolerance = LOGIT_TOLERANCE[self.dtype]
        difference = compare_logits(out, ids, trained.numpy()[None], tolerance=tolerance)
        return f"logits of transformers match the trainer's to {difference:.0e} of the largest"
