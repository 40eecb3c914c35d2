"""Tokens per second of batch generation: ours under XLA against transformers' generate.

The same weights, prompts and number of new tokens (no stop tokens, so that both make as many),
fp32, greedy, on this machine's CPU. Each case runs in a process of its own; cases alternate, and a
case's figure is the median over all its repeats of all rounds. The first call of each process is
apart: it compiles. Answers of all cases are compared token by token. transformers gets the prompts
as one batch, padded on the left, in each setting of its cache and attention; its best one counts.

Where other work runs beside it, seconds say little, and CPU seconds little too as soon as threads
wait for each other by spinning. `--one-core` gives every case the same one core; tokens per CPU
second then are what it would make alone.

    python benchmarks/generate.py [--json FILE] [--rounds N] [--repeats N] [--one-core]
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
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
ASSETS = REPO / "torchprime" / "assets" / "quickstart"
CASES: dict[str, dict[str, Any]] = {
    "ours": dict(impl="ours"),
    "ours, scanned": dict(impl="ours", scan=True),
    "ours, one device": dict(impl="ours", devices=1),
    "transformers, dynamic, sdpa": dict(impl="hf", cache="dynamic", attention="sdpa"),
    "transformers, dynamic, eager": dict(impl="hf", cache="dynamic", attention="eager"),
    "transformers, static, sdpa": dict(impl="hf", cache="static", attention="sdpa"),
    "transformers, static, eager": dict(impl="hf", cache="static", attention="eager"),
    "transformers, static, compiled": dict(
        impl="hf", cache="static", attention="sdpa", compile=True
    ),
}
# Random weights of a middle size: 44 million parameters.
MIDDLE: dict[str, Any] = dict(
    model_type="llama",
    architectures=["LlamaForCausalLM"],
    vocab_size=16_384,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=4,
    max_position_embeddings=1024,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
SHAPES = ("quickstart", "44M")


def make_folder(shape: str, folder: Path, count: int) -> Path:
    """Write a Hugging Face folder with weights, and `prompts.json` with prompts as token ids."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM, LlamaConfig

    place = folder / shape
    place.mkdir()
    if shape == "quickstart":
        for name in ("config.json", "model.safetensors"):
            (place / name).symlink_to(ASSETS / "base" / name)
        tokenizer = Tokenizer.from_file(str(ASSETS / "base" / "tokenizer.json"))
        rows = (ASSETS / "data" / "test.jsonl").read_text().splitlines()[:count]
        prompts = [tokenizer.encode(json.loads(row)["question"]).ids for row in rows]
    else:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(LlamaConfig(**MIDDLE))
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.data.normal_(0.0, 0.05)
        model.save_pretrained(place)
        g = torch.Generator().manual_seed(1)
        lengths = torch.randint(16, 120, (count,), generator=g).tolist()
        prompts = [torch.randint(0, 16_384, (n,), generator=g).tolist() for n in lengths]
    (place / "prompts.json").write_text(json.dumps(prompts))
    return place


def ours(case: dict[str, Any], folder: Path, new: int) -> Callable[[list], list]:
    """Our backend with a virtual device for each core, and the batch cut over them."""
    from torchprime.torch_xla_models.runtime import prepare_environment

    devices = case.get("devices", len(os.sched_getaffinity(0)))
    prepare_environment(devices)
    import torch
    from safetensors.torch import load_file

    from torchprime.config.compose import compose_config
    from torchprime.config.schema import AXES
    from torchprime.config.sections.remat import RematConfig
    from torchprime.generation.decode import GenerateOptions
    from torchprime.models.architecture import architecture_from_hf
    from torchprime.models.decoder import CausalLM
    from torchprime.sharding import ShardingTable
    from torchprime.torch_xla_models.backend import XlaBackend

    axes: dict[str, int] = dict.fromkeys(AXES, 1)
    mesh = axes | {"data": devices}
    backend = XlaBackend(
        mesh, axes, remat=RematConfig(scan_layers=case.get("scan", False)), full_precision=True
    )
    sharding = compose_config(["model.pretrained_model=x", "task.max_steps=1"]).sharding
    with torch.device("meta"):
        model = CausalLM(architecture_from_hf(json.loads((folder / "config.json").read_text())))
    weights = load_file(folder / "model.safetensors")
    table = ShardingTable(sharding.parameters, sharding.activations)
    backend.place(model, table, lambda name: weights[name], torch.float32)

    def call(prompts: list) -> list:
        options = GenerateOptions(
            max_new_tokens=new, stop_ids=(), max_length=512, batch_size=len(prompts)
        )
        return [answer.ids for answer in backend.generate(prompts, options)]

    return call


def transformers_call(case: dict[str, Any], folder: Path, new: int) -> Callable[[list], list]:
    """Run transformers' generate with all prompts as one batch."""
    os.environ["USE_TORCH_XLA"] = "0"
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=case["attention"]
    ).eval()
    settings: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    settings |= {"pad_token_id": 0, "eos_token_id": None, "use_cache": True}
    if case["cache"] == "static":
        settings["cache_implementation"] = "static"
    if case.get("compile"):
        model.forward = torch.compile(model.forward, dynamic=None)

    def call(prompts: list) -> list:
        length = max(map(len, prompts))
        ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            out = model.generate(input_ids=ids, attention_mask=mask, **settings)
        return out[:, length:].tolist()

    return call


def work(
    case: dict[str, Any], folder: Path, new: int, repeats: int, one_core: bool
) -> dict[str, Any]:
    """One case, in this process."""
    if one_core:  # before a library counts them
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    prompts = json.loads((folder / "prompts.json").read_text())
    call = (ours if case["impl"] == "ours" else transformers_call)(case, folder, new)
    seconds, cpu, found = [], [], []
    for _ in range(repeats + 1):
        started, used = time.perf_counter(), time.process_time()
        found = call(prompts)
        seconds.append(time.perf_counter() - started)
        cpu.append(time.process_time() - used)
    assert all(len(ids) == new for ids in found)
    return {"first": seconds[0], "seconds": seconds[1:], "cpu": cpu[1:], "answers": found}


def run_case(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any] | None:
    """One case in a process of its own; None if it does not run here."""
    command = [sys.executable, __file__, "--work", name, "--folder", str(folder)]
    command += ["--new", str(args.new), "--repeats", str(args.repeats)]
    command += ["--one-core"] if args.one_core else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"{name} does not run: {done.stderr.splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


def measure(shape: str, names: list[str], args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """All cases of a shape, in turns."""
    folder = make_folder(shape, place, args.batch)
    seconds: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    first: dict[str, float] = {}
    answers: dict[str, list] = {}
    for number in range(args.rounds):
        for name in names:
            if number and name not in seconds:
                continue
            print(f"running: {shape}, round {number + 1}: {name}", file=sys.stderr, flush=True)
            if (found := run_case(name, folder, args)) is not None:
                seconds.setdefault(name, []).extend(found["seconds"])
                cpu.setdefault(name, []).extend(found["cpu"])
                first.setdefault(name, found["first"])
                answers[name] = found["answers"]
    truth = answers[next(iter(answers))]
    return {
        name: {
            "tokens_per_s": args.batch * args.new / statistics.median(each),
            "tokens_per_cpu_s": args.batch * args.new / statistics.median(cpu[name]),
            "spread": [args.batch * args.new / x for x in (max(each), min(each))],
            "first_call_seconds": first[name],
            "equal_answers": sum(map(list.__eq__, answers[name], truth)),
        }
        for name, each in seconds.items()
    }


def main() -> None:
    """Run the shapes and print a table and the ratio for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--shapes", default=";".join(SHAPES))
    parser.add_argument("--one-core", action="store_true")
    parser.add_argument("--only", help="names of cases, separated by semicolons")
    parser.add_argument("--work", help=argparse.SUPPRESS)  # a case's name: run it here
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        case = CASES[args.work]
        print(json.dumps(work(case, args.folder, args.new, args.repeats, args.one_core)))
        return
    names = args.only.split(";") if args.only else list(CASES)
    versions = ("torch", "torch_xla", "transformers")
    report: dict[str, Any] = {name: metadata.version(name) for name in versions}
    report |= {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()}
    report |= {"batch": args.batch, "new_tokens": args.new, "shapes": {}}
    with tempfile.TemporaryDirectory() as place:
        for shape in args.shapes.split(";"):
            report["shapes"][shape] = measure(shape, names, args, Path(place))
            show(shape, report["shapes"][shape])
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def show(shape: str, found: dict[str, dict[str, Any]]) -> None:
    """Return a Markdown table and the ratio to the best of the other side."""
    print(f"\n| {shape} | tokens/s | slowest to fastest | per CPU s | first call, s | equal |")
    print("|---|---|---|---|---|---|")
    for name, r in found.items():
        low, high = r["spread"]
        print(
            f"| {name} | {r['tokens_per_s']:,.0f} | {low:,.0f} to {high:,.0f} "
            f"| {r['tokens_per_cpu_s']:,.0f} | {r['first_call_seconds']:.1f} "
            f"| {r['equal_answers']} |"
        )
    for key, what in (("tokens_per_s", "seconds"), ("tokens_per_cpu_s", "CPU seconds")):
        theirs = [r[key] for name, r in found.items() if name.startswith("transformers")]
        if theirs and "ours" in found:
            ratio = found["ours"][key] / max(theirs)
            print(f"\n{ratio:.2f}x transformers' best setting, by {what}")


if __name__ == "__main__":
    main()
