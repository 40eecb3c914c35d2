"""Train one small experiment on every backend, mesh and mode, and compare all curves.

    make parity    # or: python experimental/parity_matrix/run.py [--reduced] [--only NAME;...]
                   # and: python experimental/parity_matrix/run.py --adapters [--only NAME;...]
                   # and: python experimental/parity_matrix/run.py --losses [--only NAME;...]
    make noise     # or: python experimental/parity_matrix/run.py --noise

One config, one data order: XLA on one device, FSDP, FSDP x tensor, scan with remat, accumulation;
torch.distributed with one, two and four processes; and transformers' own Trainer as an independent
witness. `torchprime compare` judges them.

By default the experiment is in fp32 and the bands are fixed. It uses the weights and rows of
../shared if they exist, otherwise the shipped ones.

With --adapters it trains adapters: each row of ADAPTED on its cases, with PEFT in the witness. The
first case of a row is the reference of the others. The trained tensors after the last step are
compared, too. After an interruption --resume runs only the cases that are missing.

With --losses it trains the variants of the loss: each row of LOSSES on its cases.

With --noise it is in bf16, on the shipped ones. Runs of one backend that differ in accumulation and
mesh give the noise floor. The other backend and the witness are judged by it. Runs that are wrong
on purpose must not pass.

With --page the tables, the figure and the floor go into the repository.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from weights import largest_difference

from torchprime.cli.compare import compare_main
from torchprime.compare.verdict import AGREE, DIFFER
from torchprime.files.atomic import write_json

REPO = Path(__file__).resolve().parents[2]
SHARED = REPO.parent / "shared"
PAGE = REPO / "docs" / "parity.md"
FLOOR = Path(__file__).with_name("bf16_noise_floor.json")

XLA, NATIVE, WITNESS = "torch_xla", "torch_native", "transformers"


class Case(NamedTuple):
    """One way to run the experiment."""

    backend: str
    processes: int  # or virtual devices
    overrides: Sequence[str] = ()


CASES = {
    "xla, 1 device": Case(XLA, 1),
    "xla, fsdp 4": Case(XLA, 4, ["ici_mesh.fsdp=4"]),
    "xla, fsdp 2 x tensor 2": Case(XLA, 4, ["ici_mesh.fsdp=2", "ici_mesh.tensor=2"]),
    "xla, scan and remat": Case(XLA, 1, ["remat=scan_full"]),
    "xla, 4 micro-batches": Case(XLA, 1, ["task.gradient_accumulation_steps=4"]),
    "native, 1 process": Case(NATIVE, 1),
    "native, fsdp 2": Case(NATIVE, 2, ["ici_mesh.fsdp=2"]),
    "native, data 2 x fsdp 2": Case(NATIVE, 4, ["ici_mesh.data=2", "ici_mesh.fsdp=2"]),
    "native, fsdp 2 x tensor 2": Case(NATIVE, 4, ["ici_mesh.fsdp=2", "ici_mesh.tensor=2"]),
    "transformers.Trainer": Case(WITNESS, 1),
}
# The part of the matrix that fits into a test, which compares only the curves.
REDUCED_STEPS, CURVES_ALONE = 8, ["isolation_probe=false", "task.export_checkpoint_path=null"]
REDUCED = (
    "xla, 1 device", "xla, fsdp 2 x tensor 2", "native, 1 process", "native, fsdp 2",
    "transformers.Trainer",
)  # fmt: skip


class Row(NamedTuple):
    """An adapter or a loss, and the cases that train it."""

    overrides: Sequence[str]
    cases: Sequence[str]
    random_base: bool = False  # of sizes that nf4 can store on every mesh
    rate: str = "1e-2"  # lower if an update at 1e-2 amplifies any rounding


ON_XLA = [name for name, case in CASES.items() if case.backend == XLA]
ALONE, TRAINER, SQUARE = "native, 1 process", "transformers.Trainer", "xla, fsdp 2 x tensor 2"
TWO, FOUR = "native, fsdp 2", "native, data 2 x fsdp 2"
TENSOR = "native, fsdp 2 x tensor 2"
GRID = [*ON_XLA, ALONE, TWO, FOUR, TRAINER]
# PEFT draws its dropout masks from torch's generator, so the witness is in rows without dropout.
DROPOUT = "adapter.dropout=0.1"
DECAY = "task.optimizer.weight_decay=0.1"
ADAPTED = {
    "lora": Row(["adapter=lora", DECAY], [*GRID, TENSOR]),
    "lora, dropout": Row(["adapter=lora", DROPOUT], [*ON_XLA, ALONE, TWO, FOUR, TENSOR]),
    "lora, one layer": Row(
        ["adapter=lora", "adapter.layers=[1]"], [SQUARE, TENSOR, TRAINER], rate="1e-3"
    ),
    "rslora": Row(["adapter=lora", "adapter.scaling=rslora"], GRID, rate="1e-3"),
    "lora, whole norm and embedding": Row(
        ["adapter=lora", "adapter.modules_to_train=[model.norm,embed_tokens]"], GRID, rate="1e-3"
    ),
    "dora": Row(["adapter=dora", DECAY], GRID),
    "int8": Row(["adapter=lora", "adapter.base_dtype=int8"], GRID),
    "nf4": Row(["adapter=qlora"], GRID, random_base=True, rate="1e-3"),
    "nf4, dora, dropout": Row(
        ["adapter=qlora", "adapter.dora=true", DROPOUT],
        [SQUARE, ALONE, FOUR],
        random_base=True,
        rate="1e-3",
    ),
}

MESHES = ["xla, 1 device", SQUARE, "xla, 4 micro-batches", TWO]
EXAMPLES, SMOOTHED = "task.loss.average=examples", "task.loss.label_smoothing=0.1"
DFT, Z_LOSS = "task.loss.dft=true", "task.loss.z_loss=1e-3"
NEAR = ["regularization.l2_sp.strength=0.1", "regularization.kl.coefficient=0.5"]
LOSSES = {
    "examples": Row([EXAMPLES], [*MESHES, TRAINER]),
    "smoothing, z-loss": Row([SMOOTHED, Z_LOSS], [*MESHES, TRAINER]),
    "dft": Row([DFT], [*MESHES, TRAINER]),
    "examples, smoothing, z-loss": Row([EXAMPLES, SMOOTHED, Z_LOSS], [SQUARE, TWO, TRAINER]),
    "examples, dft, z-loss": Row([EXAMPLES, DFT, Z_LOSS], [SQUARE, TWO, TRAINER]),
    "l2-sp": Row(["regularization.l2_sp.strength=0.1"], [*MESHES, TRAINER]),
    "kl": Row(["regularization.kl.coefficient=0.5"], [*MESHES, TRAINER]),
    "l2-sp, kl on all": Row([*NEAR, "regularization.kl.on=all"], [*MESHES, "xla, scan and remat"]),
    # transformers draws its noise from torch's generator.
    "noise on embeddings": Row(["task.neftune_noise_alpha=5"], [*MESHES, "xla, scan and remat"]),
}

# In bf16: runs whose spread is the floor, runs judged by it, and runs that it must reject.
FLOOR_CASES = {
    "native, 1 process": CASES["native, 1 process"],
    "native, 4 micro-batches": Case(NATIVE, 1, ["task.gradient_accumulation_steps=4"]),
    "native, fsdp 2": CASES["native, fsdp 2"],
}
JUDGED_CASES = {
    name: CASES[name]
    for name in ("native, fsdp 2 x tensor 2", "xla, 1 device", "transformers.Trainer")
}
WRONG_CASES = {
    "native, another beta1": Case(NATIVE, 1, ["task.optimizer.betas=[0.85,0.999]"]),
    "native, no clipping": Case(NATIVE, 1, ["task.max_grad_norm=null"]),
}

# Of a trained tensor after the last step: the norm of its difference over its norm.
WEIGHT_BAND = 1e-3

# Smaller batches than all weights' matrix has: there are seven times as many runs.
SMALL = [*CURVES_ALONE, "dataset.block_size=256", "task.global_batch_size=4"]
STEPS = "task.max_steps"
SHIPPED = ["model=quickstart", "dataset=quickstart", "dataset.block_size=256"]
RECIPE = [
    "task=sft", "eval=none", "task.global_batch_size=8", "task.lr_scheduler.warmup_steps=5",
    "logging_steps=1",
]  # fmt: skip


# Running ------------------------------------------------------------------------------------------


def experiment(steps: int) -> list[str]:
    """Return the overrides that all cases share, with real weights and rows if they are there."""
    weights, rows = SHARED / "models" / "stories260K", SHARED / "data" / "gsm8k" / "train.jsonl"
    if not (weights.is_dir() and rows.is_file()):
        return on_shipped(steps)
    real = [
        f"model.pretrained_model={weights}", "dataset=file", f"dataset.file_dataset_path={rows}",
        "dataset.block_size=512", "dataset.max_rejected_fraction=1.0",
    ]  # fmt: skip
    return [*real, *_in_fp32(steps)]


def on_shipped(steps: int) -> list[str]:
    """Return the same overrides with the weights and rows that ship."""
    return [*SHIPPED, *_in_fp32(steps)]


def _in_fp32(steps: int) -> list[str]:
    return [
        *RECIPE, "torch_dtype=float32", "task.optimizer.learning_rate=1e-3",
        "task.lr_scheduler.name=cosine", f"{STEPS}={steps}",
    ]  # fmt: skip


def adapter_experiment(row: Row, steps: int, out: Path) -> list[str]:
    """Return the overrides that all cases of an adapter share."""
    shared = [*SMALL, *row.overrides]
    shared.append(f"task.optimizer.learning_rate={row.rate}")
    shared.append(f"checkpoint.every_steps={steps}")
    if not row.random_base:
        return [*experiment(steps), *shared]
    base = f"model.pretrained_model={random_base(out)}"
    return [*on_shipped(steps), *shared, base]


def random_base(out: Path) -> Path:
    """Make a base whose inputs are whole blocks of nf4 on four devices; return its folder."""
    folder = out / "random_base"
    if folder.is_dir():
        return folder
    # late: most uses of this script need no transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    shipped = REPO / "torchprime" / "assets" / "quickstart" / "base"
    config = LlamaConfig.from_pretrained(shipped)
    config.update({"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2})
    config.update({"head_dim": 64})
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in shipped.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def bf16_experiment(steps: int) -> list[str]:
    """Return the overrides of the experiment in bf16.

    The learning rate is constant, so a shorter run equals the beginning of a longer one, and one
    floor holds for both. It is lower, since at 1e-3 rounding decides the path of these weights,
    and the floor would be too high to reject anything.
    """
    return [
        *SHIPPED, *RECIPE, "torch_dtype=bfloat16", "task.optimizer.learning_rate=1e-4",
        "task.lr_scheduler.name=constant", f"{STEPS}={steps}",
    ]  # fmt: skip


def command_of(backend: str, count: int) -> list[str]:
    """Return the command that starts the case's program."""
    if backend == XLA:
        return [sys.executable, str(REPO / "torchprime" / "torch_xla_models" / "train.py")]
    if backend == WITNESS:
        script = REPO / "experimental" / "torchrun_gpu_sft" / "hf_witness.py"
        return [sys.executable, str(script)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launch, f"--nproc_per_node={count}", "-m", "torchprime.torch_native.train"]


def folder_of(name: str) -> str:
    """Return a folder's name for a case."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def run_case(name: str, case: Case, overrides: Sequence[str], out: Path) -> str:
    """Train one case, unless it was done, and return `NAME=FOLDER`, as compare takes it."""
    folder = folder_of(name)
    done = out / f"{folder}.done"
    if done.is_file():
        return f"{name}={out / folder}"
    shutil.rmtree(out / folder, ignore_errors=True)  # of a run that was interrupted
    environment = {key: value for key, value in os.environ.items() if key != "CPU_NUM_DEVICES"}
    if case.backend == XLA:
        environment["PJRT_DEVICE"] = "CPU"
    else:
        environment["OMP_NUM_THREADS"] = "1"  # threads that spin on shared cores cost more
    place = [f"output_dir={out}", f"run_name={folder}"]
    command = [*command_of(case.backend, case.processes), *overrides, *case.overrides, *place]
    started = time.perf_counter()
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{name} failed:\n{ended.stderr[-3000:]}")
    print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    done.touch()
    return f"{name}={out / folder}"


def run_cases(cases: Mapping[str, Case], overrides: Sequence[str], out: Path) -> list[str]:
    """Train the cases one after the other."""
    return [run_case(name, case, overrides, out) for name, case in cases.items()]


# Judging ------------------------------------------------------------------------------------------


def judge(runs: Sequence[str], out: Path, *options: str) -> dict[str, Any]:
    """Return the verdict of compare, as in its parity.json."""
    compare_main([*runs, "--out", str(out), *options])
    return json.loads((out / "parity.json").read_text(encoding="utf-8"))


def run_reduced(out: Path) -> int:
    """Run a few cases and steps in fp32; return the exit code."""
    cases = {name: CASES[name] for name in REDUCED}
    runs = run_cases(cases, [*experiment(REDUCED_STEPS), *CURVES_ALONE], out)
    return compare_main([*runs, "--out", str(out), "--figure", "none"])


def run_matrix(cases: Mapping[str, Case], steps: int, out: Path, page: bool) -> int:
    """Run all cases in fp32, judge them by the fixed bands and return the exit code."""
    runs = run_cases(cases, experiment(steps), out)
    verdict = judge(runs, out, "--figure", "matrix")
    if page:
        shutil.copyfile(out / "matrix.png", PAGE.parent / "figures" / "parity_matrix.png")
        write_page("matrix", matrix_lines(verdict))
    return 0 if verdict["verdict"] == AGREE else 1


def run_adapters(rows: Mapping[str, Row], steps: int, out: Path, page: bool) -> int:
    """Train each adapter on its cases, judge by the fixed bands and return the exit code."""
    found = {}
    for name, row in rows.items():
        place = out / folder_of(name)
        cases = {case: CASES[case] for case in row.cases}
        print(f"{name}:", flush=True)
        runs = run_cases(cases, adapter_experiment(row, steps, out), place)
        found[name] = judge(runs, place, "--figure", "none")
        for pair in found[name]["pairs"]:
            folders = (place / folder_of(pair["run"]), place / folder_of(row.cases[0]))
            pair["weights"] = largest_difference(*folders, steps)
        print("\n".join(adapter_lines({name: found[name]})), flush=True)
    if page:
        write_page("adapters", adapter_lines(found))
    return 0 if all(map(agrees, found.values())) else 1


def run_losses(rows: Mapping[str, Row], steps: int, out: Path, page: bool) -> int:
    """Train with each loss on its cases, judge by the fixed bands and return the exit code."""
    found = {}
    for name, row in rows.items():
        place, cases = out / folder_of(name), {case: CASES[case] for case in row.cases}
        print(f"{name}:", flush=True)
        runs = run_cases(cases, [*experiment(steps), *SMALL, *row.overrides], place)
        found[name] = judge(runs, place, "--figure", "none")
        print("\n".join(rows_of(found[name])), flush=True)
    if page:
        write_page("losses", loss_lines(found))
    return 0 if all(verdict["verdict"] == AGREE for verdict in found.values()) else 1


def agrees(verdict: Mapping[str, Any]) -> bool:
    """Return True if the curves of an adapter's runs and their trained tensors agree."""
    near = all(pair["weights"] <= WEIGHT_BAND for pair in verdict["pairs"])
    return near and verdict["verdict"] == AGREE


def run_noise(steps: int, out: Path, page: bool) -> int:
    """Measure bf16's noise, judge by it, check that wrong runs fail; return the exit code."""
    overrides = bf16_experiment(steps)
    alike = run_cases(FLOOR_CASES, overrides, out)
    floor = out / FLOOR.name
    if compare_main(["--measure-noise", *alike, "--out", str(floor)]):
        return 2
    content = json.loads(floor.read_text(encoding="utf-8"))
    for run in content["runs"]:
        run["path"] = Path(run["path"]).name  # its path on this machine is of no use
    write_json(floor, content)
    found = {}
    for expected, cases in ((AGREE, JUDGED_CASES), (DIFFER, WRONG_CASES)):
        runs = [alike[0], *run_cases(cases, overrides, out)]
        found[expected] = judge(runs, out, "--noise-floor", str(floor), "--figure", expected)
    if page:
        shutil.copyfile(floor, FLOOR)
        write_page("noise", noise_lines(content, found))
    right = all(p["verdict"] == e for e, verdict in found.items() for p in verdict["pairs"])
    return 0 if right else 1


# The page -----------------------------------------------------------------------------------------

TABLE = ["| run | same batches | loss | gradient norm | verdict |", "|---|---|---|---|---|"]


def rows_of(verdict: Mapping[str, Any]) -> list[str]:
    """Return a line of the table for each run, with its largest relative differences."""
    lines = []
    for pair in verdict["pairs"]:
        worst = {q: pair["quantities"][q]["worst"]["relative"] for q in ("loss", "grad_norm")}
        same = "yes" if pair["data"]["same"] else "no"
        first = pair["first_beyond"]
        at = f", first at step {first['step']} ({first['quantity']})" if first else ""
        lines.append(
            f"| {pair['run']} | {same} | {worst['loss']:.1e} | {worst['grad_norm']:.1e} "
            f"| {pair['verdict']}{at} |"
        )
    return lines


def matrix_lines(verdict: Mapping[str, Any]) -> list[str]:
    """Return the page's lines on the fp32 matrix."""
    return [
        f"{len(verdict['pairs']) + 1} runs of {verdict['steps']['judged']} steps, compared with "
        f"`{verdict['reference']}`: **{verdict['verdict']}**. Largest relative differences:",
        "",
        "![The loss curves of all runs coincide](figures/parity_matrix.png)",
        "",
        *TABLE,
        *rows_of(verdict),
    ]


def adapter_lines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the page's lines on adapters."""
    lines = [f"| adapter {TABLE[0]} tensors |", f"|---{TABLE[1]}---|"]
    for name, verdict in found.items():
        for line, pair in zip(rows_of(verdict), verdict["pairs"], strict=True):
            lines.append(f"| {name} {line} {pair['weights']:.1e} |")
    return lines


def loss_lines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the page's lines on losses."""
    lines = [f"| loss {TABLE[0]}", f"|---{TABLE[1]}"]
    for name, verdict in found.items():
        lines += [f"| {name} {line}" for line in rows_of(verdict)]
    return lines


def noise_lines(floor: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the page's lines on bf16."""
    spreads, factor = floor["spreads"], floor["factor"]
    measured = ", ".join("`{}`".format(run["label"]) for run in floor["runs"])
    lines = [
        f"{floor['dtype']}, noise floor of {measured}:",
        "",
        "| quantity | median spread | largest spread | widest band |",
        "|---|---|---|---|",
    ]
    for name, title in (("loss", "loss"), ("grad_norm", "gradient norm")):
        values = sorted(spreads[name].values())
        middle, most = values[len(values) // 2], values[-1]
        lines.append(f"| {title} | {middle:.1e} | {most:.1e} | {factor * most:.1e} |")
    reference = found[AGREE]["reference"]
    lines += ["", f"Verdicts by this floor, with `{reference}` as the reference:", "", *TABLE]
    return [*lines, *rows_of(found[AGREE]), *rows_of(found[DIFFER])]


def write_page(name: str, lines: Sequence[str]) -> None:
    """Write the lines between the marks of that name in docs/parity.md."""
    begin, end = f"<!-- {name}: written by the tool -->", f"<!-- end of {name} -->"
    text = PAGE.read_text(encoding="utf-8")
    assert begin in text and end in text, f"{PAGE} has no place for {name}"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    body = "\n".join(lines)
    PAGE.write_text(f"{before}{begin}\n{body}\n{end}{after}", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the experiment, judge it, write the page; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--only", help="names of cases, separated by semicolons")
    parser.add_argument(
        "--reduced", action="store_true", help="what the test runs: few cases and steps"
    )
    parser.add_argument("--adapters", action="store_true", help="train adapters")
    parser.add_argument("--losses", action="store_true", help="train with variants of the loss")
    parser.add_argument("--resume", action="store_true", help="keep the complete cases in --out")
    parser.add_argument("--noise", action="store_true", help="bf16: measure its noise, judge by it")
    parser.add_argument("--out", type=Path, help="default: outputs/parity or outputs/noise")
    parser.add_argument("--page", action="store_true", help="write what was found into docs/")
    args = parser.parse_args(argv)
    kinds = {"noise": args.noise, "adapter_parity": args.adapters, "loss_parity": args.losses}
    kind = next((name for name, asked in kinds.items() if asked), "parity")
    out = args.out or REPO / "outputs" / kind
    if not args.resume:
        shutil.rmtree(out, ignore_errors=True)
    if args.noise:
        return run_noise(args.steps, out, args.page)
    if args.reduced:
        return run_reduced(out)
    known = ADAPTED if args.adapters else LOSSES if args.losses else CASES
    names = args.only.split(";") if args.only else list(known)
    if args.adapters:
        return run_adapters({name: ADAPTED[name] for name in names}, args.steps, out, args.page)
    if args.losses:
        return run_losses({name: LOSSES[name] for name in names}, args.steps, out, args.page)
    return run_matrix({name: CASES[name] for name in names}, args.steps, out, args.page)


if __name__ == "__main__":
    sys.exit(main())
