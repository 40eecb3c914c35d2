"""The reference run, made once, and a helper that trains the same on a given mesh."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch_xla._internal.jax_workarounds import maybe_get_torchax

sys.path.insert(0, str(Path(__file__).parent))

import reference  # noqa: E402

from torchprime.config.compose import compose_config  # noqa: E402
from torchprime.config.schema import AXES  # noqa: E402
from torchprime.models.architecture import architecture_from_hf  # noqa: E402
from torchprime.models.decoder import CausalLM  # noqa: E402
from torchprime.sharding import ShardingTable  # noqa: E402
from torchprime.torch_xla_models.backend import XlaBackend  # noqa: E402
from torchprime.training.backend import ResumedState, StepOptions  # noqa: E402
from torchprime.training.optim.adamw import AdamW  # noqa: E402
from torchprime.training.optim.groups import Group, freeze_groups  # noqa: E402


@pytest.fixture(scope="session")
def reference_runs() -> dict[bool, dict]:
    """By tied or not."""
    return {tied: reference.train(tied) for tied in (False, True)}


@pytest.fixture(scope="session")
def shipped_table() -> ShardingTable:
    """The sharding table users get."""
    config = compose_config(["model.pretrained_model=x", "task.max_steps=1"])
    return ShardingTable(config.sharding.parameters, config.sharding.activations, 100)


@pytest.fixture(scope="session")
def runs_with_terms() -> dict[str, dict]:
    """Reference runs of the tied model, by the term that their steps add."""
    return {term: reference.train(tied=True, term=term) for term in ("ewc", "kl-all")}


@pytest.fixture(scope="session")
def make_backend(reference_runs, shipped_table):
    """A placed and prepared backend that starts from the reference's weights."""

    def make(
        mesh: dict[str, int],
        *,
        tied: bool = False,
        accumulation: int = 1,
        dtype: torch.dtype = torch.float32,
        optimizer=None,
        groups: tuple[Group, ...] = (),
        options: dict | None = None,
        resumed: ResumedState | None = None,
        term: str | None = None,
        family: str = "llama",
        **more,
    ) -> XlaBackend:
        sizes = {axis: mesh.get(axis, 1) for axis in AXES}
        backend = XlaBackend(sizes, dict.fromkeys(AXES, 1), **more)
        config, theirs = reference.make_model(tied, family)
        with torch.device("meta"):
            model = CausalLM(architecture_from_hf(config.to_dict()))
        freeze_groups(model, groups)
        start = {name: p.detach() for name, p in theirs.named_parameters()}
        base = reference.anchors(start)[0].__getitem__ if term and term.startswith("kl") else None
        if resumed is None:
            backend.place(model, shipped_table, lambda name: start[name], dtype, base)
        else:
            backend.place(model, shipped_table, lambda n: resumed.tensor_of(f"model.{n}"), dtype)
        chosen = StepOptions(
            gradient_accumulation_steps=accumulation,
            loss_chunks=3,
            **{"max_grad_norm": reference.CLIP, **(options or {})},
        )
        backend.prepare_training(
            optimizer or AdamW(eps=reference.EPS, weight_decay=reference.DECAY),
            reference.with_term(chosen, term),
            resumed,
            reference.anchor_source(start, term),
        )
        backend.accumulation = accumulation  # pyright: ignore[reportAttributeAccessIssue]
        return backend

    return make


@pytest.fixture(scope="session")
def torchax() -> None:
    """Skip tests that call a kernel from torch where torchax, which they need, is missing."""
    if maybe_get_torchax() is None:
        pytest.skip("torchax, through which torch_xla calls kernels, is not here (make libtpu)")
