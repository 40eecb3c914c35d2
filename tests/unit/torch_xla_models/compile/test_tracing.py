"""The step that is lowered without weights is the step that training hands to XLA."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import pytest
import reference
import torch
import torch_xla.debug.metrics as met
from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]
from torch_xla import _XLAC as XLAC  # pyright: ignore[reportPrivateImportUsage]

from torchprime.compiling.tracing import StepParts
from torchprime.config.schema import AXES
from torchprime.config.sections.remat import RematConfig
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM
from torchprime.torch_xla_models.backend import XlaBackend
from torchprime.torch_xla_models.compile.tracing import Placeholders, trace_step
from torchprime.torch_xla_models.mesh import device_order
from torchprime.training.backend import StepOptions
from torchprime.training.optim.adafactor import Adafactor
from torchprime.training.optim.adamw import AdamW

WAYS = {
    "scan-remat-accumulate2": dict(
        mesh={"fsdp": 4}, accumulation=2, remat=RematConfig(policy="full", scan_layers=True)
    ),
    "fsdp2-tensor2-bf16": dict(mesh={"fsdp": 2, "tensor": 2}, dtype=torch.bfloat16),
    "ewc-scan": dict(
        mesh={"fsdp": 2, "tensor": 2}, remat=RematConfig(scan_layers=True), term="ewc"
    ),
    "kl-scan-remat-accumulate2-bf16": dict(
        mesh={"fsdp": 4},
        accumulation=2,
        remat=RematConfig(policy="full", scan_layers=True),
        dtype=torch.bfloat16,
        term="kl-supervised",
    ),
    "adafactor-sources": dict(
        mesh={"data": 2, "fsdp": 2}, optimizer=Adafactor(), options={"num_sources": 2}
    ),
}


def operations(text: str) -> Counter[tuple[str, ...]]:
    """Count each operation of an HLO text by its kind, result and, for a custom call, annotation.

    Names and places are ignored. (Training's text repeats the annotation of an output's custom call
    on the operation before it.)
    """
    line = r"^ +(?:ROOT )?\S+ = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$"
    return Counter(
        (
            kind,
            re.sub(r"\{[\d,]*\}", "", result),
            *re.findall(r"(?:sharding=\{+.*?\}|target=\S+)", rest if kind == "custom-call" else ""),
        )
        for result, kind, rest in re.findall(line, text, re.MULTILINE)
    )


def lowered(way: dict, table):
    settings = dict(way)
    sizes = {**dict.fromkeys(AXES, 1), **settings.pop("mesh")}
    accumulation = settings.pop("accumulation", 1)
    dtype = settings.pop("dtype", torch.float32)
    optimizer = settings.pop("optimizer", AdamW(eps=reference.EPS, weight_decay=reference.DECAY))
    options, term = settings.pop("options", {}), settings.pop("term", None)
    backend = XlaBackend(sizes, dict.fromkeys(AXES, 1), make_tensors=Placeholders, **settings)
    with torch.device("meta"):
        model = CausalLM(architecture_from_hf(reference.make_model(False)[0].to_dict()))
    chosen = StepOptions(
        gradient_accumulation_steps=accumulation,
        loss_chunks=3,
        max_grad_norm=reference.CLIP,
        **options,
    )
    chosen, shape = reference.with_term(chosen, term), (reference.B, reference.S)
    return trace_step(backend, StepParts(model, table, dtype, optimizer, chosen, shape))


@pytest.mark.parametrize("way", WAYS)
def test_what_is_lowered_is_what_training_hands_over(
    way: str, make_backend, shipped_table, monkeypatch
) -> None:
    backend = make_backend(**WAYS[way])
    handed: list[str] = []
    monkeypatch.setattr(
        backend.tensors,
        "run",
        lambda outputs: handed.append(XLAC._get_xla_tensors_hlo(list(outputs))),
    )
    batch = reference.make_batch(0)
    if backend.options.num_sources == 1:  # as batches are where nothing is mixed
        batch = dataclasses.replace(batch, source_ids=None)
    backend.train_step(backend.put(batch, backend.accumulation), reference.LR)
    ahead = lowered(WAYS[way], shipped_table)
    text = _jax.XlaComputation(ahead.hlo).as_hlo_text()
    theirs = operations(handed[0])
    kinds = Counter(key[0] for key in theirs.elements())
    assert kinds["dot"] > 10 and kinds["custom-call"] > 50 and len(theirs) > 100
    assert operations(text) == theirs


def test_arguments_are_cut_and_donated_as_training_does(make_backend, shipped_table) -> None:
    """Weights and state may be written over, the batch and constants may not; nothing is
    forgotten."""
    way = "fsdp2-tensor2-bf16"
    arguments = lowered(WAYS[way], shipped_table).arguments.values()
    backend = make_backend(**WAYS[way])
    state = backend.state.tensors()
    theirs = Counter((tuple(t.shape), sharding_of(t)) for t in state)
    ours = Counter((a.shape, a.sharding) for a in arguments if a.donated)
    assert ours == theirs
    constants = [model_constant(backend), ((), "{replicated}")]  # rotary speeds, learning rate
    batch = backend.put(reference.make_batch(0), 1)[:5]
    kept = Counter((a.shape, a.sharding) for a in arguments if not a.donated)
    assert kept == Counter(constants + [(tuple(t.shape), sharding_of(t)) for t in batch])


def test_the_bases_frozen_values_are_arguments_that_are_not_donated(shipped_table) -> None:
    """One for each weight, cut like it; with EWC one more for its Fisher information."""
    for way, count in (("ewc-scan", 2), ("kl-scan-remat-accumulate2-bf16", 1)):
        arguments = lowered(WAYS[way], shipped_table).arguments.values()
        frozen = Counter((a.shape, a.sharding) for a in arguments if not a.donated)
        with torch.device("meta"):
            model = CausalLM(architecture_from_hf(reference.make_model(False)[0].to_dict()))
        weights = [name for name, _ in model.named_parameters() if ".layers.1." not in name]
        others = 5 + 1 + 1  # the batch, rotary speeds, learning rate
        assert frozen.total() == count * len(weights) + others


@pytest.mark.parametrize(
    ("accumulation", "term"),
    [
        pytest.param(1, None, marks=pytest.mark.slow),
        (2, None),
        pytest.param(2, "ewc", marks=pytest.mark.slow),
        pytest.param(2, "kl-all", marks=pytest.mark.slow),
    ],
)
def test_an_update_writes_over_what_it_replaces(
    accumulation: int, term: str | None, make_backend
) -> None:
    """All of the state, in a loop over micro-batches too: else the weights are held twice. And
    nothing else: the base's values stay."""
    own = {"max_grad_value": 0.37}  # a program that no other test has had compiled
    backend = make_backend(
        {"fsdp": 4},
        accumulation=accumulation,
        remat=RematConfig(scan_layers=True),
        options=own,
        term=term,
    )
    batch = backend.put(reference.make_batch(0), accumulation)
    backend.train_step(batch, reference.LR)
    _, _, written_over = met.metric_data("InputOutputAliasCount")
    assert written_over[-1][1] == len(backend.state.tensors())


def sharding_of(tensor: torch.Tensor) -> str:
    return XLAC._get_xla_sharding_spec(tensor) or "{replicated}"


def model_constant(backend: XlaBackend) -> tuple[tuple[int, ...], str]:
    (speeds,) = backend.model.buffers()
    return tuple(speeds.shape), sharding_of(speeds)


def test_devices_lie_on_the_mesh_in_their_order() -> None:
    """Neighbours along the last axis are neighbours in number, and slices are the outer part of the
    axis that goes over them."""
    one = device_order((1, 2, 4), (1, 1, 1), [0] * 8)
    assert one.tolist() == list(range(8))
    # Two slices whose devices take turns: data goes over slices.
    two = device_order((1, 4), (2, 1), [0, 1] * 4)
    assert two.reshape(2, 4).tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]]
    # fsdp over both: the slice is the major part of it, tensor stays inside.
    both = device_order((2, 2), (2, 1), [0] * 4 + [1] * 4)
    assert both.reshape(4, 2).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    inner = device_order((2, 2), (1, 2), [0] * 4 + [1] * 4)
    assert inner.reshape(2, 4).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
