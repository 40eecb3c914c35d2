"""A plain PyTorch loop that trains an adapter, to compare the XLA backend with.

The decoder and the adapters are our modules, tested against transformers and PEFT elsewhere. The
loss is plain cross-entropy over full logits, clipping and AdamW are torch's.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import reference
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig

from torchprime.adapters.apply import apply_adapter, trainable
from torchprime.adapters.axes import adapter_patterns
from torchprime.adapters.dropout import set_position
from torchprime.adapters.quantized import quantize_base
from torchprime.adapters.spec import AdapterSpec
from torchprime.config.compose import compose_config
from torchprime.config.schema import AXES
from torchprime.config.sections.remat import RematConfig
from torchprime.counter_bits import Position
from torchprime.data.blocks.batch import Batch
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM
from torchprime.sharding import ShardingTable
from torchprime.torch_xla_models.backend import XlaBackend
from torchprime.training.backend import ResumedState, StepNumbers, StepOptions
from torchprime.training.optim.adamw import AdamW
from torchprime.training.regularization.near_base import Kl

STEPS, SEED, EPS = 10, 20_261_130, 1e-3
LR = 1e-2

# Inputs of every matrix are whole NF4 blocks on a mesh of fsdp=2 x tensor=2, whose o_proj has four.
CONFIG = LlamaConfig(
    vocab_size=reference.V,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    attention_bias=True,
    tie_word_embeddings=False,
)


@dataclass
class Way:
    """An adapter, and a mesh and a form of the step that train it.

    Attributes:
        cut_further: B is cut along fsdp, too, as if its rank were large.
    """

    mesh: dict[str, int]
    spec: AdapterSpec
    accumulation: int = 1
    more: dict[str, Any] = field(default_factory=dict)
    cut_further: bool = False
    kl: Kl | None = None

    def groups(self, table: ShardingTable):
        """Return the shards along the inputs of a layer, by its name."""

        def of(name: str) -> int:
            spec = table.find(table.parameters, f"{name}.weight")
            assert spec is not None
            count = 1
            for axis in spec[1]:
                count *= self.mesh.get(axis, 1)
            return count

        return of


_SCAN = RematConfig(policy="full", scan_layers=True)
_FEW = ("q_proj", "down_proj")  # a mask's operations take long to compile

WAYS = {
    "dropout-scan-remat-accumulate2": Way(
        {"fsdp": 4},
        AdapterSpec(rank=4, alpha=8, dropout=0.1, targets=_FEW),
        accumulation=2,
        more={"remat": _SCAN},
    ),
    "nf4-dora-scan-tensor": Way(
        {"fsdp": 2, "tensor": 2},
        AdapterSpec(rank=4, alpha=8, dora=True, targets=_FEW, base_type="nf4"),
        more={"remat": RematConfig(scan_layers=True)},
    ),
    "kl-dropout-scan-accumulate2": Way(
        {"fsdp": 2, "tensor": 2},
        AdapterSpec(rank=4, alpha=8, dropout=0.1, targets=_FEW),
        accumulation=2,
        more={"remat": RematConfig(scan_layers=True)},
        kl=Kl(reference.COEFFICIENT, "all"),
    ),
    "kl-nf4-remat": Way(
        {"data": 2, "fsdp": 2},
        AdapterSpec(rank=4, alpha=8, targets=_FEW, base_type="nf4"),
        more={"remat": RematConfig(policy="full")},
        kl=Kl(reference.COEFFICIENT, "supervised"),
    ),
    "nf4-dora-tensor": Way(
        {"fsdp": 2, "tensor": 2}, AdapterSpec(rank=4, alpha=8, dora=True, base_type="nf4")
    ),
    "rslora-whole-modules": Way(
        {"fsdp": 4},
        AdapterSpec(
            rank=4, alpha=4, scaling="rslora", modules_to_train=("lm_head", "input_layernorm")
        ),
        cut_further=True,
    ),
    "lora-barrier": Way(
        {"fsdp": 4},
        AdapterSpec(rank=4, alpha=8, targets=_FEW),
        more={"remat": RematConfig(optimization_barrier=True)},
    ),
    "lora-scan-tensor": Way(
        {"fsdp": 2, "tensor": 2},
        AdapterSpec(rank=4, alpha=8),
        more={"remat": RematConfig(scan_layers=True)},
        cut_further=True,
    ),
    "int8-dora-dropout-accumulate2": Way(
        {"data": 2, "fsdp": 2},
        AdapterSpec(rank=4, alpha=8, dora=True, dropout=0.1, base_type="int8"),
        accumulation=2,
    ),
    "nf4-scan-remat-accumulate2": Way(
        {"data": 2, "fsdp": 2},
        AdapterSpec(rank=4, alpha=8, base_type="nf4"),
        accumulation=2,
        more={"remat": _SCAN},
    ),
    "nf4-remat": Way(
        {"data": 2, "fsdp": 2},
        AdapterSpec(rank=4, alpha=8, targets=_FEW, base_type="nf4"),
        more={"remat": RematConfig(policy="full")},
    ),
    "some-layers-remat-barrier": Way(
        {"fsdp": 4},
        AdapterSpec(rank=4, alpha=8, dropout=0.1, layers=(1,), modules_to_train=("embed_tokens",)),
        more={"remat": RematConfig(policy="full", optimization_barrier=True)},
    ),
}


def make_model(way: Way, table: ShardingTable) -> CausalLM:
    """The adapted model with random weights, also in B, large enough for every one to matter."""
    model = CausalLM(architecture_from_hf(CONFIG.to_dict()))
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0.0, 0.1)
    apply_adapter(model, way.spec)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.uniform_(0.9, 1.5)
        elif "lora_" in name and parameter.is_floating_point():
            parameter.data.normal_(0.0, 0.1)
    quantize_base(model, way.spec.base_type, way.groups(table))
    return model


def logits_of(model: CausalLM, batch: Batch) -> Tensor:
    ids, positions, segments = map(
        torch.from_numpy, (batch.input_ids, batch.position_ids, batch.segment_ids)
    )
    return model.logits(ids.long(), positions.long(), segments)


def base_of(model: CausalLM) -> CausalLM:
    """The model with B = 0: what it computes without its adapter."""
    base = copy.deepcopy(model)
    for name, parameter in base.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    return base


def divergence_of(model: CausalLM, base: CausalLM, batch: Batch, kl: Kl) -> Tensor:
    with torch.no_grad():
        of_base = logits_of(base, batch)
    return kl.coefficient * reference.divergence_of(logits_of(model, batch), of_base, batch, kl.on)


def loss_of(model: CausalLM, batch: Batch) -> Tensor:
    logits = logits_of(model, batch)
    targets = torch.from_numpy(batch.targets).long().flatten()
    nll = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
    weights = torch.from_numpy(batch.loss_weights).flatten()
    return (nll * weights).sum() / weights.sum()


def train(model: CausalLM, dropout: bool, kl: Kl | None = None) -> dict[str, list[float]]:
    """Train the model in place; return the losses and gradient norms of each step."""
    trained, base = trainable(model), base_of(model)
    decayed = [p for n, p in trained.items() if "norm" not in n and not n.endswith("bias")]
    plain = [p for n, p in trained.items() if "norm" in n or n.endswith("bias")]
    groups = [
        {"params": decayed, "weight_decay": reference.DECAY},
        {"params": plain, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, eps=EPS)
    tokens = torch.arange(reference.B * reference.S, dtype=torch.int32)
    numbers: dict[str, list[float]] = {"losses": [], "norms": []}
    for step in range(STEPS):
        if dropout:
            seed, done = (torch.tensor(value, dtype=torch.int32) for value in (SEED, step))
            position = Position(seed, done, tokens.view(reference.B, reference.S))
            set_position(model, position)
        loss = loss_of(model, reference.make_batch(step))
        if kl is not None:
            loss = loss + divergence_of(model, base, reference.make_batch(step), kl)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), reference.CLIP)
        numbers["losses"].append(loss.item())
        numbers["norms"].append(norm.item())
        optimizer.step()
    set_position(model, None)
    return numbers


def make_backend(
    way: Way,
    start: dict[str, Tensor],
    shipped: ShardingTable,
    resumed: ResumedState | None = None,
) -> XlaBackend:
    """A backend that is ready to train the adapted model from these weights."""
    sizes = {axis: way.mesh.get(axis, 1) for axis in AXES}
    backend = XlaBackend(sizes, dict.fromkeys(AXES, 1), **way.more)
    model, table = storage_less(way, shipped)
    backend.place(model, table, lambda name: start[name], torch.float32)
    options = step_options(way)
    backend.prepare_training(AdamW(eps=EPS, weight_decay=reference.DECAY), options, resumed)
    return backend


def storage_less(way: Way, shipped: ShardingTable) -> tuple[CausalLM, ShardingTable]:
    """Return the adapted model on meta, and the table of its parameters."""
    with torch.device("meta"):
        model = CausalLM(architecture_from_hf(CONFIG.to_dict()))
    apply_adapter(model, way.spec)
    quantize_base(model, way.spec.base_type, way.groups(shipped))
    axes = shipped.batch_axes() if way.cut_further else ()
    patterns = adapter_patterns(shipped.parameters, axes)
    return model, ShardingTable(patterns, shipped.activations, 10**6)


def step_options(way: Way) -> StepOptions:
    return StepOptions(
        gradient_accumulation_steps=way.accumulation,
        loss_chunks=3,
        max_grad_norm=reference.CLIP,
        random_seed=SEED if way.spec.dropout else None,
        loss_terms=() if way.kl is None else ("kl",),
        kl=way.kl,
    )


class Trained(NamedTuple):
    """The same training by plain PyTorch and on a backend."""

    plain: CausalLM
    expected: dict[str, list[float]]
    start: dict[str, Tensor]
    backend: XlaBackend
    numbers: list[StepNumbers]
    compiles: list[int]  # of each step


def train_both(way: Way, shipped: ShardingTable) -> Trained:
    plain = make_model(way, shipped)
    start = {n: p.detach().clone() for n, p in plain.named_parameters()}
    # First, as autograd looks for devices once in a process, at its first backward.
    backend = make_backend(way, start, shipped)
    expected = train(plain, way.spec.dropout > 0, way.kl)
    numbers, compiles = [], []
    for step in range(STEPS):
        before = backend.compiles()
        numbers += run(backend, way, range(step, step + 1))
        compiles.append(backend.compiles() - before)
    return Trained(plain, expected, start, backend, numbers, compiles)


def run(backend: XlaBackend, way: Way, steps: range) -> list[StepNumbers]:
    batches = (backend.put(reference.make_batch(step), way.accumulation) for step in steps)
    return [backend.read(backend.train_step(batch, LR)) for batch in batches]


def whole(backend: XlaBackend) -> dict[str, Tensor]:
    """Return a checkpoint's tensors, put together from their shards."""
    found: dict[str, Tensor] = {}
    for shards in backend.checkpoint_tensors():
        tensor = found[shards.name] = torch.full(shards.shape, torch.nan, dtype=shards.dtype)
        for (offsets, sizes), chunk in zip(shards.chunks, shards.read(), strict=True):
            tensor[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] = chunk
    return found


def greedy(model: CausalLM, prompt: list[int], count: int) -> list[int]:
    """Return so many tokens, each the likeliest after all before it; no cache."""
    ids = list(prompt)
    for _ in range(count):
        given = torch.tensor([ids])
        with torch.no_grad():
            logits = model.logits(given, torch.arange(len(ids))[None], torch.ones_like(given))
        ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


def shipped_table() -> ShardingTable:
    config = compose_config(["model.pretrained_model=x", "task.max_steps=1"])
    return ShardingTable(config.sharding.parameters, config.sharding.activations, 100)


def check_one_device() -> None:
    """Train on one device with dropout, scan and NF4, and compare with plain PyTorch."""
    spec = AdapterSpec(rank=4, alpha=8, dropout=0.1, targets=_FEW, base_type="nf4")
    done = train_both(Way({}, spec, more={"remat": _SCAN}), shipped_table())
    losses = torch.tensor([n.loss for n in done.numbers])
    torch.testing.assert_close(losses, torch.tensor(done.expected["losses"]), rtol=1e-5, atol=0)
    ours = dict(done.backend.weights())
    for name, weight in trainable(done.plain).items():
        torch.testing.assert_close(ours[name], weight.detach(), rtol=1e-5, atol=1e-5)


def one_step(name: str) -> None:
    """Train one step."""
    way, table = WAYS[name], shipped_table()
    start = {n: p.detach() for n, p in make_model(way, table).named_parameters()}
    backend = make_backend(way, start, table)
    run(backend, way, range(1))
