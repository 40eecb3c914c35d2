"""Training-step speed on this machine: ours under XLA, transformers under XLA, transformers eager.

All in one run, same model shape, dtype, batch and optimizer, on real GSM8K rows with a byte-level
BPE trained on them. `equal` cases all get our packed blocks (transformers with an explicit mask and
positions that honour the segments); `padded` cases get one row per block, as trainers without
packing do.

Each case has a process of its own, so that compiles, threads and peak memory do not mix. The
processes take turns: a round is a few steps of each, while the others wait. Other work on the
machine then slows all of them alike. Figures are medians over the rounds after two warm-up steps,
in seconds and in CPU seconds (of all threads). Supervised tokens per step are the mean over all
blocks, since few batches differ by chance.

    python benchmarks/step_time.py [--rows FILE] [--json FILE] [--rounds N] [--steps N]
        [--only NAME;...]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS = Path(__file__).resolve().parents[2] / "shared" / "data" / "gsm8k" / "train.jsonl"
VOCAB, HIDDEN, FFN, HEADS, BATCH, BLOCK, LR = 4096, 256, 688, 4, 16, 256, 1e-4

ANSWER = "answer: "  # begins a line for the process that asked

# name -> what runs; `packed` is the data, the rest shapes the implementation.
CASES: dict[str, dict[str, Any]] = {
    "ours xla, packed": dict(impl="ours", packed=True, scan=True),
    "ours xla, packed, unrolled": dict(impl="ours", packed=True),
    "transformers xla, equal blocks": dict(impl="hf_xla", packed=True),
    "transformers xla, padded rows": dict(impl="hf_xla", packed=False),
    "transformers eager, equal blocks": dict(impl="hf_eager", packed=True),
    "transformers eager, padded rows": dict(impl="hf_eager", packed=False),
    "ours xla, packed, bf16 + remat": dict(
        impl="ours", packed=True, dtype="bfloat16", remat="full", scan=True
    ),
    "ours xla, packed, remat": dict(impl="ours", packed=True, scan=True, remat="full"),
    "ours xla, packed, remat, 24 layers": dict(
        impl="ours", packed=True, scan=True, remat="full", layers=24
    ),
    "ours xla, packed, 24 layers": dict(impl="ours", packed=True, scan=True, layers=24),
}


def hf_config(layers: int) -> dict[str, Any]:
    """Return the model's config.json."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }


def train_tokenizer(rows: Path, folder: Path) -> None:
    """Train a byte-level BPE of VOCAB tokens on the rows' own text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    texts = [row["question"] + "\n" + row["answer"] for row in lines]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def prepare(rows: Path, folder: Path, packed: bool) -> Any:
    """Return blocks of the rows, packed or one row each."""
    from torchprime.config.sections.dataset import DatasetConfig
    from torchprime.data.files.source import SourceSpec
    from torchprime.data.prepare import Part, prepare_dataset
    from torchprime.data.tokenizer.load import load_tokenizer
    from torchprime.training.setup.datasets import settings_of

    dataset = DatasetConfig(
        file_dataset_path=str(rows),
        block_size=BLOCK,
        packing="bfd" if packed else "none",
        max_rejected_fraction=1.0,
    )
    data, _ = prepare_dataset(
        [Part(SourceSpec(file_dataset_path=dataset.file_dataset_path))],
        load_tokenizer(folder),
        settings_of(dataset, seed=0),
    )
    return data


def batches(data: Any, steps: int) -> list[Any]:
    """Return the first steps' batches in the trainer's order."""
    from torchprime.data.blocks.order import batch_indices

    return [data.batch(batch_indices(data.num_blocks, 0, s, BATCH)) for s in range(steps)]


def run_ours(case: dict[str, Any], data: Any, steps: int) -> None:
    """Serve our backend's step."""
    from torchprime.torch_xla_models.runtime import prepare_environment

    prepare_environment(1)
    import torch

    from torchprime.config.compose import compose_config
    from torchprime.config.schema import AXES
    from torchprime.config.sections.remat import RematConfig
    from torchprime.models.architecture import architecture_from_hf
    from torchprime.models.decoder import CausalLM, initial_tensor
    from torchprime.sharding import ShardingTable
    from torchprime.torch_xla_models.backend import XlaBackend
    from torchprime.training.backend import StepOptions
    from torchprime.training.optim.adamw import AdamW

    axes: dict[str, int] = dict.fromkeys(AXES, 1)
    remat = RematConfig(policy=case.get("remat", "none"), scan_layers=case.get("scan", False))
    backend = XlaBackend(axes, axes, remat=remat)
    sharding = compose_config(["model.pretrained_model=x", "task.max_steps=1"]).sharding
    with torch.device("meta"):
        model = CausalLM(architecture_from_hf(hf_config(case.get("layers", 6))))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    backend.place(
        model,
        ShardingTable(sharding.parameters, sharding.activations),
        lambda name: initial_tensor(name, shapes[name], 0.02, 0),
        getattr(torch, case.get("dtype", "float32")),
    )
    backend.prepare_training(AdamW(), StepOptions(max_grad_norm=1.0))

    def step(batch: Any) -> float:
        return backend.read(backend.train_step(backend.put(batch, 1), LR)).loss

    serve(step, data, steps, xla=True)


def run_hf(case: dict[str, Any], data: Any, steps: int) -> None:
    """Train transformers' model with torch's AdamW, in the loop most people would write."""
    xla = case["impl"] == "hf_xla"
    os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES="1", USE_TORCH_XLA=str(int(xla)))
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, LlamaConfig

    device, finish = "cpu", None
    if xla:
        import torch_xla

        device, finish = torch_xla.device(), torch_xla.sync
    torch.manual_seed(0)
    config = LlamaConfig(**hf_config(case.get("layers", 6)))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device)
    # Without `capturable` the bias correction is a Python number and every step compiles again.
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, capturable=xla)

    def step(batch: Any) -> float:
        ids, positions, targets = (
            torch.from_numpy(a).to(device, torch.long)
            for a in (batch.input_ids, batch.position_ids, batch.targets)
        )
        mask = None  # causal; the padding on the right carries no loss
        if case["packed"]:
            segments = torch.from_numpy(batch.segment_ids)
            mask = segments[:, :, None] == segments[:, None, :]
            mask = (mask & torch.ones(BLOCK, BLOCK).tril().bool())[:, None].to(device)
        out = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
        loss = F.cross_entropy(out.logits.flatten(0, 1).float(), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if finish is not None:
            finish()
        return loss.item()

    serve(step, data, steps, xla=xla)


def supervised_share(data: Any) -> float:
    """Supervised tokens per slot over all blocks."""
    starts = range(0, data.num_blocks, BATCH)
    parts = (data.batch(range(s, min(s + BATCH, data.num_blocks))) for s in starts)
    return sum(part.supervised_tokens for part in parts) / (data.num_blocks * BLOCK)


def serve(step: Any, data: Any, steps: int, *, xla: bool) -> None:
    """Run two warm-up steps, then a round of steps for each line of the input; print each round's
    figures, and at the end of the input those of all."""
    from torchprime.metrics.throughput import host_memory_bytes

    def compiles() -> tuple[int, float]:
        if not xla:
            return 0, 0.0
        import torch_xla.debug.metrics as met

        found = met.metric_data("CompileTime")
        return (0, 0.0) if found is None else (int(found[0]), float(found[1]) / 1e9)

    def run(part: list[Any]) -> dict[str, Any]:
        cpu, wall = time.process_time(), time.perf_counter()
        losses.extend(step(batch) for batch in part)
        return {
            "cpu_seconds": (time.process_time() - cpu) / len(part),
            "seconds": (time.perf_counter() - wall) / len(part),
        }

    before, losses = compiles(), []
    warm, done = 2, 0
    answer(run(batches(data, warm)))
    for _ in sys.stdin:
        answer(run(batches(data, warm + done + steps)[-steps:]))
        done += steps
    after = compiles()
    answer(
        {
            "supervised_share": supervised_share(data),
            "train_step_compiles": after[0] - before[0],
            "compile_seconds": after[1] - before[1],
            "peak_memory_bytes": host_memory_bytes(),
            "first_loss": losses[0],
            "last_loss": losses[-1],
        }
    )


def answer(found: dict[str, Any]) -> None:
    """Hand figures to the process that asked, in a line of its own."""
    print(f"{ANSWER}{json.dumps(found)}", flush=True)


def work(case: dict[str, Any], rows: Path, folder: Path, steps: int) -> None:
    """Serve one case, in this process."""
    data = prepare(rows, folder, case["packed"])
    run = run_ours if case["impl"] == "ours" else run_hf
    run(case, data, steps)


class Worker:
    """A case in a process of its own, which waits between its rounds."""

    def __init__(self, name: str, args: argparse.Namespace, folder: str) -> None:
        print(f"starting: {name}", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--work", name, "--folder", folder]
        command += ["--rows", str(args.rows), "--steps", str(args.steps)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.read()  # the warm-up

    def read(self) -> dict[str, Any]:
        """Return the next answer.

        Raises:
            SystemExit: the process ended without one.
        """
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(ANSWER):
                return json.loads(line.removeprefix(ANSWER))
        sys.exit(f"a case ended with exit code {self.process.wait()}")

    def round(self) -> dict[str, Any]:
        """Return the figures of one round."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read()

    def end(self) -> dict[str, Any]:
        """Return the figures of all rounds."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        found = self.read()
        self.process.wait()
        return found


def measure(names: list[str], args: argparse.Namespace, folder: str) -> dict[str, dict[str, Any]]:
    """Return the figures of the cases, which take turns."""
    workers = {name: Worker(name, args, folder) for name in names}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(args.rounds):
        for name, worker in workers.items():
            rounds[name].append(worker.round())
            print(f"round {number}: {name}: {rounds[name][-1]}", file=sys.stderr, flush=True)
    return {name: summary(worker.end(), rounds[name]) for name, worker in workers.items()}


def summary(found: dict[str, Any], rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a case's figures with its tokens per second and per CPU second."""
    slots, share = BATCH * BLOCK, found["supervised_share"]
    for key in ("seconds", "cpu_seconds"):
        found[f"{key}_per_step"] = median = statistics.median(r[key] for r in rounds)
        found[f"slot_tokens_per_{key}"] = slots / median
        found[f"supervised_tokens_per_{key}"] = share * slots / median
    return found


def ratios(found: dict[str, dict[str, Any]], clock: str) -> list[tuple[str, float]]:
    """Return the claimed ratios, from the figures of this run.

    Args:
        clock: `seconds` or `cpu_seconds`.
    """

    def of(name: str, key: str) -> float:
        return found.get(name, {}).get(key, float("nan"))

    ours, unrolled = "ours xla, packed", "ours xla, packed, unrolled"
    bf16, deep = "ours xla, packed, bf16 + remat", "ours xla, packed, 24 layers"
    remat, deep_remat = "ours xla, packed, remat", "ours xla, packed, remat, 24 layers"
    hf, eager = "transformers xla, ", "transformers eager, "
    equal, padded = "equal blocks", "padded rows"
    slot, supervised = f"slot_tokens_per_{clock}", f"supervised_tokens_per_{clock}"
    compiling = "compile_seconds"
    pairs = [
        ("slot tokens/s of transformers under XLA, equal blocks", slot, ours, hf + equal),
        ("supervised tokens/s of transformers under XLA, padded", supervised, ours, hf + padded),
        ("slot tokens/s of transformers eager, equal blocks", slot, ours, eager + equal),
        ("supervised tokens/s of transformers eager, padded", supervised, ours, eager + padded),
        ("supervised tokens/s, bf16 + remat against fp32", supervised, bf16, ours),
        ("slot tokens/s, scanned against unrolled", slot, ours, unrolled),
        ("compile seconds, 24 layers against 6, scanned", compiling, deep, ours),
        ("compile seconds, 24 against 6, scanned, remat", compiling, deep_remat, remat),
    ]
    return [(what, of(a, key) / of(b, key)) for what, key, a, b in pairs]


def main() -> None:
    """Measure the cases and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps of a round")
    parser.add_argument("--only", help="names of cases, separated by semicolons")
    parser.add_argument("--work", help=argparse.SUPPRESS)  # a case's name: serve it here
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.rows.is_file():
        sys.exit(f"--rows {args.rows}: no such file; give GSM8K's train.jsonl (question, answer)")
    if args.work:
        work(CASES[args.work], args.rows, args.folder, args.steps)
        return
    names = args.only.split(";") if args.only else list(CASES)
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(args.rows, Path(folder))
        found = measure(names, args, folder)
    report = {
        "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
        "shape": {"layers": 6, "hidden": HIDDEN, "vocab": VOCAB, "batch": BATCH, "block": BLOCK},
        "cases": found,
        "ratios": {clock: dict(ratios(found, clock)) for clock in ("seconds", "cpu_seconds")},
    }
    show(found)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def show(found: dict[str, dict[str, Any]]) -> None:
    """Print the figures and the ratios as Markdown tables."""
    print(
        "| case | slot tok/s | supervised tok/s | s/step | CPU s/step | compiles | compile s "
        "| peak GiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, r in found.items():
        print(
            f"| {name} | {r['slot_tokens_per_seconds']:,.0f} "
            f"| {r['supervised_tokens_per_seconds']:,.0f} | {r['seconds_per_step']:.2f} "
            f"| {r['cpu_seconds_per_step']:.2f} | {r['train_step_compiles']} "
            f"| {r['compile_seconds']:.1f} | {r['peak_memory_bytes'] / 2**30:.2f} |"
        )
    print("\n| ratio | by seconds | by CPU seconds |\n|---|---|---|")
    both = zip(ratios(found, "seconds"), ratios(found, "cpu_seconds"), strict=True)
    for (what, value), (_, by_cpu) in both:
        if value == value:
            print(f"| {what} | {value:.2f} | {by_cpu:.2f} |")


if __name__ == "__main__":
    main()
