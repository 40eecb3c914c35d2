"""Remat on the native backend: the same bits on several processes, and inputs in host memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import ForkServer

from torchprime.config.sections.remat import RematConfig
from torchprime.errors import ConfigError
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM
from torchprime.torch_native import remat as module
from torchprime.torch_native.remat import apply_remat, check_remat

WORKER = Path(__file__).parent / "remat_worker.py"
NAMED: dict[str, dict[str, Any]] = {
    "none": {},
    "minimal": {"policy": "minimal"},
    "attention": {"policy": "attention", "recompute": ["q"]},
    "full": {"policy": "full", "save": ["core_out"]},
}
WAYS = {
    "fsdp2": {"mesh": {"fsdp": 2}, "remat": NAMED},
    "tensor2": {"mesh": {"tensor": 2}, "remat": NAMED},
    "fsdp2-compiled": {"mesh": {"fsdp": 2}, "remat": NAMED, "compiler": "aot_eager"},
    "tensor2-compiled": {"mesh": {"tensor": 2}, "remat": NAMED, "compiler": "aot_eager"},
}
SLOW = {"fsdp2-compiled", "tensor2-compiled"}


@pytest.mark.parametrize(
    "way", [pytest.param(w, marks=[pytest.mark.slow] if w in SLOW else []) for w in WAYS]
)
def test_two_processes_train_the_same(way: str, fork_server: ForkServer, tmp_path: Path) -> None:
    out = tmp_path / "found.pt"
    ranks = fork_server.group(2, WORKER, str(out), json.dumps(WAYS[way]))
    for ended in [rank.end(200) for rank in ranks]:
        assert ended.code == 0, ended.printed[-3000:]
    found = torch.load(out, weights_only=True)
    for name in NAMED:
        for key, value in found["none"].items():
            if "compiler" in WAYS[way]:  # a compiled graph may add gradients in another order
                torch.testing.assert_close(found[name][key], value, rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(found[name][key], value), (name, key)


def gradients(remat: RematConfig, device_type: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shape = {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 20, "hidden_act": "silu",
        "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    model = CausalLM(architecture_from_hf(shape))
    apply_remat(model.model.layers, remat, device_type)
    ids = torch.arange(16).view(2, 8)
    model(ids, ids % 8, torch.ones_like(ids)).square().sum().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_only_the_inputs_of_layers_go_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []

    def to_host(tensor: torch.Tensor) -> module.Away:
        shapes.append(tensor.shape)
        return copy_to_host(tensor)

    copy_to_host = module.to_host
    monkeypatch.setattr(module, "to_host", to_host)
    for policy in ("full", "attention"):
        shapes.clear()
        remat = RematConfig(scan_layers=True, policy=policy, offload=["layer_input"])
        found = gradients(remat, "cuda")
        assert shapes == [torch.Size((2, 8, 16))] * 3
        kept = gradients(RematConfig(), "cpu")
        assert all(torch.equal(a, b) for a, b in zip(found, kept, strict=True))
    shapes.clear()
    gradients(RematConfig(scan_layers=True, policy="offload"), "cpu")
    assert not shapes


def test_other_names_stay_on_a_gpu() -> None:
    remat = RematConfig(scan_layers=True, policy="full", offload=["gate"])
    with pytest.raises(ConfigError, match=r"remat.offload: given \['gate'\], expected"):
        check_remat(remat, "cuda")
    check_remat(remat, "cpu")
