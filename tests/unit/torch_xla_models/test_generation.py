"""Greedy answers on XLA equal transformers' generate, token for token, whatever cuts the model."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import answers
import pytest
import reference
import torch
import torch_xla

from torchprime.config.schema import AXES
from torchprime.config.sections.remat import RematConfig
from torchprime.errors import DataError
from torchprime.generation.decode import Answer, gumbel_noise, sampling_tensors
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM
from torchprime.torch_xla_models.backend import XlaBackend

WAYS = {
    "llama-tied": dict(mesh={"fsdp": 2, "tensor": 2}),
    "qwen2": dict(mesh={"tensor": 4}),  # more than there are kv heads
    "qwen3": dict(mesh={"fsdp": 2, "tensor": 2}, remat=RematConfig(scan_layers=True)),
    "gemma2": dict(mesh={"fsdp": 2, "tensor": 2}, remat=RematConfig(scan_layers=True)),
    "gemma3": dict(mesh={"fsdp": 2, "tensor": 2}, remat=RematConfig(scan_layers=True)),
    "olmo3": dict(mesh={"fsdp": 2, "tensor": 2}),
    "mistral": dict(mesh={"data": 2, "fsdp": 2}, remat=RematConfig(policy="full")),
}


class Truths(dict[str, tuple]):
    """Model and transformers' answers without stop tokens, by name; each made once."""

    def __missing__(self, name: str) -> tuple:
        model = answers.make_model(name)
        self[name] = model, answers.expected(model, answers.prompts(), answers.options())
        return self[name]


@pytest.fixture(scope="module")
def truths() -> Truths:
    return Truths()


def placed(name, model, table, mesh, dtype=torch.float32, **how) -> XlaBackend:
    backend = XlaBackend({a: mesh.get(a, 1) for a in AXES}, dict.fromkeys(AXES, 1), **how)
    weights = dict(model.named_parameters())
    with torch.device("meta"):
        ours = CausalLM(architecture_from_hf(answers.CONFIGS[name].to_dict()))
    backend.place(ours, table, lambda n: weights[n].detach(), dtype)
    return backend


SLOW = ("gemma2", "gemma3", "olmo3")  # qwen3 has windows in a scan, too
# Prompts of a batch; pairs of them are cut over four devices, too.
BATCHES = {"mistral": 8}


@pytest.fixture(scope="module")
def copied() -> set[tuple]:
    """Shapes and cuts of small weights for which the program that transposes them was compiled."""
    return set()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in WAYS]
)
def test_greedy_equals_transformers(
    name: str, truths: Truths, copied: set[tuple], shipped_table, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some matrices of these models are large then, as real models' are, and in most others small.
    monkeypatch.setattr("torchprime.torch_xla_models.generation.LARGEST_TURNED", 1100)
    model, free = truths[name]
    small = tuple(p.shape for p in model.parameters() if p.dim() == 2 and p.numel() <= 1100)
    program = small, repr(WAYS[name])
    new = bool(small) and program not in copied
    copied.add(program)
    size = BATCHES.get(name, 4)
    backend = placed(name, model, shipped_table, **WAYS[name])
    stops = answers.some_stops(free)
    stopped = answers.cut(free, stops)
    assert len({len(a.ids) for a in stopped}) > 3, stopped
    if name == "llama-tied":  # that cutting is what transformers does
        assert stopped == answers.expected(
            model, answers.prompts(), answers.options(stop_ids=stops)
        )
    given = answers.options(batch_size=size)
    # Others come first, so that what is held to the truth runs what was traced for them.
    others = answers.prompts((30, 2, 63, 140, 9, 8, 150), seed=5)
    before = backend.compiles()
    backend.generate(others, given)
    buckets = {4: 2, 8: 1}[size]
    # Two programs for each bucket, and on the CPU one that transposes small weights, unless an
    # earlier model had the same ones.
    assert backend.compiles() - before == 2 * buckets + new
    # Other prompts of the same buckets, other stop tokens: nothing compiles, nor when something has
    # made data of all there is meanwhile, as processes do that exchange objects. First what earlier
    # tests left in cycles goes: what is pending on a buffer that was written over would be run too.
    gc.collect()
    torch_xla.sync()
    before = backend.compiles()
    assert backend.generate(answers.prompts(), given) == free
    assert backend.generate(answers.prompts(), replace(given, stop_ids=stops)) == stopped
    assert backend.compiles() == before


@pytest.mark.parametrize(
    "names",
    [["qwen3"], pytest.param(["llama-tied", "qwen2", "phi3", "granite"], marks=pytest.mark.slow)],
)
def test_one_device(names: list[str], truths, tmp_path: Path) -> None:
    worker = Path(__file__).parent / "one_device.py"
    command = [sys.executable, str(worker), str(tmp_path / "out.json"), *names]
    environment = {**os.environ, "CPU_NUM_DEVICES": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    for name in names:
        assert [Answer(*a) for a in found[name]] == truths[name][1], name


@pytest.mark.usefixtures("torchax")
def test_prompts_are_read_by_the_kernel(truths, shipped_table, monkeypatch) -> None:
    """By Pallas' interpreter: a bucket of 64, where it is the reference core, one of 128, and rows
    of two prompts."""
    # late: it loads jax
    from torchprime.torch_xla_models.splash.attention import SplashAttention

    model, _ = truths["mistral"]
    scan = RematConfig(scan_layers=True)
    backend = placed("mistral", model, shipped_table, {"fsdp": 2, "tensor": 2}, remat=scan)
    read: list[int] = []

    class Interpreted(SplashAttention):
        def __init__(self, *given, **how) -> None:
            super().__init__(*given, **how, interpret=True)

        def forward(self, q, k, v, prepared):
            read.append(q.shape[2])
            return super().forward(q, k, v, prepared)

    name = "torchprime.torch_xla_models.splash.attention.SplashAttention"
    monkeypatch.setattr(name, Interpreted)
    backend.attention = "splash"
    asked, given = answers.prompts((100, 3, 77, 128)), answers.options(max_length=256, batch_size=2)
    found = backend.generate(asked, given)
    assert read and set(read) == {128}
    assert found == answers.expected(model, asked, given)
    read.clear()
    asked, given = answers.prompts((180, 3, 77, 100)), answers.options(max_length=256)
    found = backend.generate(asked, given)
    assert read and set(read) == {384}
    assert found == answers.expected(model, asked, given)


def test_a_batch_ends_with_its_longest_answer(truths, shipped_table, monkeypatch) -> None:
    model, free = truths["llama-tied"]
    backend = placed("llama-tied", model, shipped_table, **WAYS["llama-tied"])
    calls = []
    run = "torchprime.torch_xla_models.generation.RecordedLoop.run"
    monkeypatch.setattr(run, lambda *given: calls.append(given))
    asked = answers.prompts()[1]
    first = free[1].ids[0]
    found = backend.generate([asked], answers.options(stop_ids=(first,)))
    assert found == [Answer([], True)] and not calls


@pytest.mark.parametrize("scan", [False, True])
def test_training_goes_on_as_if_nothing_was_generated(scan, make_backend, reference_runs) -> None:
    """The third step has to be the first one's program: if generation took weights for something
    else, torch_xla would no longer update them in place."""
    own = {"max_grad_value": 1e6}  # clips nothing; but no other test has this program compiled
    backend = make_backend(
        {"fsdp": 2, "tensor": 2}, remat=RematConfig(scan_layers=scan), options=own
    )
    expected = reference_runs[False]["losses"]
    given = answers.options(max_length=80, batch_size=8)
    prompts = [[t % reference.V for t in p] for p in answers.prompts((3, 20))]
    losses, generated = [], []
    for step in range(3):
        batch = backend.put(reference.make_batch(step), 1)
        before = backend.compiles()
        losses.append(backend.read(backend.train_step(batch, reference.LR)).loss)
        assert backend.compiles() - before == (step == 0)
        weights = {n: w.clone() for n, w in backend.weights()}
        generated.append(backend.generate(prompts, given))
        for name, weight in backend.weights():
            assert torch.equal(weight, weights[name]), name
    assert losses == pytest.approx(expected[:3], rel=1e-5)
    assert generated[0] != generated[1] != generated[2]  # the weights are those of the moment


@pytest.mark.slow
def test_bf16_takes_the_likeliest(truths, shipped_table) -> None:
    """Rounding decides between neighbours; so each token is held to the logits of one forward."""
    model, _ = truths["llama-tied"]
    how = WAYS["llama-tied"]
    backend = placed("llama-tied", model, shipped_table, dtype=torch.bfloat16, **how)
    prompt = answers.prompts()[3][:50]
    answer = backend.generate([prompt], answers.options())[0].ids
    assert len(answer) == answers.NEW
    logits = backend.logits(prompt + answer)[len(prompt) - 1 : -1]
    short = logits.amax(-1) - logits[torch.arange(len(answer)), torch.tensor(answer)]
    assert (short < 0.03 * logits.std()).all(), short


@pytest.mark.slow
def test_sampling_depends_on_the_prompts_place_alone(truths, shipped_table) -> None:
    """Not on the batch a prompt is in, nor on the mesh; another seed is another answer."""
    model, _ = truths["qwen2"]
    sampled = dict(temperature=0.8, top_k=20, top_p=0.9, seed=7)
    found = {}
    for tensor, size in ((4, 4), (1, 8)):
        mesh = {"tensor": tensor, "fsdp": 4 // tensor}
        backend = placed("qwen2", model, shipped_table, mesh)
        given = answers.options(**sampled, batch_size=size)
        found[size] = backend.generate(answers.prompts(), given)
        before = backend.compiles()
        others = sampled | {"seed": 8, "temperature": 0.7}
        other = backend.generate(answers.prompts(), answers.options(**others, batch_size=size))
        assert backend.compiles() == before and other != found[size]
        assert backend.generate(answers.prompts(), given) == found[size]
    assert found[4] == found[8]
    assert found[4] != truths["qwen2"][1]


def test_the_noise_is_that_of_the_host() -> None:
    """So that answers sampled on XLA and elsewhere are the same: the hash exactly, logarithms to
    rounding."""
    seed = sampling_tensors(answers.options(seed=2**40 + 5)).seed
    rows = torch.tensor([0, -(2**31), 2**31 - 1, 12345], dtype=torch.int32)
    number = torch.tensor(17, dtype=torch.int32)
    expected = gumbel_noise(seed, rows, number, 500)
    device = torch_xla.device()
    found = gumbel_noise(seed.to(device), rows.to(device), number.to(device), 500).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_prompt_without_room_names_itself(truths, shipped_table) -> None:
    backend = placed("qwen2", truths["qwen2"][0], shipped_table, **WAYS["qwen2"])
    with pytest.raises(DataError, match=r"Prompt 1 has 160 tokens.* context of 160"):
        backend.generate([[1], [2] * 160], answers.options())
