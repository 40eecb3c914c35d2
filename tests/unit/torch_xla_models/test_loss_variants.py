"""The compiled step with each variant of the loss, against a loop over examples.

It runs on 4 virtual devices. With `fsdp2-tensor2` the vocabulary is sharded.
"""

from __future__ import annotations

from typing import Any

import pytest
import variants

from torchprime.config.sections.remat import RematConfig

WAYS: dict[str, dict[str, Any]] = {
    "fsdp4-accumulate2": {"mesh": {"fsdp": 4}, "accumulation": 2},
    "fsdp2-tensor2": {"mesh": {"fsdp": 2, "tensor": 2}},
}
# One compile each: the others are in these, or in test_cross_entropy.py without a mesh.
QUICK = {("smoothing, z_loss", "fsdp2-tensor2"), ("dft, z_loss", "fsdp4-accumulate2")}
CASES = [
    pytest.param(kind, way, marks=[] if (kind, way) in QUICK else [pytest.mark.slow])
    for kind in variants.KINDS
    for way in WAYS
]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_a_step_is_the_one_of_a_loop_over_examples(name: str, way: str, make_backend) -> None:
    kind, accumulation = variants.KINDS[name], WAYS[way].get("accumulation", 1)
    options = {"token_loss": kind, "loss_terms": kind.terms, "max_grad_norm": None}
    backend = make_backend(**WAYS[way], optimizer=variants.Plain(), options=options)
    before = backend.compiles()
    for average in variants.AVERAGES:
        variants.check_step(backend, kind, average, accumulation)
    assert backend.compiles() == before + 1
    variants.check_held_out(backend)


@pytest.mark.parametrize(
    "way",
    [
        pytest.param({"mesh": {"fsdp": 4}, "accumulation": 2}, marks=[pytest.mark.slow]),
        {"mesh": {"fsdp": 2, "tensor": 2}, "remat": RematConfig(policy="full", scan_layers=True)},
    ],
    ids=["fsdp4-accumulate2", "fsdp2-tensor2-scan"],
)
def test_noise_on_embeddings_is_that_of_its_definition(way: dict[str, Any], make_backend) -> None:
    options = {"random_seed": variants.SEED, "noise_alpha": variants.ALPHA, "max_grad_norm": None}
    backend = make_backend(**way, optimizer=variants.Plain(), options=options)
    variants.check_noise(backend, way.get("accumulation", 1))
