"""The same small experiment on every backend, mesh and mode, and whether all curves agree.

    make parity    # or: python experimental/parity_matrix/run.py [--steps N] [--only NAME;...]

One config, one data order, fp32: XLA on one device, FSDP, FSDP x tensor, scan with remat,
accumulation; torch.distributed with one, two and four processes; and transformers' own Trainer as
an independent witness. `torchprime compare` judges them; its table and figure go into
docs/parity.md. Real weights and rows (../shared) are used when they are there, the shipped ones
otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from torchprime.cli.comparing import compare_main

REPO = Path(__file__).resolve().parents[2]
SHARED = REPO.parent / "shared"
PAGE = REPO / "docs" / "parity.md"
BEGIN, END = "<!-- matrix: written by make parity -->", "<!-- end of matrix -->"

XLA, NATIVE, WITNESS = "torch_xla", "torch_native", "transformers"
# name -> backend, processes or virtual devices, overrides
CASES: dict[str, tuple[str, int, list[str]]] = {
    "xla, 1 device": (XLA, 1, []),
    "xla, fsdp 4": (XLA, 4, ["ici_mesh.fsdp=4"]),
    "xla, fsdp 2 x tensor 2": (XLA, 4, ["ici_mesh.fsdp=2", "ici_mesh.tensor=2"]),
    "xla, scan and remat": (XLA, 1, ["remat=scan_full"]),
    "xla, 4 micro-batches": (XLA, 1, ["task.gradient_accumulation_steps=4"]),
    "native, 1 process": (NATIVE, 1, []),
    "native, fsdp 2": (NATIVE, 2, ["ici_mesh.fsdp=2"]),
    "native, data 2 x fsdp 2": (NATIVE, 4, ["ici_mesh.data=2", "ici_mesh.fsdp=2"]),
    "native, fsdp 2 x tensor 2": (NATIVE, 4, ["ici_mesh.fsdp=2", "ici_mesh.tensor=2"]),
    "transformers.Trainer": (WITNESS, 1, []),
}


def experiment(steps: int) -> list[str]:
    """What all cases have in common."""
    weights, rows = SHARED / "models" / "stories260K", SHARED / "data" / "gsm8k" / "train.jsonl"
    if weights.is_dir() and rows.is_file():
        source = [
            f"model.pretrained_model={weights}", "dataset=file",
            f"dataset.file_dataset_path={rows}", "dataset.block_size=512",
            "dataset.max_rejected_fraction=1.0",
        ]  # fmt: skip
    else:
        source = ["model=quickstart", "dataset=quickstart", "dataset.block_size=256"]
    return [
        *source, "task=sft", "eval=none", "torch_dtype=float32", f"task.max_steps={steps}",
        "task.global_batch_size=8", "task.optimizer.learning_rate=1e-3",
        "task.lr_scheduler.name=cosine", "task.lr_scheduler.warmup_steps=5", "logging_steps=1",
    ]  # fmt: skip


def command_of(backend: str, count: int) -> list[str]:
    """How the case's program is started."""
    if backend == XLA:
        return [sys.executable, str(REPO / "torchprime" / "torch_xla_models" / "train.py")]
    if backend == WITNESS:
        script = REPO / "experimental" / "torchrun_gpu_sft" / "hf_witness.py"
        return [sys.executable, str(script)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launch, f"--nproc_per_node={count}", "-m", "torchprime.torch_native.train"]


def run_case(name: str, out: Path, steps: int) -> Path:
    """Train one case; its run folder."""
    backend, count, overrides = CASES[name]
    folder = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    environment = {key: value for key, value in os.environ.items() if key != "CPU_NUM_DEVICES"}
    if backend == XLA:
        environment["PJRT_DEVICE"] = "CPU"
    else:
        environment["OMP_NUM_THREADS"] = "1"  # threads that spin on shared cores cost more
    place = [f"output_dir={out}", f"run_name={folder}"]
    started = time.perf_counter()
    done = subprocess.run(
        [*command_of(backend, count), *experiment(steps), *overrides, *place],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
    print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    return out / folder


def main() -> int:
    """Run the cases one after the other, compare, and write the page; the verdict's exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", help="names of cases, separated by semicolons")
    parser.add_argument("--out", type=Path, default=REPO / "outputs" / "parity")
    parser.add_argument("--page", action="store_true", help="write table and figure into docs/")
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    names = args.only.split(";") if args.only else list(CASES)
    runs = [f"{name}={run_case(name, args.out, args.steps)}" for name in names]
    verdict = compare_main([*runs, "--out", str(args.out), "--figure", "matrix"])
    if args.page:
        write_page(args.out)
    return verdict


def write_page(out: Path) -> None:
    """The verdict's table and figure, between the marks in docs/parity.md."""
    verdict = json.loads((out / "parity.json").read_text(encoding="utf-8"))
    shutil.copyfile(out / "matrix.png", PAGE.parent / "figures" / "parity_matrix.png")
    lines = [
        f"{verdict['steps']['judged']} steps, {len(verdict['pairs']) + 1} runs, reference "
        f"`{verdict['reference']}`: **{verdict['verdict']}**. Largest relative differences:",
        "",
        "![The curves of all runs lie on each other](figures/parity_matrix.png)",
        "",
        "| run | same batches | loss | gradient norm | verdict |",
        "|---|---|---|---|---|",
    ]
    for pair in verdict["pairs"]:
        worst = {q: pair["quantities"][q]["worst"]["relative"] for q in ("loss", "grad_norm")}
        same = "yes" if pair["data"]["same"] else "no"
        lines.append(
            f"| {pair['run']} | {same} | {worst['loss']:.1e} | {worst['grad_norm']:.1e} "
            f"| {pair['verdict']} |"
        )
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    body = "\n".join(lines)
    PAGE.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
