"""The splash path without a TPU: our wrapper around the real kernel in Pallas' interpreter.

torch_xla's call into the kernel needs a TPU. The test puts in its place the same jax kernel, built
from the config that our module hands over exactly as torch_xla builds it, and run by the
interpreter; what is compared with the reference core is then scale, kv repetition, segment ids
(padding too) and window.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from torchprime.errors import ConfigError
from torchprime.models.attention import ReferenceAttention
from torchprime.torch_xla_models import attention
from torchprime.torch_xla_models.mesh import make_mesh

B, H, K, S, h = 1, 2, 1, 256, 128


def _interpreted(q, k, v, config: str, segments, causal: bool, soft_cap) -> torch.Tensor:
    """torch_xla's splash_attention_jax_wrapper without its mesh, under the interpreter."""
    settings = json.loads(config)
    mask = splash_attention_mask.CausalMask(shape=(S, S))
    if settings["attentiontype_local_sliding"]:
        size = settings["slide_window_size"]
        mask &= splash_attention_mask.LocalMask(shape=(S, S), window_size=(size, size), offset=0)
    kernel = splash_attention_kernel.make_splash_mha(
        mask=splash_attention_mask.MultiHeadMask(masks=(mask,) * q.shape[1]),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=min(settings["sa_block_q"], S),
            block_kv=min(settings["sa_block_kv"], S),
            block_kv_compute=min(settings["sa_block_kv_compute"], S),
        ),
        interpret=True,
    )
    arrays = [jnp.asarray(t.numpy()) for t in (q, k, v)]
    ids = jnp.asarray(segments.numpy())
    pair = splash_attention_kernel.SegmentIds(ids, ids)
    assert causal and soft_cap is None
    with jax.default_device(jax.devices("cpu")[0]):
        out = jax.vmap(kernel)(*arrays, segment_ids=pair)
    return torch.from_numpy(np.array(out))


@pytest.mark.parametrize("window", [None, 40])
def test_splash_is_the_reference_core(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "splash_attention", _interpreted)
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 1}, {"data": 1, "fsdp": 1, "tensor": 1})
    g = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, S, h, generator=g)
    k, v = (torch.randn(B, K, S, h, generator=g) for _ in range(2))
    segments = torch.tensor([[1] * 100 + [2] * 130 + [0] * 26], dtype=torch.int32)
    splash = attention.SplashAttention(h, window, mesh, ("data", "fsdp"))
    ours = splash(q, k, v, splash.prepare(segments))
    core = ReferenceAttention(h, window)
    expected = core(q, k, v, core.prepare(segments))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("length", range(128, 8193, 128))
def test_blocks_divide_every_sequence_that_auto_accepts(length: int) -> None:
    """The kernel refuses blocks that don't divide the sequence, or tiles off 128."""
    block, compute = attention.kernel_blocks(length)
    assert length % block == 0 and block % compute == 0 and compute % 128 == 0
    assert block <= 1024 and compute <= 512


def test_kernel_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention.choose_kernel("auto", 1024) == ("reference", "auto on CPU")
    monkeypatch.setattr(attention.xr, "device_type", lambda: "TPU")
    assert attention.choose_kernel("auto", 1024)[0] == "splash"
    assert attention.choose_kernel("auto", 1000)[0] == "reference"
    with pytest.raises(ConfigError, match="dataset.block_size=1000 is not a multiple"):
        attention.choose_kernel("splash", 1000)


def test_the_kernels_config_names_the_batch_and_head_axes() -> None:
    mesh = make_mesh({"data": 2, "fsdp": 1, "tensor": 2}, {"data": 1, "fsdp": 1, "tensor": 1})
    config = json.loads(attention.SplashAttention(h, None, mesh, ("data", "fsdp")).config(S))
    assert config["qkv_partition_spec"] == [["data", "fsdp"], "tensor", None, None]
    assert config["segment_ids_partition_spec"] == [["data", "fsdp"], None]
    assert config["attentiontype_local_sliding"] is False
