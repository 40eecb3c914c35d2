"""The traffic and the operations that a training step needs, by formula.

Sizes of the model and the sharding go in, numbers of one chip and step come out. The report
compares them with the compiled program.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from torchprime.models.decoder import FUSED_OUTPUTS, NAMED_OUTPUTS

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """A parameter as the devices store it.

    Attributes:
        itemsize: bytes of an element.
        trained: it has a gradient and an optimizer state.
        pieces: the number of its shards along fsdp.
        shards: the number of its shards along all axes.
    """

    shape: Shape
    itemsize: int
    trained: bool
    pieces: int
    shards: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def kept(self) -> int:
        """The elements that a chip stores."""
        return self.size // self.shards

    @property
    def gathered(self) -> int:
        """The bytes of a chip's part once it is gathered along fsdp."""
        return self.kept * self.pieces * self.itemsize


@dataclass(frozen=True)
class Sizes:
    """The sizes of a step's parts, per chip where noted."""

    shapes: Mapping[str, Shape]  # of the model's weights without adapter, not quantized, by name
    weights: Mapping[str, Weight]  # as stored, by name
    fsdp: int  # devices along the axes
    tensor: int
    data: int
    weight_bytes: int  # of an element of activations and of weights that are not quantized
    windows: tuple[int | None, ...]  # of each layer's attention; None: none
    hidden: int
    ffn: int
    vocab: int
    heads: int
    kv_heads: int
    head_size: int
    tied: bool
    block_size: int
    rows: int  # blocks of a micro-batch on one chip
    accumulation: int
    loss_chunk: int  # tokens of a row whose logits exist at a time
    recomputed: tuple[str, ...]  # of the tensors that remat names
    norm_after: bool = False  # a norm follows the last product of a layer
    dora: bool = False
    dropout: bool = False

    @property
    def layers(self) -> int:
        return len(self.windows)

    @property
    def seen(self) -> float:
        """Twice the keys that the queries of one block see, causality and windows heeded; the mean
        of the layers."""
        limits = [min(window or self.block_size, self.block_size) for window in self.windows]
        return sum(limit * (2 * self.block_size - limit) for limit in limits) / len(limits)

    @property
    def tokens(self) -> int:
        """The slot tokens of one update on one chip (chips along tensor share them)."""
        return self.rows * self.accumulation * self.block_size

    def counts(self) -> tuple[int, int]:
        """Return the numbers of trained and of frozen parameters, the latter unquantized."""
        trained = {name for name, weight in self.weights.items() if weight.trained}
        frozen = (math.prod(s) for name, s in self.shapes.items() if name not in trained)
        return sum(weight.size for weight in self.trained()), sum(frozen)

    def trained(self) -> list[Weight]:
        """Return the weights that the step changes."""
        return [weight for weight in self.weights.values() if weight.trained]

    def frozen(self) -> list[Weight]:
        """Return the weights that an adapter leaves as they are."""
        return [weight for weight in self.weights.values() if not weight.trained]


def traffic_in_theory(s: Sizes) -> dict[str, int]:
    """Return the bytes of payload that the sharding needs in one step on one chip.

    FSDP gathers each weight as it is stored, for the forward and again for the backward, and
    reduces and scatters its gradient, for every micro-batch. A frozen weight has no gradient, and a
    frozen embedding or output weight is not needed in the backward. Gradients of adapter matrices
    that are whole on every chip are summed. Tensor parallelism sums hidden states after attention
    and MLP, forward and backward, and once more where that is recomputed: after the MLP only if a
    norm follows. Copies along data sum their parts of the gradients.
    """
    cut = {name: w for name, w in s.weights.items() if w.pieces > 1}
    once = sum(w.gathered for w in cut.values())
    again = sum(w.gathered for name, w in cut.items() if w.trained or ".layers." in name)
    gradients = sum(w.gathered for w in cut.values() if w.trained)
    whole = [w for w in s.trained() if w.pieces == 1 and len(w.shape) == 2]
    summed = s.trained() if s.data > 1 else whole if s.fsdp > 1 else []
    hidden = s.tokens * s.hidden * s.weight_bytes
    passes = 4 + ("attn_out" in s.recomputed) + (s.norm_after and bool(s.recomputed))
    sums = passes * s.layers * hidden if s.tensor > 1 else 0
    return {
        "all-gather": s.accumulation * (once + again),
        "reduce-scatter": s.accumulation * gradients,
        "all-reduce": sums + sum(w.kept * w.itemsize for w in summed),
    }


def products_in_theory(s: Sizes) -> int:
    """Return the operations of one chip in products with weights in one step, by formula.

    Each weight and token takes two forward, two for the gradient of the product's input, and two
    for the weight's own gradient if it is trained, and two more if remat recomputes it. A layer's
    last product is not needed again, unless a norm follows it. DoRA needs it for the gradient of
    its magnitude, and computes the norm of each merged weight once per pass and micro-batch.
    """
    per_token = sum(passes * size for size, passes in _products(s))
    return (per_token * s.tokens + _norms(s)) // s.tensor


def _products(s: Sizes) -> Iterator[tuple[int, int]]:
    """Yield, for each product with a weight, the weight's elements and the operations for each of
    them and each token."""
    whole = {name for name, weight in s.weights.items() if weight.trained}
    adapted = {name.partition(".lora_A.")[0] for name in s.weights if ".lora_A." in name}
    for name, shape in s.shapes.items():
        looked_up = name == "model.embed_tokens.weight" and not s.tied
        if len(shape) != 2 or looked_up:
            continue
        layer = name.removesuffix(".weight")
        again = ".layers." in name and _is_recomputed(s, layer)
        dora = s.dora and layer in adapted
        last = name.endswith(".down_proj.weight") and not (dora or s.norm_after)
        passes = 4 + 2 * (name in whole) + 2 * (again and not last)
        # With dropout, DoRA multiplies the base's weight by the dropped input too.
        yield math.prod(shape), passes * (2 if dora and s.dropout else 1)
    for name, weight in s.weights.items():
        if ".lora_A." in name or ".lora_B." in name:
            last = name.endswith(".down_proj.lora_B.weight") and not (s.dora or s.norm_after)
            layer = name.partition(".lora_")[0]
            yield weight.size, 6 + 2 * (not last and _is_recomputed(s, layer))


def _is_recomputed(s: Sizes, layer: str) -> bool:
    """Return True if the backward computes the output of this linear layer again; that of the last
    one follows the one before."""
    inside = layer.split(".layers.")[-1].partition(".")[2]
    if s.norm_after and inside == "mlp.down_proj":
        return bool(s.recomputed)
    both = (*NAMED_OUTPUTS.items(), *FUSED_OUTPUTS.items())
    names = {name for name, module in both if module == inside} or {"up"}
    return names <= set(s.recomputed)


def _norms(s: Sizes) -> int:
    """Return the operations of the products B A whose norms DoRA needs, of the whole model."""
    if not s.dora:
        return 0
    passes = 2 if s.recomputed else 1
    ranks = {
        name.partition(".lora_A.")[0]: weight.shape[0]
        for name, weight in s.weights.items()
        if ".lora_A." in name
    }
    sizes = (rank * math.prod(s.shapes[f"{layer}.weight"]) for layer, rank in ranks.items())
    return 2 * passes * s.accumulation * sum(sizes)


def kernel_flops(kernels: Collection[str], s: Sizes) -> dict[str, int]:
    """Return the operations of one call of each attention kernel on one chip: the causal half of a
    block within the window, segments not subtracted; the mean of layers that differ.

    A forward kernel has two products of the scores' size, a backward one five. jax's splash kernels
    can have two backward kernels instead, for the gradients of keys and values and for those of
    queries: both compute the scores and their gradients, and have four and three products.
    """
    half = round(s.rows * (s.heads // s.tensor) * s.head_size * s.seen)
    # "splash_mha_dq_segmented_block_q=..." and the like
    names = {name: name.split("_segmented")[0].split("_block")[0] for name in kernels}
    apart = any(name.endswith("_dq") for name in names.values())
    return {name: half * _kernel_products(short, apart) for name, short in names.items()}


def _kernel_products(name: str, apart: bool) -> int:
    if name.endswith("_dq"):
        return 3
    if "dkv" in name:
        return 4 if apart else 5
    return 5 if "splash_backward" in name else 2
