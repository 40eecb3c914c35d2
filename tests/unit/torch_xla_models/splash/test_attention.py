"""The splash core on a mesh of four devices, its kernels run by Pallas' interpreter."""

from __future__ import annotations

import pytest
import torch
import torch_xla
from torch import Tensor, nn

from torchprime.config.sections.remat import RematConfig
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.attention import ReferenceAttention
from torchprime.models.decoder import DecoderLayer, LayerContext
from torchprime.models.layer_kinds import LayerKind
from torchprime.torch_xla_models.layers.runner import LayerRunner
from torchprime.torch_xla_models.mesh import execute, make_mesh
from torchprime.torch_xla_models.splash.attention import Scores, SplashAttention
from torchprime.torch_xla_models.splash.calls import kv_repeats

B, H, S, h = 2, 4, 256, 64
# Two segments and padding; one whole row.
SEGMENTS = torch.tensor([[1] * 100 + [2] * 130 + [0] * 26, [1] * S], dtype=torch.int32)


def run(core: nn.Module, kv_heads: int, device: str) -> list[Tensor]:
    """Return the result and the gradients of q, k and v."""
    g = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(B, n, S, h, generator=g) for n in (H, kv_heads, kv_heads, H))
    leaves = [t.to(device).requires_grad_() for t in (q, k, v)]
    prepared = core.prepare(SEGMENTS.to(device))  # pyright: ignore
    with torch.no_grad():
        alone = core(*leaves, prepared)
    out = core(*leaves, prepared)
    found = torch.autograd.grad(out, leaves, grad.to(device))
    execute([alone, out, *found])
    assert torch.equal(alone.cpu(), out.detach().cpu())
    return [t.detach().cpu() for t in (out, *found)]


@pytest.mark.usefixtures("torchax")
@pytest.mark.parametrize(
    ("kv_heads", "window", "softcap", "by_jax"),
    [(2, None, None, False), (1, 40, 0.7, False), (2, 40, 0.7, True)],
)
def test_splash_is_the_reference_core(
    kv_heads: int, window: int | None, softcap: float | None, by_jax: bool
) -> None:
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 1, "tensor": 1})
    axes = ("data", "fsdp")
    scores = Scores(h, window, softcap)
    splash = SplashAttention(scores, mesh, axes, by_jax=by_jax, interpret=True)
    found = run(splash, kv_heads, "xla")
    for ours, expected in zip(
        found, run(ReferenceAttention(*scores), kv_heads, "cpu"), strict=True
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.usefixtures("torchax")
@pytest.mark.parametrize("policy", ["attention", "full"])
def test_the_forward_is_not_computed_again_if_its_results_are_kept(policy: str) -> None:
    """The program of a layer's gradients, whose weights and kept tensors are given."""
    mesh = make_mesh({"data": 1, "fsdp": 2, "tensor": 2}, {"data": 1, "fsdp": 1, "tensor": 1})
    sizes = {"hidden_size": H * h, "intermediate_size": 128, "vocab_size": 32, "head_dim": h}
    numbers = {"num_hidden_layers": 1, "num_attention_heads": H, "num_key_value_heads": 2}
    config = {"model_type": "llama", "max_position_embeddings": S, **sizes, **numbers}
    torch.manual_seed(0)
    layer = DecoderLayer(architecture_from_hf(config), LayerKind())
    splash = SplashAttention(Scores(h), mesh, ("data", "fsdp"), interpret=True)
    x, grad = torch.randn(2, B, S, H * h)
    cos, sin = torch.ones(1, 1, S, h // 2), torch.zeros(1, 1, S, h // 2)
    reference = ReferenceAttention(h)
    context = LayerContext(((cos, sin),), (reference.prepare(SEGMENTS),))
    wanted = torch.autograd.grad(layer(x, context), list(layer.parameters()), grad)

    layer.self_attn.core = splash
    layer.to("xla")
    remat = RematConfig(policy=policy)  # pyright: ignore
    runner = LayerRunner(layer, remat, lambda _, t: t, lambda _, t: t)
    context = LayerContext(((cos.to("xla"), sin.to("xla")),), (splash.prepare(SEGMENTS.to("xla")),))
    weights = [p.detach() for p in layer.parameters()]
    _, kept = runner.forward(x.to("xla"), weights, context)
    execute(kept)
    _, gradients = runner.backward(kept, weights, context, grad.to("xla"))
    program = torch_xla._XLAC._get_xla_tensors_hlo(gradients)  # pyright: ignore
    assert ("splash_forward" in program) == (policy == "full")
    assert "splash_backward" in program
    for ours, expected in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-4, atol=1e-4)


def test_prepare_finds_the_first_position_of_every_segment() -> None:
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 1}, {"data": 1, "fsdp": 1, "tensor": 1})
    splash = SplashAttention(Scores(h), mesh, ("data", "fsdp"))
    ids = torch.tensor([[1, 1, 2, 1, 0, 0]], dtype=torch.int32)
    prepared = splash.prepare(ids.to("xla")).cpu()
    assert prepared.tolist() == [[[1, 1, 2, 1, 0, 0], [0, 0, 2, 0, 4, 4]]]
    assert prepared.dtype == torch.int32


@pytest.mark.parametrize(
    ("heads", "kv_heads", "shards"), [(32, 8, 1), (32, 8, 16), (12, 3, 2), (28, 4, 28), (8, 1, 8)]
)
def test_kv_heads_are_repeated_no_more_than_a_cut_needs(
    heads: int, kv_heads: int, shards: int
) -> None:
    repeats = kv_repeats(heads, kv_heads, shards)
    fits = [r for r in range(1, heads // kv_heads + 1) if (heads // kv_heads) % r == 0]
    assert repeats == min(r for r in fits if kv_heads * r % shards == 0)
