"""Bytes on one device by kind, for a number of blocks per device and micro-batch.

Weights, masters, optimizer state and gradients follow from shapes and sharding (setup/plan.py);
activations are counted (setup/activations.py). On GPUs the native backend also has the gathered
weights of the layers that it computes, and sums the gradients of several micro-batches whole,
before they are sharded. What torch.compile or XLA fuse away is not subtracted.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch

from torchprime.config.schema import TrainConfig
from torchprime.config.sections.remat import LAYER_INPUT
from torchprime.models.decoder import CausalLM
from torchprime.training.advice.table import Devices
from torchprime.training.optim.optimizer import Optimizer
from torchprime.training.setup.activations import Core, Live, Shape, kept_bytes, live_bytes
from torchprime.training.setup.adapter import ModelForm, build_model
from torchprime.training.setup.plan import (
    StoredParameter,
    held_memory,
    kept_elements,
    loss_bytes,
    stored_parameters,
)
from torchprime.training.setup.recipe import checked_table, optimizer_of

WIDE = 4  # bytes of an fp32 number
MOST_ROWS = 4096
LAYERS_GATHERED = 2  # the layer that is computed and the next one


@dataclass(frozen=True)
class Need:
    """Bytes on one device.

    Attributes:
        masters: fp32 copies of trained 16-bit weights.
        state: of the optimizer.
        reference: the base's weights and Fisher information, for regularization.
        gathered: weights of all devices, while they are used.
        reduced: a layer's gradients, while they are summed over devices.
        activations: that the forward pass keeps for the backward pass.
        working: more at the fullest moment: in the loss, or in one layer's backward pass.
        cache: keys and values of answers that evaluation generates; no activations live then.
    """

    weights: int
    frozen: int
    masters: int
    state: int
    gradients: int
    reference: int
    gathered: int
    reduced: int
    activations: int
    working: int
    cache: int

    @property
    def always(self) -> int:
        """Bytes that are there from the start of a run to its end."""
        held = self.weights + self.frozen + self.reference
        return held + self.masters + self.state

    @property
    def total(self) -> int:
        """Bytes at the fullest moment; no kind is assumed to be freed before another is needed."""
        training = self.gradients + self.activations + self.working
        return self.always + self.gathered + self.reduced + max(training, self.cache)

    def to_dict(self) -> dict[str, int]:
        return {**asdict(self), "total": self.total}


class Estimator:
    """Estimates a config's need on devices, for any number of rows."""

    def __init__(
        self,
        config: TrainConfig,
        form: ModelForm,
        devices: Devices,
        *,
        longest: int | None = None,
        core: Core = "kernel",
    ) -> None:
        """Read shapes and sharding.

        Args:
            longest: tokens of the longest prompt; None if it is not known.
            core: the attention core that trains on the devices.

        Raises:
            ConfigError: names or shapes that the config's sharding table does not fit.
        """
        self.config, self.form, self.devices = config, form, devices
        self.longest = longest
        self.core: Core = core
        self.dtype: torch.dtype = getattr(torch, config.torch_dtype)
        self.mesh = config.mesh_shape()
        self.built = form.build(self.dtype)
        _, self.specs = checked_table(config, self.built)
        self.stored: Mapping[str, StoredParameter] = stored_parameters(self.built)
        self.optimizer: Optimizer = optimizer_of(config)

    def with_config(self, config: TrainConfig) -> Estimator:
        """Return the estimator of another config on the same devices."""
        return Estimator(config, self.form, self.devices, longest=self.longest, core=self.core)

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
        known = held_memory(config, self.stored, self.specs, self.optimizer)
        masters, live = self._masters(known.weights), self._live(rows)
        return Need(
            weights=known.weights,
            frozen=known.frozen,
            masters=masters,
            state=known.optimizer - masters,
            gradients=self._gradients(known.gradients, accumulation),
            reference=known.reference,
            gathered=self._gathered(),
            reduced=self._reduced(),
            activations=live.kept,
            working=live.peak - live.kept,
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
        if accumulation == 1:
            return sharded
        if self.devices.kind == "tpu":
            # The loop over micro-batches has its sums, the gradients of one micro-batch, and the
            # weights that it passes on.
            narrow = sharded // WIDE * self.dtype.itemsize
            return sharded + 2 * narrow
        # FSDP2 sums the gradients of micro-batches in fp32, before it shards them.
        return sum(p.size for p in self.trained.values()) // self.mesh["tensor"] * WIDE

    def _gathered(self) -> int:
        """Return the bytes of gathered weights: two layers', and on GPUs those outside of layers.

        FSDP2 gathers even on one device. A compiled program multiplies by the shards of the weights
        outside of layers.
        """
        native = self.devices.kind == "gpu"
        if not native and self.mesh["fsdp"] == 1:
            return self._dequantized()
        inside, outside = (
            sum(p.size * p.dtype.itemsize for p in part) for part in self._inside_and_outside()
        )
        gathered = LAYERS_GATHERED * inside // self.form.architecture.num_hidden_layers
        gathered += outside if native else self._dequantized()
        return gathered // self.mesh["tensor"]

    def _dequantized(self) -> int:
        """Return the bytes of two layers' weights in the run's type, if they are quantized: a
        compiled program writes them; eager mode counts them as work space."""
        adapter = self.form.adapter
        if adapter is None or adapter.spec.base_type == "run":
            return 0
        layer = build_model(self.form.architecture.with_layers(1), None, self.dtype)
        size = sum(p.numel() for name, p in layer.named_parameters() if ".layers." in name)
        return LAYERS_GATHERED * size * self.dtype.itemsize

    def _reduced(self) -> int:
        """Return the bytes of one layer's gradients in fp32 while FSDP2 sums them, and of the
        result before it gets the weights' type."""
        if self.devices.kind == "tpu":
            return 0
        inside, _ = self._inside_and_outside()
        size = sum(p.size for p in inside if p.trained) * WIDE
        size += size // self.mesh["fsdp"] if self.dtype.itemsize < WIDE else 0
        return size // self.form.architecture.num_hidden_layers // self.mesh["tensor"]

    def _inside_and_outside(self) -> tuple[list[StoredParameter], list[StoredParameter]]:
        """Return the parameters of layers, and the others."""
        parts: tuple[list[StoredParameter], list[StoredParameter]] = [], []
        for name, parameter in self.stored.items():
            parts[".layers." not in name].append(parameter)
        return parts

    def _live(self, rows: int) -> Live:
        """Return one device's bytes besides weights and gradients, which grow by the row."""
        pairs = zip(*self._one_and_two_rows, strict=True)
        found = [one + (rows - 1) * (two - one) for one, two in pairs]
        if self.devices.kind == "gpu":
            return self._moved(rows, Live(*found))
        return self._fused(rows, *found)  # chunks of the loss do not grow by the row

    @cached_property
    def _one_and_two_rows(self) -> tuple[Sequence[int], Sequence[int]]:
        return self._counted(1), self._counted(2)

    def _counted(self, rows: int) -> Sequence[int]:
        """Return what is counted for some rows: on a GPU the bytes that are kept and those at the
        peak; else those that are kept with the config's remat, and without remat."""
        config = self.config
        shape = Shape(rows, config.dataset.block_size, config.task.loss_chunks)
        given = self._layers, self.form.architecture.num_hidden_layers, shape
        remat = config.remat
        if self.devices.kind == "gpu":
            names = remat.kept_outputs if remat.selects else None
            return live_bytes(*given, core=self.core, names=names)
        everything = kept_bytes(*given, core=self.core, names=None)
        kept = kept_bytes(*given, core=self.core, names=()) if remat.selects else everything
        return kept, everything

    def _moved(self, rows: int, found: Live) -> Live:
        """Return the bytes without the layers' inputs, if they are in host memory: one is fetched
        back for the backward pass of its layer."""
        if LAYER_INPUT not in self.config.remat.offloaded:
            return found
        a = self.form.architecture
        one = rows * self.config.dataset.block_size * a.hidden_size * self.dtype.itemsize
        layers = a.num_hidden_layers
        return Live(found.kept - layers * one, found.peak - (layers - 1) * one)

    def _fused(self, rows: int, layers_keep: int, without_remat: int) -> Live:
        """Return the bytes of a compiled program, whose loss keeps a few tensors of logits.

        Args:
            layers_keep: bytes that the layers keep for the backward pass.
            without_remat: the same without remat.
        """
        config, a = self.config, self.form.architecture
        loss = loss_bytes(config, self.built, rows, self.devices.memory) // self.mesh["tensor"]
        working, kept = loss, layers_keep
        if config.remat.selects:
            working = max(loss, without_remat // a.num_hidden_layers)
            kept += self._named(rows)
        if LAYER_INPUT in config.remat.offloaded:
            kept -= (layers_keep * (a.num_hidden_layers - 1)) // a.num_hidden_layers
        return Live(kept, kept + working)

    def _named(self, rows: int) -> int:
        """Return the bytes that remat keeps on the device besides each layer's input."""
        names = [name for name in self.config.remat.saved if name != LAYER_INPUT]
        elements = kept_elements(self.form.architecture, names) // self.mesh["tensor"]
        tokens = rows * self.config.dataset.block_size
        layers = self.form.architecture.num_hidden_layers
        return tokens * elements * layers * self.dtype.itemsize

    def _layers(self, count: int) -> CausalLM:
        return self.form.with_layers(count).build(self.dtype)

    def _cache(self) -> int:
        generate, a = self.config.eval.generate, self.form.architecture
        if not (generate.enabled and self.config.holds_out):
            return 0
        rows = math.ceil(generate.batch_size / self.batch_shards)
        prompt = self.longest or self.config.dataset.block_size
        longest = prompt + generate.max_new_tokens
        slots = rows * min(longest, a.max_position_embeddings)
        heads = 2 * a.num_hidden_layers * a.num_key_value_heads * a.head_dim
        return slots * heads * self.dtype.itemsize // self.mesh["tensor"]
