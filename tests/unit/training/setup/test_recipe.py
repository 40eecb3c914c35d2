"""The sharding table of a config's run."""

from __future__ import annotations

import pytest
import torch

from torchprime.adapters.lora import A, B
from torchprime.config.compose import compose_config
from torchprime.models.architecture import architecture_from_hf
from torchprime.training.setup.adapter import build_model
from torchprime.training.setup.model_files import find_architecture
from torchprime.training.setup.recipe import adapter_of, checked_table


@pytest.mark.parametrize("rank", [16, 69, 70, 128, 256])
@pytest.mark.parametrize("mesh", [{"fsdp": 4}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_an_adapter_of_8b_fits_the_table_at_any_rank(rank: int, mesh: dict[str, int]) -> None:
    """No matrix is cut further while all have at most max_unsharded_params elements."""
    sizes = [f"ici_mesh.{axis}={size}" for axis, size in mesh.items()]
    config = compose_config(
        ["--config-name", "llama-3-8b-lora-w-gsm8k", "model=llama-3-8b", f"adapter.rank={rank}"]
        + sizes
    )
    found, _ = find_architecture(
        pretrained_model=None, architecture=config.model.architecture, cache_dir=None
    )
    model = build_model(architecture_from_hf(found), adapter_of(config), torch.bfloat16)
    _, specs = checked_table(config, model)
    further = 14_336 * rank > config.sharding.max_unsharded_params
    for end, dim in ((f"gate_proj{B}", 0), (f"down_proj{A}", 1)):
        assert {"fsdp" in spec[dim] for n, spec in specs.items() if n.endswith(end)} == {further}
