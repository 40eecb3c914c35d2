"""Traffic and operations against numbers worked out by hand, for Llama 3 8B on 8 chips."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import transformers
from tiny_families import FAMILIES as TINY
from tiny_families import SIZES
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from torchprime.compiling.sizes import step_sizes
from torchprime.compiling.theory import (
    Sizes,
    Weight,
    kernel_flops,
    products_in_theory,
    traffic_in_theory,
)
from torchprime.config.compose import compose_config
from torchprime.losses.chunks import Projection
from torchprime.losses.cross_entropy import chunked_cross_entropy
from torchprime.models.architecture import Architecture, architecture_from_hf
from torchprime.models.checkpointing import checkpoint_layers
from torchprime.models.decoder import NAMED_OUTPUTS, CausalLM, replace_attention_cores
from torchprime.training.setup.model_files import find_architecture

NAMED = ["--config-name", "llama-3-8b-sft-w-gsm8k"]
DOWN = 4096 * 14336
LAYER = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * DOWN
HEAD = 128256 * 4096
# Inputs and outputs of a layer's seven products, times rank 16.
LORA = 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
# The matrices that fsdp cuts: all A but down_proj's, which has the inputs of tensor, and its B.
LORA_CUT = 16 * 7 * 4096


def sizes_of(*argv: str) -> Sizes:
    config = compose_config([*NAMED, *argv])
    found, _ = find_architecture(
        pretrained_model=config.model.pretrained_model, architecture=None, cache_dir=None
    )
    return step_sizes(config, architecture_from_hf(found))


@pytest.fixture(scope="module")
def sizes() -> Sizes:
    return sizes_of()


@pytest.fixture(scope="module")
def lora() -> Sizes:
    return sizes_of("adapter=lora")


@pytest.fixture(scope="module")
def qlora() -> Sizes:
    return sizes_of("adapter=qlora")


def test_sizes_of_the_named_run(sizes: Sizes) -> None:
    assert sizes.tokens == 8 * 1024  # 64 blocks on 8 chips
    assert sizes.weights["lm_head.weight"].pieces == 8
    assert sizes.weights["model.norm.weight"].pieces == 1
    assert sizes.counts() == (8_030_261_248, 0)


def test_products_of_the_named_run(sizes: Sizes) -> None:
    """4.52e14 by hand, and what the compiler's program had: 4.5243e14."""
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    head = 128256 * 4096
    by_hand = 8192 * (6 * (32 * layer + head) + 2 * 32 * (layer - 4096 * 14336))
    assert products_in_theory(sizes) == by_hand == pytest.approx(4.5243e14, rel=1e-4)
    kept = dataclasses.replace(sizes, recomputed=())
    assert products_in_theory(kept) == 8192 * 6 * (32 * layer + head)
    # With remat.policy=attention only the two wide products of the MLP are computed again.
    attention = sizes_of("remat.policy=attention")
    assert attention.recomputed == ("gate", "up")
    more = 8192 * 2 * 32 * 2 * 4096 * 14336
    assert products_in_theory(attention) == products_in_theory(kept) + more


def test_traffic_of_fsdp(sizes: Sizes) -> None:
    theory = traffic_in_theory(sizes)
    matrices = 2 * (8_030_261_248 - 65 * 4096)  # bf16, without the norms
    assert theory == {"all-gather": 2 * matrices, "reduce-scatter": matrices, "all-reduce": 0}
    four = traffic_in_theory(dataclasses.replace(sizes, accumulation=4, rows=2))
    assert four["all-gather"] == 8 * matrices and four["reduce-scatter"] == 4 * matrices


def test_traffic_of_tensor_parallelism() -> None:
    sizes = sizes_of("ici_mesh.fsdp=2", "ici_mesh.tensor=4")
    theory = traffic_in_theory(sizes)
    assert theory["all-gather"] == 2 * 2 * (8_030_261_248 - 65 * 4096) // 4
    assert theory["all-reduce"] == 5 * 32 * (32 * 1024) * 4096 * 2
    kept = sizes_of("ici_mesh.fsdp=2", "ici_mesh.tensor=4", "remat.policy=attention")
    assert traffic_in_theory(kept)["all-reduce"] == 4 * 32 * (32 * 1024) * 4096 * 2


def test_counts_of_an_adapter(lora: Sizes, qlora: Sizes) -> None:
    assert lora.counts() == qlora.counts() == (32 * LORA, 8_030_261_248)
    whole = sizes_of("adapter=lora", "adapter.modules_to_train=[lm_head]")
    assert whole.counts() == (32 * LORA + HEAD, 8_030_261_248 - HEAD)


def test_frozen_weights_have_no_gradient_products(lora: Sizes, qlora: Sizes) -> None:
    """Two operations forward, two for the input's gradient, two again but for a layer's last."""
    frozen = 4 * (32 * LAYER + HEAD) + 2 * 32 * (LAYER - DOWN)
    trained = 32 * (6 * LORA + 2 * (LORA - 16 * 4096))
    assert products_in_theory(lora) == 8192 * (frozen + trained)
    assert products_in_theory(qlora) == products_in_theory(lora)
    kept = dataclasses.replace(lora, recomputed=())
    assert products_in_theory(kept) == 8192 * (4 * (32 * LAYER + HEAD) + 32 * 6 * LORA)
    whole = sizes_of("adapter=lora", "adapter.modules_to_train=[lm_head]")
    assert products_in_theory(whole) - products_in_theory(lora) == 8192 * 2 * HEAD


def test_products_of_dora() -> None:
    """The magnitude's gradient needs the last product too; the norms are of W + B A, twice."""
    frozen = 4 * (32 * LAYER + HEAD) + 2 * 32 * LAYER
    norms = 2 * 2 * 16 * 32 * LAYER
    dora = sizes_of("adapter=dora")
    assert products_in_theory(dora) == 8192 * (frozen + 32 * 8 * LORA) + norms
    dropped = dataclasses.replace(dora, dropout=True)
    assert products_in_theory(dropped) - products_in_theory(dora) == 8192 * 32 * 6 * LAYER


def test_traffic_of_an_adapter(lora: Sizes) -> None:
    """Frozen weights are gathered twice, outside the layers once, and reduced never."""
    assert traffic_in_theory(lora) == {
        "all-gather": 2 * (2 * 32 * (LAYER + LORA_CUT) + 2 * HEAD),
        "reduce-scatter": 2 * 32 * LORA_CUT,
        "all-reduce": 2 * 32 * (LORA - LORA_CUT),
    }
    copies = sizes_of("adapter=lora", "ici_mesh.data=2", "ici_mesh.fsdp=4")
    reduced = traffic_in_theory(copies)["all-reduce"]
    assert reduced == 2 * 32 * (LORA - LORA_CUT + LORA_CUT // 4)


def test_a_quantized_base_is_gathered_in_four_bits(lora: Sizes, qlora: Sizes) -> None:
    """Half a byte a weight, and a byte for the scale of 64."""
    stored = 32 * (LAYER // 2 + LAYER // 64)
    expected = 2 * stored + 2 * (2 * 32 * LORA_CUT + 2 * HEAD)
    theory = traffic_in_theory(qlora)
    assert theory["all-gather"] == expected
    assert theory["reduce-scatter"] == traffic_in_theory(lora)["reduce-scatter"]


def test_kernels_count_the_causal_half(sizes: Sizes) -> None:
    # Forward q k' and p v over half of 1024 x 1024, for 8 rows and 32 heads of 128; backward five.
    half = 2 * 8 * 32 * 128 * 1024 * 1024 // 2
    ours = ["vmap_splash_forward_", "vmap_splash_backward_"]
    jaxs = ["splash_mha_fwd_segmented_residuals_block", "splash_mha_dkv_segmented_block"]
    for kernels in (ours, jaxs):
        assert kernel_flops(kernels, sizes) == dict(zip(kernels, (2 * half, 5 * half), strict=True))
    # jax's two backward kernels compute the scores and their gradients twice.
    apart = ["splash_mha_dkv_segmented_block", "splash_mha_dq_segmented_block"]
    assert kernel_flops(apart, sizes) == dict(zip(apart, (4 * half, 3 * half), strict=True))


def test_kernels_count_the_window(sizes: Sizes) -> None:
    """Of 1024 keys a query sees 256 at most: 1 + 2 + ... + 256, then 256 each, halves left out."""
    windowed = dataclasses.replace(sizes, windows=(256, 256, 256, None))
    keys = (3 * (256 * 256 / 2 + 768 * 256) + 1024 * 1024 / 2) / 4
    found = kernel_flops(["vmap_splash_forward_"], windowed)
    assert found == {"vmap_splash_forward_": 2 * 2 * 8 * 32 * 128 * keys}


class NoProducts(nn.Module):
    """An attention core whose products are not counted."""

    window = None

    def prepare(self, segment_ids: Tensor) -> Tensor:
        return segment_ids

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Tensor) -> Tensor:
        groups = q.shape[1] // k.shape[1]
        return q * (k * v).repeat_interleave(groups, dim=1)


def tiny_sizes(a: Architecture, model: CausalLM, recomputed: tuple[str, ...]) -> Sizes:
    weights = dict(model.named_parameters())
    return Sizes(
        shapes={n: tuple(p.shape) for n, p in weights.items()},
        weights={n: Weight(tuple(p.shape), 4, True, 1, 1) for n, p in weights.items()},
        fsdp=1, tensor=1, data=1, weight_bytes=4, windows=tuple(k.window for k in a.layers),
        hidden=a.hidden_size, ffn=a.intermediate_size, vocab=a.vocab_size,
        heads=a.num_attention_heads, kv_heads=a.num_key_value_heads, head_size=a.head_dim,
        tied=a.tie_word_embeddings, block_size=8, rows=2, accumulation=1, loss_chunk=8,
        recomputed=recomputed, norm_after=a.norms != "pre",
    )  # fmt: skip


@pytest.mark.parametrize("saved", [None, (), ("q", "k", "v"), ("attn_out", "gate", "up")])
@pytest.mark.parametrize("family", ["llama_tied", "phi3", "glm4", "gemma3", "olmo2", "granite"])
def test_products_of_a_family_are_those_that_torch_counts(
    family: str, saved: tuple[str, ...] | None
) -> None:
    """Fused projections, and norms behind a layer's last product, which remat then repeats."""
    name, switches = TINY[family]
    config = getattr(transformers, f"{name}ForCausalLM").config_class(**{**SIZES, **switches})
    a = architecture_from_hf(config.to_dict())
    model = CausalLM(a)
    replace_attention_cores(model, lambda *_: NoProducts())
    if saved is not None:
        checkpoint_layers(list(model.model.layers.children()), saved)
    # The gradient of the looked-up rows is computed in every real step too.
    ids = torch.arange(16).view(2, 8).to(torch.int32)
    with FlopCounterMode(display=False) as counter:
        hidden = model(ids, ids % 8, torch.ones_like(ids))
        loss = chunked_cross_entropy(hidden, Projection(*model.output), ids, torch.ones(2, 8), 1)
        loss.loss_sum.backward()
    recomputed = () if saved is None else tuple(n for n in NAMED_OUTPUTS if n not in saved)
    assert products_in_theory(tiny_sizes(a, model, recomputed)) == counter.get_total_flops()
