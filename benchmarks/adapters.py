"""Speed of LoRA training on a CPU: against our own full training, and against PEFT + transformers.

All cases run in one process on the same GSM8K rows, and take turns: a round is one pass over the
rows by each case. Other work on the machine then slows all of them alike. Figures are medians over
the rounds after a warm-up round, in CPU seconds (of all threads) and in seconds.

- Ours: packed blocks, scanned under XLA; natively eager, with FSDP2's hooks on one process.
- PEFT: `sdpa` attention without a mask, torch's AdamW; eager, and on an XLA device with one sync a
  step. Its batches have the rows of our packed batches, each row by itself, padded on the right to
  the longest of the batch.
- LoRA: rank 16, all linear layers except the output projection.

All cases start from the same base, so that their first losses have to be equal.

    python benchmarks/adapters.py [--rows FILE] [--json FILE] [--rounds N] [--steps N] [--rank R]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import step_time
from step_time import LR, ROWS

LAYERS = 6
FULL, XLA, NATIVE = "ours xla, full", "ours xla, LoRA", "ours native, LoRA"
PEFT = "PEFT + transformers eager, LoRA, padded rows"
PEFT_XLA = "PEFT + transformers xla, LoRA, padded rows"
PACKAGES = ("torch", "torch_xla", "transformers", "peft")
WANTED = {"full": 0.75, "peft": 1.3}


class Case(NamedTuple):
    """A training that is measured.

    Attributes:
        step: trains on one batch and returns its loss, after waiting for it.
        batches: of one pass over the rows.
        trained: the number of trained parameters.
    """

    step: Callable[[Any], float]
    batches: list[Any]
    trained: int


class Pass(NamedTuple):
    """One pass over the rows."""

    cpu_seconds: float
    seconds: float
    losses: list[float]


def base_weights(lora: bool, rank: int) -> tuple[Any, Any]:
    """Return our model without storage, adapted or not, and its first values by name."""
    import torch

    from torchprime.adapters.spec import AdapterSpec
    from torchprime.models.architecture import architecture_from_hf
    from torchprime.models.decoder import CausalLM, initial_tensor
    from torchprime.sharding import ShardingTable
    from torchprime.training.setup.adapter import AdaptedTensors, Adapter, build_model

    architecture = architecture_from_hf(step_time.hf_config(LAYERS))
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in CausalLM(architecture).named_parameters()}

    def base(name: str) -> Any:
        return initial_tensor(name, shapes[name], 0.02, 0)

    if not lora:
        return build_model(architecture, None, torch.float32), base
    spec = AdapterSpec(rank=rank, alpha=rank)
    adapter = Adapter(spec, ShardingTable({}, {}), {}, "adapter")
    # Two models: a backend replaces the layers of the one it places.
    model, same = (build_model(architecture, adapter, torch.float32) for _ in range(2))
    values = AdaptedTensors(same, spec, base, trained=None, seed=0, dtype=torch.float32)
    return model, values


def make_ours(backend: Any, batches: list[Any], lora: bool, rank: int) -> Case:
    """Return the training of our model on a backend."""
    import torch

    from torchprime.adapters.axes import adapter_patterns
    from torchprime.config.compose import compose_config
    from torchprime.sharding import ShardingTable
    from torchprime.training.backend import StepOptions
    from torchprime.training.optim.adamw import AdamW

    shipped = compose_config(["model.pretrained_model=x", "task.max_steps=1"]).sharding
    patterns = adapter_patterns(shipped.parameters)
    model, values = base_weights(lora, rank)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    backend.place(model, ShardingTable(patterns, shipped.activations), values, torch.float32)
    backend.prepare_training(AdamW(), StepOptions(max_grad_norm=1.0))

    def step(batch: Any) -> float:
        return backend.read(backend.train_step(backend.put(batch, 1), LR)).loss

    return Case(step, batches, trained)


def make_peft(batches: list[Any], rank: int, xla: bool) -> Case:
    """Return PEFT's training on the batches' rows, padded, in the loop most people would write."""
    import torch
    import torch.nn.functional as F
    import torch_xla
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**step_time.hf_config(LAYERS))
    base = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    _, values = base_weights(False, rank)
    base.load_state_dict({name: values(name) for name, _ in base.named_parameters()})
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    device: Any = torch_xla.device() if xla else "cpu"
    model: Any = get_peft_model(base, lora).to(device)
    trained = [p for p in model.parameters() if p.requires_grad]
    # Without `capturable` the bias correction is a Python number and every step compiles again.
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0, capturable=xla)

    def step(batch: tuple[Any, Any]) -> float:
        ids, targets = (each.to(device) for each in batch)
        out = model(input_ids=ids, use_cache=False)  # causal; padding on the right has no loss
        loss = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if xla:
            torch_xla.sync()
        return loss.item()

    return Case(step, [padded_rows(b) for b in batches], sum(p.numel() for p in trained))


def padded_rows(batch: Any) -> tuple[Any, Any]:
    """Return ids and targets [rows, longest row] of a packed batch's rows, one row each."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [
        (torch.from_numpy(ids[block == segment]), torch.from_numpy(targets[block == segment]))
        for ids, targets, block in zip(
            batch.input_ids, batch.targets, batch.segment_ids, strict=True
        )
        for segment in sorted(set(block.tolist()) - {0})  # 0 is padding
    ]
    ids = pad_sequence([ids for ids, _ in rows], batch_first=True)
    targets = pad_sequence([t for _, t in rows], batch_first=True, padding_value=-100)
    return ids.long(), targets.long()


def make_cases(batches: list[Any], rank: int) -> dict[str, Case]:
    """Return all cases by name, XLA first: autograd looks for devices at its first backward."""
    from torchprime.torch_xla_models.runtime import prepare_environment

    prepare_environment(1)
    os.environ["USE_TORCH_XLA"] = "0"  # PEFT's transformers is eager

    from torchprime.config.schema import AXES
    from torchprime.config.sections.remat import RematConfig
    from torchprime.torch_native.backend import NativeBackend
    from torchprime.torch_xla_models.backend import XlaBackend

    one: dict[str, int] = dict.fromkeys(AXES, 1)

    def xla() -> Any:
        return XlaBackend(one, one, remat=RematConfig(scan_layers=True))

    return {
        FULL: make_ours(xla(), batches, False, rank),
        XLA: make_ours(xla(), batches, True, rank),
        NATIVE: make_ours(NativeBackend(one, one), batches, True, rank),
        PEFT_XLA: make_peft(batches, rank, xla=True),
        PEFT: make_peft(batches, rank, xla=False),
    }


def one_pass(case: Case) -> Pass:
    """Train on every batch once."""
    cpu, wall = time.process_time(), time.perf_counter()
    losses = [case.step(batch) for batch in case.batches]
    return Pass(time.process_time() - cpu, time.perf_counter() - wall, losses)


def measure(cases: dict[str, Case], rounds: int) -> dict[str, list[Pass]]:
    """Return each case's passes; the first one compiles."""
    found: dict[str, list[Pass]] = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name, case in cases.items():
            done = one_pass(case)
            print(f"round {number}: {name}: {done}", file=sys.stderr, flush=True)
            found[name].append(done)
    return found


def check_first_losses(found: dict[str, list[Pass]]) -> None:
    """Check that all cases have the same loss before their first update.

    Raises:
        AssertionError: a case differs from PEFT by more than 1e-5 of the loss.
    """
    expected = found[PEFT][0].losses[0]
    for name, passes in found.items():
        if abs(passes[0].losses[0] - expected) > 1e-5 * expected:
            raise AssertionError(f"{name}: first loss {passes[0].losses[0]}, PEFT's {expected}")


def summary(case: Case, passes: Sequence[Pass], supervised: int) -> dict[str, float]:
    """Return a case's figures."""
    cpu = statistics.median(p.cpu_seconds for p in passes)
    wall = statistics.median(p.seconds for p in passes)
    return {
        "cpu_seconds_per_step": cpu / len(case.batches),
        "seconds_per_step": wall / len(case.batches),
        "supervised_tokens_per_cpu_s": supervised / cpu,
        "supervised_tokens_per_s": supervised / wall,
        "trained_parameters": case.trained,
        "last_loss": passes[-1].losses[-1],
    }


def ratios(found: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the claimed ratios by CPU seconds and by seconds, with the wanted one."""
    pairs = {
        "LoRA step against our full step, XLA": ("seconds_per_step", XLA, FULL),
        "supervised tokens/s against PEFT, XLA": ("supervised_tokens_per_s", XLA, PEFT),
        "supervised tokens/s against PEFT, native": ("supervised_tokens_per_s", NATIVE, PEFT),
        "supervised tokens/s against PEFT, both XLA": ("supervised_tokens_per_s", XLA, PEFT_XLA),
    }
    result = {}
    for what, (key, ours, other) in pairs.items():
        by_cpu = f"cpu_{key}" if key.startswith("seconds") else key.replace("per_s", "per_cpu_s")
        result[what] = {
            "cpu": found[ours][by_cpu] / found[other][by_cpu],
            "wall": found[ours][key] / found[other][key],
            "wanted": WANTED["full" if other == FULL else "peft"],
        }
    return result


def show(found: dict[str, dict[str, float]]) -> None:
    """Print two Markdown tables."""
    print("| case | CPU s/step | s/step | supervised tok/CPU s | supervised tok/s | trained |")
    print("|---|---|---|---|---|---|")
    for name, r in found.items():
        print(
            f"| {name} | {r['cpu_seconds_per_step']:.2f} | {r['seconds_per_step']:.2f} "
            f"| {r['supervised_tokens_per_cpu_s']:,.0f} | {r['supervised_tokens_per_s']:,.0f} "
            f"| {r['trained_parameters']:,} |"
        )
    print("\n| ratio | by CPU seconds | by seconds | wanted |")
    print("|---|---|---|---|")
    for what, r in ratios(found).items():
        print(f"| {what} | {r['cpu']:.2f} | {r['wall']:.2f} | {r['wanted']} |")


def main() -> None:
    """Measure all cases and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="updates per pass over the rows")
    parser.add_argument("--rank", type=int, default=16)
    args = parser.parse_args()
    if not args.rows.is_file():
        sys.exit(f"--rows {args.rows}: no such file; give GSM8K's train.jsonl (question, answer)")
    with tempfile.TemporaryDirectory() as folder:
        step_time.train_tokenizer(args.rows, Path(folder))
        data = step_time.prepare(args.rows, Path(folder), packed=True)
        batches = step_time.batches(data, args.steps)
        cases = make_cases(batches, args.rank)
        passes = measure(cases, args.rounds)
    check_first_losses(passes)
    rows = sum(len(ids) for ids, _ in cases[PEFT].batches)
    supervised = sum(batch.supervised_tokens for batch in batches)
    found = {name: summary(case, passes[name][1:], supervised) for name, case in cases.items()}
    report = {
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg(), "cpu": platform.machine()},
        "versions": {name: version(name) for name in PACKAGES},
        "shape": {"layers": LAYERS, "hidden": step_time.HIDDEN, "vocab": step_time.VOCAB},
        "rows": {"count": rows, "supervised_tokens": supervised},
        "cases": found,
        "ratios": ratios(found),
    }
    show(found)
    print(f"\n{report['rows']}, {report['machine']}, {report['versions']}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
