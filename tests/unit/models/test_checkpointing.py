"""Layers that keep named outputs: the same numbers, the bytes of the names, and nothing twice."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchprime.adapters.apply import apply_adapter
from torchprime.adapters.spec import AdapterSpec
from torchprime.config.sections.remat import NAMES, POLICIES
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.checkpointing import checkpoint_layers
from torchprime.models.decoder import CausalLM, replace_attention_cores
from torchprime.training.setup.activations import Shape, kept_bytes
from torchprime.training.setup.plan import kept_elements

LAYERS, ROWS, SIZE = 2, 2, 32
SHAPE = {
    "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 50,
    "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "tie_word_embeddings": False,
}  # fmt: skip
ARCHITECTURE = architecture_from_hf(SHAPE)
KINDS = {
    "qwen3": None,
    "dora on one layer": AdapterSpec(rank=4, alpha=8, dora=True, layers=(1,)),
    "nf4": AdapterSpec(rank=4, alpha=8, base_type="nf4"),
}
# Matrix products that each name's absence costs a layer, as the layer computes them again.
OWN = {"q": 1, "k": 1, "v": 1, "core_out": 1, "attn_out": 1, "gate": 1, "up": 1}


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ in ("mm", "addmm", "bmm")
        return func(*args, **(kwargs or {}))


def make_model(kind: str = "qwen3") -> CausalLM:
    torch.manual_seed(0)
    model = CausalLM(ARCHITECTURE)
    spec = KINDS[kind]
    if spec is not None:
        apply_adapter(model, spec)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.normal_(0.0, 0.1)
    return model


def run(
    model: CausalLM, names: Sequence[str] | None, compiler: str | None = None
) -> tuple[list[Tensor], int]:
    """The hidden states and all gradients, and the matrix products of the backward pass."""
    model = copy.deepcopy(model)
    layers = list(model.model.layers.children())
    if names is not None:
        checkpoint_layers(layers, names)
    if compiler:
        for layer in layers:
            layer.compile(backend=compiler)
    segments = torch.ones(ROWS, SIZE, dtype=torch.int32)
    segments[:, 20:] = 2
    ids = torch.arange(ROWS * SIZE).view(ROWS, SIZE) % 50
    hidden = model(ids, ids % SIZE, segments)
    with Products() as products:
        (hidden * torch.linspace(-1, 1, 32)).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [hidden, *gradients], products.count


def same(a: Sequence[Tensor], b: Sequence[Tensor], compiler: str | None) -> bool:
    """Bit by bit in eager mode; a compiled graph may add gradients in another order."""
    equal = torch.equal if compiler is None else partial(torch.allclose, rtol=1e-5, atol=1e-5)
    return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_names_cost_their_products_and_change_no_bit(compiler: str | None) -> None:
    model = make_model()
    everything, least = run(model, None, compiler)
    for names in [*(POLICIES[policy][1:] for policy in ("minimal", "attention", "full")), ("up",)]:
        found, products = run(model, names, compiler)
        assert same(found, everything, compiler)
        # The scores are computed again without a name; the last product is no longer needed.
        missing = [name for name in OWN if name not in names]
        assert products == least + LAYERS * (1 + len(missing)), names


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "qwen3"])
@pytest.mark.parametrize("compiler", [None, pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_an_adapter_s_frozen_products_are_kept(kind: str, compiler: str | None) -> None:
    model = make_model(kind)
    everything, _ = run(model, None, compiler)
    full, most = run(model, (), compiler)
    found, products = run(model, NAMES[1:], compiler)
    assert same(found, everything, compiler) and same(full, everything, compiler)
    # Frozen layers below the first adapter have no backward pass.
    assert products == most - (LAYERS if kind == "nf4" else 1) * len(OWN)


def test_a_fused_projection_is_kept_if_one_of_its_outputs_is() -> None:
    torch.manual_seed(0)
    model = CausalLM(architecture_from_hf({**SHAPE, "model_type": "phi3"}))
    everything, least = run(model, None)
    found, products = run(model, ("k", "up"))
    assert same(found, everything, None)
    # Attention's two products and its projection are computed again.
    assert products == least + LAYERS * 3


class Kernel(nn.Module):
    """A core whose work is one operation with two results, as flash attention has."""

    window = None

    def __init__(self) -> None:
        super().__init__()

    def prepare(self, segment_ids: Tensor) -> Tensor:
        return segment_ids

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Tensor) -> Tensor:
        return _Attend.apply(q, k, v)  # pyright: ignore[reportReturnType]


calls: Counter[str] = Counter()


@torch.library.custom_op("torchprime_test::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    calls["forward"] += 1
    return q + v.repeat(1, 2, 1, 1), q.sum(-1)


attend.register_fake(lambda q, k, v: (torch.empty_like(q), q.new_empty(q.shape[:-1])))


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, total = attend(q, k, v)
        ctx.save_for_backward(out, total)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        out, total = ctx.saved_tensors
        grad = grad * out + total[..., None]
        return grad, None, grad.unflatten(1, (2, 2)).sum(1)


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_a_fused_kernel_runs_once_if_its_result_is_kept(compiler: str | None) -> None:
    model = make_model()
    replace_attention_cores(model, lambda *_: Kernel())
    everything, _ = run(model, None, compiler)
    for names, times in (((), 2), (("core_out",), 1)):
        calls.clear()
        found, _ = run(model, names, compiler)
        assert same(found, everything, compiler)
        assert calls["forward"] == times * LAYERS


@pytest.mark.parametrize("names", [(), ("core_out",), ("q", "k", "v"), ("gate",), NAMES[1:]])
def test_the_bytes_kept_are_those_of_the_names(names: tuple[str, ...]) -> None:
    def build(layers: int) -> CausalLM:
        return CausalLM(ARCHITECTURE.with_layers(layers))

    shape = Shape(ROWS, SIZE, 1)
    one, two = (kept_bytes(build, number, shape, core="kernel", names=names) for number in (1, 2))
    log_sum_exp = ARCHITECTURE.num_attention_heads if "core_out" in names else 0
    each = kept_elements(ARCHITECTURE, ("layer_input", *names)) + log_sum_exp
    assert two - one == ROWS * SIZE * 4 * each


def test_nothing_is_kept_without_gradients() -> None:
    model = make_model()
    checkpoint_layers(list(model.model.layers.children()), NAMES[1:])
    ids = torch.zeros(1, 4, dtype=torch.int32)
    with torch.no_grad():
        hidden = model(ids, ids, ids)
    assert not hidden.requires_grad
