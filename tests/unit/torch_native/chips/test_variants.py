"""Steps of every kind on simulated chips, against the native backend in this process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from simulated import simulated_backend
from step_variants import FUSED, LORA, VARIANTS, Variant, model_of, table_of, two_steps, values_of

from torchprime.errors import ConfigError
from torchprime.generation.decode import GenerateOptions
from torchprime.torch_native.backend import NativeBackend
from torchprime.torch_native.runtime import stop_processes
from torchprime.torch_native.tpu.grid import Grid

# The others are slow; `make test-torchtpu` runs all of them.
QUICK = ("ewc", "nf4", "kv heads, dropout")


@pytest.fixture(scope="module", autouse=True)
def end_of_processes() -> Iterator[None]:
    yield
    stop_processes()


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in VARIANTS],
)
def test_two_steps_equal_the_native_backend(name: str) -> None:
    variant = VARIANTS[name]
    expected, weights = two_steps(NativeBackend({}, {}, full_precision=True), variant)
    numbers, found = two_steps(simulated_backend(variant.grid), variant)
    assert numbers == [pytest.approx(each, rel=1e-5) for each in expected]
    assert found.keys() == weights.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-5, atol=1e-5)


def test_answers_of_a_shared_kv_head_equal_the_native_backend() -> None:
    variant, answers = Variant({}, model=FUSED), []
    options = GenerateOptions(max_new_tokens=6, stop_ids=(0,), max_length=16, batch_size=4)
    for backend in (NativeBackend({}, {}, full_precision=True), simulated_backend(Grid(tensor=2))):
        with torch.device("meta"):
            model = model_of(variant)
        start = values_of(variant)
        backend.place(model, table_of(None), start.__getitem__, torch.float32)
        answers.append(backend.generate([[5, 9, 2], [7], [1, 2, 3, 4]], options))
    assert answers[0] == answers[1]


def test_parts_of_an_odd_size_are_refused_with_dropout() -> None:
    spec = replace(LORA, dropout=0.3)
    with torch.device("meta"):
        model = model_of(Variant({}, adapter=spec, model={"intermediate_size": 36}))
    backend = simulated_backend(Grid(tensor=4))
    with pytest.raises(
        ConfigError, match="adapter.dropout: given 0.3 .*mlp.down_proj.* parts of 9"
    ):
        backend.place(model, table_of(spec), lambda name: torch.zeros(()), torch.float32)
