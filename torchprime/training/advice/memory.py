"""Bytes on one device by kind, for a number of blocks per device and micro-batch.

Weights, masters, optimizer state and gradients follow from shapes and sharding (setup/plan.py);
activations are counted (activations.py). On GPUs the native backend also has the gathered weights
of the layers that it computes, and sums the gradients of several micro-batches whole, before they
are sharded. What torch.compile or XLA fuse away is not subtracted.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial

import torch

from torchprime.config.schema import TrainConfig
from torchprime.models.decoder import CausalLM
from torchprime.training.advice.activations import Core, kept_bytes
from torchprime.training.advice.table import Devices
from torchprime.training.optim import Optimizer
from torchprime.training.setup.model_files import ModelFiles
from torchprime.training.setup.plan import (
    StoredParameter,
    estimate_memory,
    stored_parameters,
)
from torchprime.training.setup.recipe import checked_table, optimizer_of

WIDE = 4  # bytes of an fp32 number
MOST_ROWS = 4096
LAYERS_GATHERED = 2  # the layer that is computed and the next one
# fp32 tensors [tokens, V] that live at once in a chunk of the loss, and a mask of one byte: eager
# mode keeps each step of softmax and gradient, XLA fuses them.
CHUNK_TENSORS = {"gpu": 5.25, "tpu": 2.0}


@dataclass(frozen=True)
class Need:
    """Bytes on one device.

    Attributes:
        masters: fp32 copies of trained 16-bit weights.
        state: of the optimizer.
        gathered: weights of other devices while they are used.
        activations: that the backward pass keeps, and one layer's that remat computes again.
        logits: one chunk of logits with its gradients.
        cache: keys and values of answers that evaluation generates; no activations live then.
    """

    weights: int
    frozen: int
    masters: int
    state: int
    gradients: int
    gathered: int
    activations: int
    logits: int
    cache: int

    @property
    def always(self) -> int:
        """Bytes that are there from the start of a run to its end."""
        return self.weights + self.frozen + self.masters + self.state

    @property
    def total(self) -> int:
        """Bytes at the fullest moment; no kind is assumed to be freed before another is needed."""
        training = self.gradients + self.activations + self.logits
        return self.always + self.gathered + max(training, self.cache)

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


class Estimator:
    """Estimates a config's need on devices, for any number of rows."""

    def __init__(
        self, config: TrainConfig, files: ModelFiles, devices: Devices, core: Core = "kernel"
    ) -> None:
        """Read shapes and sharding.

        Args:
            core: the attention core that trains on the devices.

        Raises:
            ConfigError: names or shapes that the config's sharding table does not fit.
        """
        self.config, self.files, self.devices, self.core = config, files, devices, core
        self.dtype: torch.dtype = getattr(torch, config.torch_dtype)
        self.mesh = config.mesh_shape()
        model = files.build(self.dtype)
        _, self.specs = checked_table(config, model)
        self.stored: Mapping[str, StoredParameter] = stored_parameters(model)
        self.optimizer: Optimizer = optimizer_of(config)

    def need(self, rows: int, accumulation: int) -> Need:
        """Return the need of one device.

        Args:
            rows: blocks of a micro-batch on one device.
            accumulation: micro-batches of an update.
        """
        task = replace(
            self.config.task,
            global_batch_size=rows * self.batch_shards * accumulation,
            gradient_accumulation_steps=accumulation,
        )
        config = replace(self.config, task=task)
        known = estimate_memory(
            config, self.files.architecture, self.stored, self.specs, self.optimizer
        )
        masters = self._masters(known.weights)
        return Need(
            weights=known.weights,
            frozen=known.frozen,
            masters=masters,
            state=known.optimizer - masters,
            gradients=self._gradients(known.gradients, accumulation),
            gathered=self._gathered(),
            activations=rows * self._activations,
            logits=self._logits(rows),
            cache=self._cache(),
        )

    def largest_rows(self, accumulation: int = 1) -> int:
        """Return the largest number of blocks per device that fits, MOST_ROWS at most; 0 if one
        does not."""
        numbers = range(1, MOST_ROWS + 1)
        return bisect_right(
            numbers, self.devices.room, key=lambda rows: self.need(rows, accumulation).total
        )

    @property
    def batch_shards(self) -> int:
        """The number of devices with different rows."""
        return self.mesh["data"] * self.mesh["fsdp"]

    @property
    def trained(self) -> dict[str, StoredParameter]:
        return {name: p for name, p in self.stored.items() if p.trained}

    def _masters(self, weights: int) -> int:
        narrow = self.dtype.itemsize < WIDE and self.config.task.optimizer.master_weights
        return weights // self.dtype.itemsize * WIDE if narrow else 0

    def _gradients(self, sharded: int, accumulation: int) -> int:
        if self.devices.kind == "tpu" or accumulation == 1:
            return sharded
        # FSDP2 sums the gradients of micro-batches in fp32, before it shards them.
        return sum(p.size for p in self.trained.values()) // self.mesh["tensor"] * WIDE

    def _gathered(self) -> int:
        """Return the bytes of weights that FSDP gathers: two layers', and the root's own."""
        if self.mesh["fsdp"] == 1:
            return 0
        layers = self.files.architecture.num_hidden_layers
        inside = outside = 0
        for name, p in self.stored.items():
            size = p.size * p.dtype.itemsize // self.mesh["tensor"]
            if ".layers." in name:
                inside += size
            else:
                outside += size
        if self.devices.kind == "tpu":
            outside = 0  # the partitioner multiplies by the shards of these
        return LAYERS_GATHERED * inside // layers + outside

    @cached_property
    def _activations(self) -> int:
        """Bytes of activations of one block on one device."""
        config, tensor = self.config, self.mesh["tensor"]
        size, layers = config.dataset.block_size, self.files.architecture.num_hidden_layers
        count = partial(kept_bytes, self._layers, 1, size, core=self.core)
        everything, inputs = count(remat=False), count(remat=True)
        # Along the tensor axis a layer's input is whole, and what is inside it is cut.
        inside = (everything.layer - inputs.layer) // tensor
        outside = max(everything.outside, inputs.outside)
        if not config.remat.recomputes:
            return outside + layers * (inputs.layer + inside)
        kept = layers if config.remat.policy == "full" else 0
        return outside + kept * inputs.layer + inside

    def _layers(self, count: int) -> CausalLM:
        architecture = replace(self.files.architecture, num_hidden_layers=count)
        adapter = self.files.adapter
        if adapter is not None:
            adapter = replace(adapter, spec=replace(adapter.spec, layers=None))
        return replace(self.files, architecture=architecture, adapter=adapter).build(self.dtype)

    def _logits(self, rows: int) -> int:
        config, a = self.config, self.files.architecture
        length = math.ceil(config.dataset.block_size / config.task.loss_chunks)
        chunk = rows * length * a.vocab_size * WIDE * CHUNK_TENSORS[self.devices.kind]
        hidden = rows * config.dataset.block_size * a.hidden_size * self.dtype.itemsize
        head = "lm_head.weight" if "lm_head.weight" in self.stored else "model.embed_tokens.weight"
        summed = a.vocab_size * a.hidden_size * WIDE if self.stored[head].trained else 0
        return (int(chunk) + 2 * summed) // self.mesh["tensor"] + hidden

    def _cache(self) -> int:
        generate, a = self.config.eval.generate, self.files.architecture
        if not (generate.enabled and self.config.holds_out):
            return 0
        rows = math.ceil(generate.batch_size / self.batch_shards)
        longest = self.config.dataset.block_size + generate.max_new_tokens
        slots = rows * min(longest, a.max_position_embeddings)
        heads = 2 * a.num_hidden_layers * a.num_key_value_heads * a.head_dim
        return slots * heads * self.dtype.itemsize // self.mesh["tensor"]


