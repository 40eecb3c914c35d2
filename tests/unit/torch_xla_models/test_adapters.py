"""Adapters on virtual devices against a plain PyTorch loop: losses, weights after ten steps.

The common cases are quick. The others, one device among them, take a compile each.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import adapted
import pytest
import reference
import torch
import torch_xla

from torchprime.adapters import int8, nf4
from torchprime.adapters.apply import trainable
from torchprime.adapters.spec import AdapterSpec
from torchprime.compiling.tracing import StepParts
from torchprime.config.schema import AXES
from torchprime.config.sections.remat import RematConfig
from torchprime.counter_bits import kept
from torchprime.errors import ConfigError
from torchprime.generation.decode import GenerateOptions
from torchprime.models.layer_kinds import repeating_groups
from torchprime.torch_xla_models import placement
from torchprime.torch_xla_models.backend import XlaBackend
from torchprime.torch_xla_models.compile.tracing import Placeholders, trace_step
from torchprime.torch_xla_models.layers.scan import ScannedLayers
from torchprime.torch_xla_models.linear import turned
from torchprime.training.backend import ResumedState
from torchprime.training.optim.adamw import AdamW

QUICK = ["dropout-scan-remat-accumulate2", "nf4-dora-scan-tensor"]


def cases(names: list[str]) -> list:
    """The names as parameters of a test, slow if they are not quick."""
    marks = {False: [pytest.mark.slow], True: []}
    return [pytest.param(name, marks=marks[name in QUICK]) for name in names]


@pytest.fixture(scope="module")
def trained(shipped_table):
    """Each way, trained once."""
    done: dict[str, adapted.Trained] = {}

    def get(way: str) -> adapted.Trained:
        if way not in done:
            done[way] = adapted.train_both(adapted.WAYS[way], shipped_table)
        return done[way]

    return get


@pytest.mark.parametrize("way", cases([*adapted.WAYS]))
def test_losses_norms_and_weights_are_those_of_plain_pytorch(way: str, trained) -> None:
    done = trained(way)
    assert [n.loss for n in done.numbers] == pytest.approx(done.expected["losses"], rel=1e-5)
    assert [n.grad_norm for n in done.numbers] == pytest.approx(done.expected["norms"], rel=1e-5)
    assert done.compiles == [1] + [0] * (adapted.STEPS - 1)
    ours = dict(done.backend.weights())
    assert ours.keys() == trainable(done.plain).keys()
    for name, weight in trainable(done.plain).items():
        assert (weight - done.start[name]).abs().max() > 1e-2, name
        torch.testing.assert_close(ours[name], weight.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("way", cases([*adapted.WAYS]))
def test_the_base_stays_bit_for_bit(way: str, trained) -> None:
    done = trained(way)
    model, placed = done.backend.model, done.backend.placed
    frozen = {n: p for n, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) + len(done.backend.state.parameters) == len(placed)
    for name, parameter in frozen.items():
        entry = placed[name]
        first = [turned(hf_name, done.start[hf_name]) for hf_name in entry.hf_names]
        host = placement.from_local_shards(parameter.detach())
        assert torch.equal(host, torch.stack(first) if entry.stacked else first[0]), name


@pytest.mark.parametrize("way", cases([*adapted.WAYS]))
def test_a_checkpoint_has_the_trained_weights_alone(way: str, trained) -> None:
    done = trained(way)
    found = {each.name for each in done.backend.checkpoint_tensors()}
    prefixes = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    assert found == {f"{prefix}.{name}" for prefix in prefixes for name in trainable(done.plain)}


@pytest.mark.slow
@pytest.mark.parametrize("way", adapted.WAYS)
def test_held_out_loss_and_greedy_answers(way: str, trained) -> None:
    """Without dropout, with adapters and quantized weights, also through the static cache."""
    done = trained(way)
    batch = done.backend.put(reference.make_batch(99), 1)
    loss, weight = done.backend.read_eval([done.backend.eval_step(batch)])
    with torch.no_grad():
        expected = adapted.loss_of(done.plain, reference.make_batch(99)).item()
    assert loss / weight == pytest.approx(expected, rel=1e-5)
    prompts = [[5, 9, 3], [7, 1, 1, 8, 20], [30], [2, 4]]
    options = GenerateOptions(max_new_tokens=6, stop_ids=(), max_length=64)
    found = done.backend.generate(prompts, options)
    assert [list(a.ids) for a in found] == [adapted.greedy(done.plain, p, 6) for p in prompts]


@pytest.mark.slow
def test_resume_with_dropout(trained, shipped_table) -> None:
    """Bit for bit in the same form; on another mesh, without scan, as plain PyTorch."""
    name, half = "dropout-scan-remat-accumulate2", adapted.STEPS // 2
    done, way = trained(name), adapted.WAYS[name]
    first = adapted.make_backend(way, done.start, shipped_table)
    adapted.run(first, way, range(half))
    saved = adapted.whole(first)
    state = ResumedState(saved.__getitem__, half)
    weights = {n.removeprefix("model."): t for n, t in saved.items() if n.startswith("model.")}
    unbroken = dict(done.backend.weights())
    for other in (way, adapted.Way({"fsdp": 2, "tensor": 2}, way.spec)):
        second = adapted.make_backend(other, {**done.start, **weights}, shipped_table, state)
        adapted.run(second, other, range(half, adapted.STEPS))
        for name, weight in second.weights():
            if other is way:
                assert torch.equal(weight, unbroken[name]), name
            expected = done.plain.get_parameter(name).detach()
            torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_one_device(tmp_path: Path) -> None:
    """In a process of its own, which has one device."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from torchprime.torch_xla_models.runtime import prepare_environment\n"
        "prepare_environment(1)\n"
        "import adapted; adapted.check_one_device()"
    )
    environment = {**os.environ, "CPU_NUM_DEVICES": "1"}
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def results(folder: Path, way: str) -> dict[str, Counter[str]]:
    """Return the shapes of the results of gathers and copies in the compiled step of a way."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from torchprime.torch_xla_models.runtime import prepare_environment\n"
        "prepare_environment(4)\n"
        f"import adapted; adapted.one_step({way!r})"
    )
    flags = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
    environment = {**os.environ, "CPU_NUM_DEVICES": "4", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    programs = list(folder.glob("*after_optimizations.txt"))
    program = max(programs, key=lambda path: path.stat().st_size).read_text()
    found = re.findall(r"= (\w+\[[\d,]*)\]\S* (all-gather|copy)\(", program)
    return {kind: Counter(r for r, k in found if k == kind) for kind in ("all-gather", "copy")}


# Gathers of a layer's seven weights. In a loop over layers: forward, and backward, which uses twice
# what it gathers. Unrolled, of two layers: forward, recomputed forward and backward. The output of
# down_proj is not recomputed, and the input of the first q, k and v has no gradient.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "gathers"), [("nf4-scan-remat-accumulate2", 2 * 7), ("nf4-remat", 3 * 7 * 2 - 2 - 3)]
)
def test_what_is_gathered_is_what_is_stored(way: str, gathers: int, tmp_path: Path) -> None:
    """Never a dequantized weight, and no stack of codes is copied."""
    found = results(tmp_path, way)
    packed = [n for shape, n in found["all-gather"].items() if re.match(r"u8\[\d,\d+,\d+$", shape)]
    assert sum(packed) == gathers, found["all-gather"]
    dequantized = {f"f32[{o},{i}" for o in (128, 256) for i in (128, 256)}
    assert not dequantized & found["all-gather"].keys(), found["all-gather"]
    layers = adapted.CONFIG.num_hidden_layers
    stacks = [s for s in found["copy"] if re.match(rf"u8\[{layers},\d+,\d+,\d+$", s)]
    assert not stacks, found["copy"]


def test_a_step_compiled_ahead_holds_every_weight_and_writes_over_state_alone(
    shipped_table,
) -> None:
    """Arguments that the update may write over are those of trained weights and their state."""
    way = adapted.WAYS["nf4-scan-remat-accumulate2"]
    sizes = {axis: way.mesh.get(axis, 1) for axis in AXES}
    backend = XlaBackend(sizes, dict.fromkeys(AXES, 1), make_tensors=Placeholders, **way.more)
    model, table = adapted.storage_less(way, shipped_table)
    shape, options = (reference.B, reference.S), adapted.step_options(way)
    parts = StepParts(model, table, torch.float32, AdamW(), options, shape)
    lowered = trace_step(backend, parts)
    arguments = lowered.arguments.values()
    donated = Counter(each.shape for each in arguments if each.donated)
    assert donated == Counter(tuple(t.shape) for t in backend.state.tensors())
    kept = Counter(each.shape for each in arguments if not each.donated)
    frozen = [p for p in backend.model.parameters() if not p.requires_grad]
    # Numbers for dropout are no part of a step without it.
    used = Counter(tuple(p.shape) for p in frozen if p.dtype != torch.int32)
    assert len(used) > 5 and not used - kept


def test_a_scan_over_layers_that_differ(shipped_table) -> None:
    spec = AdapterSpec(rank=4, alpha=8, layers=(1,))
    way = adapted.Way({"fsdp": 4}, spec, more={"remat": RematConfig(scan_layers=True)})
    model = adapted.make_model(way, shipped_table)
    message = r"remat.scan_layers: .*layer 0 and layer 1 in mlp.down_proj.*scan_layers=false"
    with pytest.raises(ConfigError, match=message):
        groups = repeating_groups(model.architecture.layers)
        ScannedLayers(list(model.model.layers), groups, None, None)  # type: ignore


def test_dropout_masks_are_equal_to_the_bit() -> None:
    numbers = torch.arange(40, dtype=torch.int32).view(4, 10)
    key = [torch.tensor(value, dtype=torch.int32) for value in (123_456_789, -77)]
    device = torch_xla.device()
    expected = kept((key[0], key[1]), numbers, 33, 0.3)
    found = kept((key[0].to(device), key[1].to(device)), numbers.to(device), 33, 0.3)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantized_weights_are_equal_to_the_bit(dtype: torch.dtype) -> None:
    """By both ways to find a level: XLA may not join operations that round apart."""
    weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(1))
    w, whole = nf4.quantize(weight, groups=2), int8.quantize(weight)
    on_device = nf4.Nf4(*(t.to(torch_xla.device()) for t in w))
    for level in (nf4.level_by_lookup, nf4.level_by_selects):
        found = nf4.dequantize(on_device, dtype, level).cpu()
        assert torch.equal(found, nf4.dequantize(w, dtype))
    found = int8.dequantize(int8.Int8(*(t.to(torch_xla.device()) for t in whole)), dtype)
    assert torch.equal(found.cpu(), int8.dequantize(whole, dtype))
