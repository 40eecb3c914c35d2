"""Fine-tuning on GPUs: ours against TRL's SFTTrainer, both packed, on GSM8K's rows.

A real model's shape with random weights, real rows in blocks of 4,096 tokens, bf16, in one go on
one machine, each case in processes of its own. Ours is the main job under torchrun, read from its
metrics.jsonl. TRL's is SFTTrainer with packing, which lays examples end to end and tells attention
where they begin, and its own loss, which makes logits of supervised tokens alone; it is tried with
and without checkpointing and torch.compile, and with bf16 weights, which saves it the fp32 copies
that ours keeps, and the best of these counts. Each case gets the largest micro-batch that fits.

    python benchmarks/gpu_sft.py [--shapes 1b;8b] [--only NAME;...] [--processes N] [--rows FILE]
        [--tokenizer FOLDER] [--steps N] [--micro-batches 8;4;2;1] [--optimizer adamw|adafactor]
    python benchmarks/gpu_sft.py --tiny    # the whole way on a CPU, to see that it works

Writes gpu_sft.json and gpu_sft.md to --out. AdamW takes 16 bytes per parameter on ours: the 8B
shape needs several GPUs, or --optimizer adafactor on one of 140 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from step_time import train_tokenizer

REPO = Path(__file__).resolve().parents[1]
SHARED = REPO.parent / "shared"
ROWS = SHARED / "data" / "gsm8k" / "train.jsonl"
SHIPPED_ROWS = REPO / "torchprime" / "assets" / "quickstart" / "data" / "train.jsonl"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "flash-attn", "liger-kernel", "triton")
WANTED_RATIO, WANTED_MFU = 1.3, 0.5
LEARNING_RATE = 1e-5
# Steps per record; the first record, with compiling and warming up, does not count.
LAP = 5

SHAPES: dict[str, str] = {"1b": "llama-3.2-1b", "8b": "llama-3-8b"}
TINY = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


class Case(NamedTuple):
    """One way to train the shape."""

    program: str  # ours or trl
    checkpointing: bool = True
    compiled: bool = False
    dtype: str = "bfloat16"  # of TRL's weights; ours always keeps fp32 copies


CASES = {
    "ours": Case("ours", checkpointing=False),
    "ours, remat": Case("ours"),
    "TRL, bf16 weights": Case("trl", checkpointing=False),
    "TRL, bf16 weights, checkpointing": Case("trl"),
    "TRL, bf16 weights, checkpointing, compiled": Case("trl", compiled=True),
    "TRL, fp32 weights, checkpointing": Case("trl", dtype="float32"),
}
TINY_CASES = ("ours", "TRL, bf16 weights, checkpointing")


class Job(NamedTuple):
    """All that a case needs to know, as it travels to its processes."""

    shape: str
    architecture: dict[str, Any]
    case: Case
    rows: str
    tokenizer: str
    out: str
    processes: int
    micro_batch: int  # blocks per process
    global_batch: int
    block_size: int
    steps: int
    optimizer: str

    @property
    def accumulation(self) -> int:
        return self.global_batch // (self.micro_batch * self.processes)


# Common to both -----------------------------------------------------------------------------------


def architecture_of(shape: str, tokenizer: Path) -> dict[str, Any]:
    """Write the shape's config.json, with the special tokens of the given tokenizer."""
    import yaml

    from torchprime.data.tokenizer.load import load_tokenizer

    if shape == "tiny":
        found = dict(TINY)
    else:
        path = REPO / "configs" / "model" / f"{SHAPES[shape]}.yaml"
        found = yaml.safe_load(path.read_text(encoding="utf-8"))["architecture"]
    tokens = load_tokenizer(tokenizer)
    return {**found, "bos_token_id": tokens.bos_id, "eos_token_id": tokens.eos_id}


def questions_and_answers(rows: Path) -> Iterator[tuple[str, str]]:
    with rows.open(encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            yield row["question"], row["answer"]


def describe_machine() -> dict[str, Any]:
    """Return the machine and versions of the figures."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "gpus": gpus,
        "cpu": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "cuda": torch.version.cuda,
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


# Ours --------------------------------------------------------------------------------------------


def ours(job: Job) -> dict[str, Any]:
    """Run the main job under torchrun; return the figures of its metrics.jsonl."""
    a = {key: value for key, value in job.architecture.items() if value is not None}
    overrides = {
        "task": "train",
        "eval": "none",
        "dataset": "file",
        "dataset.file_dataset_path": job.rows,
        "dataset.block_size": job.block_size,
        "dataset.max_rejected_fraction": 1.0,
        "model.tokenizer_name": job.tokenizer,
        "+model.architecture": to_override(a),
        "torch_dtype": "bfloat16",
        "task.global_batch_size": job.global_batch,
        "task.gradient_accumulation_steps": job.accumulation,
        "task.max_steps": job.steps,
        "task.optimizer.name": job.optimizer,
        "task.optimizer.learning_rate": LEARNING_RATE,
        "task.lr_scheduler.warmup_ratio": 0.0,
        "ici_mesh.fsdp": job.processes,
        "remat": "full" if job.case.checkpointing else "none",
        "logging_steps": LAP,
        "output_dir": job.out,
        "run_name": "ours",
    }
    command = [*torchrun(job.processes), "-m", "torchprime.torch_native.train"]
    started(command + [f"{key}={value}" for key, value in overrides.items()], job)
    folder = Path(job.out) / "ours"
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [each for each in map(json.loads, lines) if each["kind"] == "train"][1:]
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    seconds = sum(each["step_seconds"] for each in records)
    rate = {
        kind: sum(each[f"{kind}_tokens_per_s"] * each["step_seconds"] for each in records) / seconds
        for kind in ("supervised", "slot")
    }
    on_host = max(each["host_memory_bytes"] for each in records)
    return {
        "supervised_tokens_per_s": rate["supervised"],
        "slot_tokens_per_s": rate["slot"],
        "step_seconds": seconds / len(records),
        "peak_bytes": max((each["device_memory_bytes"] or 0) for each in records) or on_host,
        "attention": facts["attention"],
        "loss": facts["loss"],
    }


def to_override(values: Mapping[str, Any]) -> str:
    """Return a mapping in Hydra's grammar: {a:1,b:{c:true}}."""

    def written(value: Any) -> str:
        if isinstance(value, Mapping):
            return to_override(value)
        return str(value).lower() if isinstance(value, bool) else str(value)

    return "{" + ",".join(f"{key}:{written(value)}" for key, value in values.items()) + "}"


def torchrun(processes: int) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launch, f"--nproc_per_node={processes}"]


class OutOfMemory(Exception):
    """A case does not fit with this micro-batch."""


def started(command: Sequence[str], job: Job) -> str:
    """Run it; what it printed to stdout.

    Raises:
        OutOfMemory: if that is why it failed; other failures end the benchmark with its output.
    """
    environment = {**os.environ, "USE_TORCH_XLA": "0", "TOKENIZERS_PARALLELISM": "false"}
    if job.shape == "tiny":
        environment["OMP_NUM_THREADS"] = "1"
    else:
        # Sizes differ from batch to batch; without it, what is free lies in pieces.
        environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=REPO)
    if done.returncode == 0:
        return done.stdout
    if "out of memory" in done.stderr.lower():
        raise OutOfMemory
    sys.exit(f"{' '.join(command[:8])} ... failed:\n{done.stderr[-4000:]}")


# TRL's -------------------------------------------------------------------------------------------


def trl(job: Job) -> dict[str, Any]:
    """Run this script again, as the process of TRL's SFTTrainer."""
    path = Path(job.out) / "job.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**job._asdict(), "case": job.case._asdict()}), encoding="utf-8")
    printed = started([*torchrun(job.processes), __file__, "--work", str(path)], job)
    return json.loads(printed.splitlines()[-1])


def work(path: Path) -> None:
    """One process of SFTTrainer; the first prints what was measured."""
    values = json.loads(path.read_text(encoding="utf-8"))
    job = Job(**{**values, "case": Case(**values["case"])})
    import torch

    trainer = make_trainer(job)
    trainer.train()
    laps, peak = trainer.laps, 0
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        from torchprime.metrics.throughput import host_memory_bytes

        peak = host_memory_bytes()
    counts = torch.stack([torch.stack(lap.tokens).sum(0) for lap in laps[1:]]).sum(0)
    counts = trainer.accelerator.reduce(counts).tolist()  # over processes
    seconds = sum(lap.seconds for lap in laps[1:])
    if trainer.args.process_index == 0:
        found = {
            "supervised_tokens_per_s": counts[0] / seconds,
            "slot_tokens_per_s": counts[1] / seconds,
            "step_seconds": seconds / sum(lap.steps for lap in laps[1:]),
            "peak_bytes": peak,
            "attention": trainer.model.config._attn_implementation,
            "loss": "TRL's",
        }
        print(json.dumps(found))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class Lap:
    """Some steps of TRL: how long, and their tokens, counted where they are."""

    def __init__(self) -> None:
        self.started, self.seconds, self.steps = time.perf_counter(), 0.0, 0
        self.tokens: list[Any] = []


def make_trainer(job: Job) -> Any:
    """SFTTrainer on the job's rows, with a stopwatch."""
    import datasets
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from torchprime.data.rows.read import QUESTION_PROMPT

    cuda = torch.cuda.is_available()
    datasets.disable_progress_bars()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else "cpu"
    given = dict(job.architecture)
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    flash = find_spec("flash_attn") is not None and cuda
    # Without flash-attn, FlexAttention is what keeps packed examples apart without [S, S].
    attention = "flash_attention_2" if flash else "flex_attention" if cuda else "sdpa"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, job.case.dtype), attn_implementation=attention
        )
    rows = [
        {"prompt": QUESTION_PROMPT.format(question=question), "completion": answer}
        for question, answer in questions_and_answers(Path(job.rows))
    ]
    sharded = {"fsdp": True, "fsdp_config": {"version": 2}} if job.processes > 1 else {}
    args = SFTConfig(
        output_dir=str(Path(job.out) / "trl"),
        use_cpu=not cuda,
        bf16=cuda,
        max_length=job.block_size,
        packing=True,
        completion_only_loss=True,
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=job.accumulation,
        max_steps=job.steps,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        optim="adamw_torch_fused" if job.optimizer == "adamw" else "adafactor",
        gradient_checkpointing=job.case.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        torch_compile=job.case.compiled,
        logging_steps=LAP,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
        **sharded,
    )

    class Timed(SFTTrainer):
        """Counts tokens on the device, and asks for the time where ours logs."""

        laps: list[Lap] = []

        def training_step(self, *arguments: Any, **named: Any) -> Any:
            inputs = arguments[1]
            if not self.laps:
                self.laps.append(Lap())
            supervised = (inputs["labels"] != -100).sum()
            slots = torch.full_like(supervised, inputs["input_ids"].numel())
            self.laps[-1].tokens.append(torch.stack([supervised, slots]))
            return super().training_step(*arguments, **named)

        def log(self, *arguments: Any, **named: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            lap, now = self.laps[-1], time.perf_counter()
            done = self.state.global_step - sum(each.steps for each in self.laps)
            if done:  # once more at the end, after no step
                lap.seconds, lap.steps = now - lap.started, done
                self.laps.append(Lap())

        def train(self, *arguments: Any, **named: Any) -> Any:
            result = super().train(*arguments, **named)
            self.laps = [lap for lap in self.laps if lap.steps]
            return result

    return Timed(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=PreTrainedTokenizerFast.from_pretrained(job.tokenizer),
    )


# Measuring and telling ---------------------------------------------------------------------------


def measure(job: Job, micro_batches: Sequence[int]) -> dict[str, Any] | None:
    """Return the case with the largest micro-batch that fits; None if none does."""
    for micro in micro_batches:
        if job.global_batch % (micro * job.processes):
            continue
        trial = job._replace(micro_batch=micro, out=f"{job.out}-{micro}")
        try:
            found = (ours if job.case.program == "ours" else trl)(trial)
        except OutOfMemory:
            print(f"    micro-batch {micro}: out of memory", file=sys.stderr, flush=True)
            continue
        return {**found, "micro_batch": micro, "mfu": mfu_of(job, found["slot_tokens_per_s"])}
    return None


def mfu_of(job: Job, slot_tokens_per_s: float) -> float | None:
    """By the same count of operations for all cases; None where the chip's peak is not known."""
    import torch

    from torchprime.metrics.throughput import mfu
    from torchprime.models.architecture import architecture_from_hf
    from torchprime.models.decoder import CausalLM
    from torchprime.training.setup.plan import ParameterCounts, flops_per_token

    a = architecture_from_hf(job.architecture)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in CausalLM(a).parameters())
    return mfu(
        slot_tokens_per_s=slot_tokens_per_s,
        flops_per_token=flops_per_token(a, ParameterCounts(parameters, 0), job.block_size),
        device_kind=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        num_chips=job.processes,
    )


def summary(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Ours over TRL, the best of each, and MFU of ours."""

    def best(who: str) -> Mapping[str, Any] | None:
        rows = [each for name, each in results.items() if name.startswith(who) and each]
        return max(rows, key=lambda each: each["supervised_tokens_per_s"], default=None)

    we, they = best("ours"), best("TRL")
    ratio = None
    if we is not None and they is not None:
        ratio = we["supervised_tokens_per_s"] / they["supervised_tokens_per_s"]
    return {"ratio": ratio, "mfu": we["mfu"] if we else None}


def markdown(report: Mapping[str, Any]) -> str:
    """Return the tables for docs/benchmarks.md."""
    machine = report["machine"]
    chips = f"{len(machine['gpus'])} x {machine['gpus'][0]}" if machine["gpus"] else machine["cpu"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [f"{chips}, {machine['date']}; {versions}. `{report['command']}`", ""]
    lines += [
        "| shape | case | micro-batch | supervised tok/s | slot tok/s | MFU | peak GiB | s/step | "
        "attention, loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape, results in report["shapes"].items():
        for name, r in results.items():
            if r is None:
                lines.append(f"| {shape} | {name} | out of memory | | | | | | |")
                continue
            share = f"{r['mfu']:.1%}" if r["mfu"] is not None else ""
            lines.append(
                f"| {shape} | {name} | {r['micro_batch']} | {r['supervised_tokens_per_s']:,.0f} "
                f"| {r['slot_tokens_per_s']:,.0f} | {share} | {r['peak_bytes'] / 2**30:.1f} "
                f"| {r['step_seconds']:.2f} | {r['attention']}, {r['loss']} |"
            )
    lines += ["", "| shape | ours to TRL's best, supervised tok/s | wanted | MFU | wanted |"]
    lines += ["|---|---|---|---|---|"]
    for shape, found in report["summary"].items():
        ratio = f"{found['ratio']:.2f}" if found["ratio"] else ""
        share = f"{found['mfu']:.1%}" if found["mfu"] is not None else ""
        wanted = f"{WANTED_MFU:.0%}" if shape == "8b" else ""
        lines.append(f"| {shape} | {ratio} | {WANTED_RATIO} | {share} | {wanted} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases one after the other; the exit code."""
    args = arguments(argv)
    if args.work:
        work(args.work)
        return 0
    import torch

    if not args.tiny and not torch.cuda.is_available():
        sys.exit("there is no GPU here: --tiny runs the whole way on a CPU, without a meaning")
    processes = args.processes or max(1, torch.cuda.device_count())
    rows = args.rows or (ROWS if ROWS.is_file() else SHIPPED_ROWS)
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = args.tokenizer or args.out / "tokenizer"
    if args.tokenizer is None:
        tokenizer.mkdir(exist_ok=True)
        train_tokenizer(rows, tokenizer)
    names = args.only.split(";") if args.only else list(TINY_CASES if args.tiny else CASES)
    shapes = ["tiny"] if args.tiny else args.shapes.split(";")
    found: dict[str, dict[str, Any]] = {}
    for shape in shapes:
        architecture = architecture_of(shape, tokenizer)
        for name in names:
            print(f"running: {shape}, {name}", file=sys.stderr, flush=True)
            place = args.out / f"{shape}-{list(CASES).index(name)}-{time.time_ns()}"
            job = Job(
                shape=shape,
                architecture=architecture,
                case=CASES[name],
                rows=str(rows.resolve()),
                tokenizer=str(Path(tokenizer).resolve()),
                out=str(place.resolve()),
                processes=processes,
                micro_batch=0,
                global_batch=args.blocks,
                block_size=args.block_size,
                steps=args.steps,
                optimizer=args.optimizer,
            )
            micro_batches = [int(each) for each in args.micro_batches.split(";")]
            found.setdefault(shape, {})[name] = measure(job, micro_batches)
    report = {
        "machine": describe_machine(),
        "command": " ".join(["python", "benchmarks/gpu_sft.py", *(argv or sys.argv[1:])]),
        "settings": {
            "block_size": args.block_size,
            "blocks_per_update": args.blocks,
            "steps": args.steps,
            "optimizer": args.optimizer,
            "processes": processes,
            "rows": rows.name,
        },
        "shapes": found,
        "summary": {shape: summary(results) for shape, results in found.items()},
    }
    (args.out / "gpu_sft.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    table = markdown(report)
    (args.out / "gpu_sft.md").write_text(table, encoding="utf-8")
    print(table)
    return 0


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; --tiny only changes defaults."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--tiny", action="store_true", help="a tiny shape on the CPU")
    add("--shapes", default="1b;8b", help=f"of {', '.join(SHAPES)}, separated by semicolons")
    add("--only", help="names of cases, separated by semicolons")
    add("--processes", type=int, help="default: one per GPU")
    add("--rows", type=Path, help="GSM8K's train.jsonl: question and answer")
    add("--tokenizer", type=Path, help="a folder; default: trained on the rows")
    add("--out", type=Path, default=REPO / "outputs" / "gpu_sft")
    add("--blocks", type=int, help="per update, over all processes (32)")
    add("--block-size", type=int, help="tokens (4,096)")
    add("--steps", type=int, help=f"a multiple of {LAP}; the first {LAP} do not count (25)")
    add("--micro-batches", help="blocks per process to try, the largest first (8;4;2;1)")
    add("--optimizer", choices=("adamw", "adafactor"), default="adamw")
    add("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    usual: dict[str, Any] = {"blocks": 32, "block_size": 4096, "steps": 25}
    usual["micro_batches"] = "8;4;2;1"
    if args.tiny:
        usual = {"blocks": 4, "block_size": 512, "steps": 2 * LAP, "micro_batches": "2"}
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


if __name__ == "__main__":
    sys.exit(main())
