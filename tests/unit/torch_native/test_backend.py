"""The native backend at 1, 2 and 4 processes against transformers + torch.optim on one.

The same reference as the XLA backend's: losses, gradient norms, losses by source, held-out loss,
logits and every final weight.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import ForkServer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "torch_xla_models"))

import reference  # noqa: E402

from torchprime.torch_native.attention import flex_trains_on_cpu  # noqa: E402

WORKER = Path(__file__).parent / "worker.py"
# name -> processes and how they are used
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone-flex": (1, {"mesh": {}, "kernel": "flex", "remat": "full"}),
    "fsdp2-fused-loss": (2, {"mesh": {"fsdp": 2}, "fused": True, "accumulation": 2}),
    "fsdp2": (2, {"mesh": {"fsdp": 2}}),
    "tensor2-qwen3": (2, {"mesh": {"tensor": 2}, "family": "qwen3"}),
    "fsdp2-tensor2-tied": (4, {"mesh": {"fsdp": 2, "tensor": 2}, "tied": True}),
    # kv heads that the tensor axis does not divide: one for all, and three for two processes.
    "tensor2-qwen3-one-kv-head": (2, {"mesh": {"tensor": 2}, "family": "qwen3", "heads": (4, 1)}),
    "tensor2-three-kv-heads-compiled": (
        2,
        {"mesh": {"tensor": 2}, "heads": (6, 3), "compiler": "aot_eager"},
    ),
    "fsdp2-tensor2-phi3": (4, {"mesh": {"fsdp": 2, "tensor": 2}, "family": "phi3"}),
    "tensor2-phi3-three-kv-heads": (2, {"mesh": {"tensor": 2}, "family": "phi3", "heads": (6, 3)}),
    # Capped scores and logits: in a kernel for each, and in the divergence.
    "gemma2-flex-fused-loss-kl": (
        1,
        {"mesh": {}, "family": "gemma2", "tied": True, "kernel": "flex", "fused": True}
        | {"term": "kl-all", "remat": "full"},
    ),
    "tensor2-gemma2": (2, {"mesh": {"tensor": 2}, "family": "gemma2"}),
    "tensor2-olmo2": (2, {"mesh": {"tensor": 2}, "family": "olmo2"}),
    "fsdp2-tensor2-olmo2-remat": (
        4,
        {"mesh": {"fsdp": 2, "tensor": 2}, "family": "olmo2", "remat": "full"},
    ),
    "tensor2-olmo2-compiled": (
        2,
        {"mesh": {"tensor": 2}, "family": "olmo2", "compiler": "aot_eager"},
    ),
    # Queries that grow with their position.
    "tensor2-ministral3-tied-remat": (
        2,
        {"mesh": {"tensor": 2}, "family": "ministral3", "tied": True, "remat": "full"},
    ),
    "hsdp-remat": (4, {"mesh": {"data": 2, "fsdp": 2}, "remat": "full"}),
    "adafactor": (1, {"mesh": {}, "optimizer": "adafactor"}),
    "adafactor-fsdp2": (2, {"mesh": {"fsdp": 2}, "optimizer": "adafactor"}),
    "adafactor-fsdp2-tensor2": (4, {"mesh": {"fsdp": 2, "tensor": 2}, "optimizer": "adafactor"}),
    "l2_sp-data2": (2, {"mesh": {"data": 2}, "term": "l2_sp"}),
    "ewc-fsdp2-tensor2-tied": (
        4,
        {"mesh": {"fsdp": 2, "tensor": 2}, "tied": True, "term": "ewc"},
    ),
    "kl-supervised-fsdp2-accumulate2": (
        2,
        {"mesh": {"fsdp": 2}, "term": "kl-supervised", "accumulation": 2},
    ),
    "kl-all-hsdp-tied-remat": (
        4,
        {"mesh": {"data": 2, "fsdp": 2}, "tied": True, "term": "kl-all", "remat": "full"},
    ),
    "kl-all-tensor2-compiled": (
        2,
        {"mesh": {"tensor": 2}, "term": "kl-all", "compiler": "aot_eager"},
    ),
    "muon-fsdp2": (2, {"mesh": {"fsdp": 2}, "optimizer": "muon"}),
    "muon-fsdp2-tensor2": (4, {"mesh": {"fsdp": 2, "tensor": 2}, "optimizer": "muon"}),
    "lion-fsdp2": (2, {"mesh": {"fsdp": 2}, "optimizer": "lion"}),
    "sgd-fsdp2": (2, {"mesh": {"fsdp": 2}, "optimizer": "sgd"}),
    "compiled-flex": (1, {"mesh": {}, "compiler": "aot_eager", "kernel": "flex"}),
    "fsdp2-compiled-remat-accumulate2": (
        2,
        {"mesh": {"fsdp": 2}, "compiler": "aot_eager", "remat": "full", "accumulation": 2},
    ),
}
# The others of make test hold each part of these.
SLOW = {
    "fsdp2",
    "tensor2-qwen3",
    "fsdp2-tensor2-olmo2-remat",
    "tensor2-olmo2-compiled",
    "tensor2-ministral3-tied-remat",
    "fsdp2-tensor2-phi3",
    "tensor2-phi3-three-kv-heads",
    "tensor2-three-kv-heads-compiled",
    "adafactor-fsdp2",
    "alone-flex",
    "gemma2-flex-fused-loss-kl",
    "tensor2-gemma2",
    "ewc-fsdp2-tensor2-tied",
    "muon-fsdp2-tensor2",
    "lion-fsdp2",
    "sgd-fsdp2",
    "kl-all-hsdp-tied-remat",
    "kl-all-tensor2-compiled",
}


def ways(names: Iterable[str]) -> list[Any]:
    """For pytest: the ways, the longest as slow ones."""
    return [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in names]


@pytest.fixture(scope="module")
def trained(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory):
    """Return the result of each way to run and its reference; each runs once."""
    done: dict[str, tuple[Path, dict]] = {}
    references: dict[tuple, dict] = {}

    def get(way: str) -> tuple[Path, dict]:
        if "flex" in way and not flex_trains_on_cpu():
            pytest.skip("this torch has no backward for FlexAttention on the CPU")
        if way not in done:
            processes, how = WAYS[way]
            key = (
                how.get("tied", False),
                how.get("family", "llama"),
                how.get("optimizer", "adamw"),
                how.get("heads", (4, 2)),
                how.get("term"),
            )
            if key not in references:
                references[key] = reference.train(*key)
            out = tmp_path_factory.mktemp(way)
            ranks = fork_server.group(processes, WORKER, str(out), json.dumps(how))
            for ended in [rank.end() for rank in ranks]:
                assert ended.code == 0, ended.printed[-3000:]
            done[way] = out, references[key]
        return done[way]

    return get


@pytest.mark.parametrize("way", ways(WAYS))
def test_numbers_and_weights_are_the_references(way: str, trained) -> None:
    out, expected = trained(way)
    found = json.loads((out / "numbers.json").read_text())
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    assert found["terms"] == pytest.approx(expected["terms"], rel=1e-5)
    for ours, theirs in zip(found["by_source"], expected["by_source"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert found["held_out"] == pytest.approx(expected["held_out"], rel=1e-4)
    weights = torch.load(out / "weights.pt", weights_only=True)
    assert weights.keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        moved = (weight - expected["start"][name]).abs().max()
        assert moved > (1e-3 if "sgd" in way else 1e-2), name
        error = (weights[name] - weight).abs().max()
        assert error < 1e-4 * moved, f"{name}: {error:.1e} of {moved:.1e}"
    theirs = expected["model"](torch.tensor([list(range(11))])).logits[0]
    ours = torch.load(out / "logits.pt", weights_only=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("way", ways(WAYS))
def test_every_process_holds_its_share_only(way: str, trained) -> None:
    out, _ = trained(way)
    how = WAYS[way][1]
    mesh, kv_heads = how["mesh"], how.get("heads", (4, 2))[1]
    share = json.loads((out / "numbers.json").read_text())["largest_share"]
    # Projections to kv heads that cannot be shared out are whole along the tensor axis.
    fused = how.get("family") == "phi3"
    tensor = mesh.get("tensor", 1) if fused or kv_heads % mesh.get("tensor", 1) == 0 else 1
    assert share == 1 / (mesh.get("fsdp", 1) * tensor)


@pytest.mark.parametrize("way", ways(["adafactor-fsdp2", "adafactor-fsdp2-tensor2"]))
def test_adafactors_means_are_of_whole_matrices(way: str, trained) -> None:
    """Shards of a matrix are updated as one process updates the whole, to rounding."""
    found, alone = (trained(each)[0] for each in (way, "adafactor"))
    numbers, expected = (json.loads((o / "numbers.json").read_text()) for o in (found, alone))
    for name in ("losses", "norms"):
        assert numbers[name] == pytest.approx(expected[name], rel=1e-5)
    weights, whole = (torch.load(o / "weights.pt", weights_only=True) for o in (found, alone))
    for name, weight in whole.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", ways([way for way in WAYS if "compiled" in way]))
def test_layers_share_one_graph_from_the_first_step_on(way: str, trained) -> None:
    """As on CUDA, but without its code generator: what torch.compile sees, it sees here too."""
    out, _ = trained(way)
    compiles = json.loads((out / "numbers.json").read_text())["compiles"]
    assert compiles == [1] * reference.STEPS


def test_groups_and_frozen_weights_of_two_processes(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    """FSDP2 with frozen parameters beside trained ones; weights() has both."""
    how = json.dumps({"mesh": {"fsdp": 2}, "groups": True})
    for ended in [rank.end() for rank in fork_server.group(2, WORKER, str(tmp_path), how)]:
        assert ended.code == 0, ended.printed[-3000:]
    found = torch.load(tmp_path / "weights.pt", weights_only=True)
    expected = reference.train_in_groups()
    assert found.keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        moved = (weight - expected["start"][name]).abs().max()
        assert (found[name] - weight).abs().max() <= 1e-4 * moved, name
