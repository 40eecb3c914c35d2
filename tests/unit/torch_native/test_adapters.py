"""Adapters on several processes against a plain PyTorch loop on one: losses, norms, weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import ForkServer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "torch_xla_models"))

import adapted  # noqa: E402
import reference  # noqa: E402

from torchprime.adapters.apply import apply_adapter, trainable  # noqa: E402
from torchprime.adapters.spec import AdapterSpec  # noqa: E402
from torchprime.models.architecture import architecture_from_hf  # noqa: E402
from torchprime.models.decoder import CausalLM  # noqa: E402
from torchprime.training.regularization.near_base import Kl  # noqa: E402

WORKER = Path(__file__).parent / "adapter_worker.py"
LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}
WAYS: dict[str, dict[str, Any]] = {
    "tensor2": {"mesh": {"tensor": 2}, "spec": LORA},
    "fsdp2-tensor2-remat-accumulate2": {
        "mesh": {"fsdp": 2, "tensor": 2}, "spec": LORA, "remat": "full", "accumulation": 2,
    },
    "fsdp2-dora": {"mesh": {"fsdp": 2}, "spec": {**LORA, "dora": True}},
    "fsdp2-tensor2-whole-modules": {
        "mesh": {"fsdp": 2, "tensor": 2},
        "spec": {**LORA, "modules_to_train": ["lm_head", "model.norm"], "layers": [1]},
    },
    "kl-fsdp2-remat-accumulate2": {
        "mesh": {"fsdp": 2}, "spec": LORA, "remat": "full", "accumulation": 2, "term": "kl-all",
    },
}  # fmt: skip
QUICK = "tensor2"


def plain_model(spec: AdapterSpec) -> CausalLM:
    """The adapted model with random values, in B too."""
    config, base = reference.make_model(False)
    model = CausalLM(architecture_from_hf(config.to_dict()))
    model.load_state_dict(base.state_dict())
    apply_adapter(model, spec)
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.uniform_(0.9, 1.5)
        elif "lora_" in name and parameter.is_floating_point():
            parameter.data.normal_(0.0, 0.1)
    return model


@pytest.mark.parametrize(
    "way", [pytest.param(n, marks=[] if n == QUICK else [pytest.mark.slow]) for n in WAYS]
)
def test_an_adapter_trains_as_on_one_device(
    way: str, fork_server: ForkServer, tmp_path: Path
) -> None:
    how = {"remat": "none", "accumulation": 1, "seed": adapted.SEED, "lr": adapted.LR}
    how |= {"eps": adapted.EPS, "steps": adapted.STEPS, **WAYS[way]}
    model = plain_model(AdapterSpec(**how["spec"]))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.save(start, tmp_path / "start.pt")
    processes = how["mesh"].get("fsdp", 1) * how["mesh"].get("tensor", 1)
    ranks = fork_server.group(processes, WORKER, str(tmp_path), json.dumps(how))
    kl = Kl(reference.COEFFICIENT, "all") if "term" in how else None
    expected = adapted.train(model, dropout=True, kl=kl)
    for ended in [rank.end() for rank in ranks]:
        assert ended.code == 0, ended.printed[-3000:]
    found = json.loads((tmp_path / "numbers.json").read_text())
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-4)
    weights = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert weights.keys() == trainable(model).keys()
    for name, weight in weights.items():
        trained = model.get_parameter(name).detach()
        assert (trained - start[name]).abs().max() > 1e-3, name
        torch.testing.assert_close(weight, trained, rtol=1e-4, atol=1e-5)
