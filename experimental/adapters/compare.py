"""Compare what is trained: all weights, LoRA of several ranks, DoRA and QLoRA, over several seeds.

    python experimental/adapters/compare.py quickstart --out outputs/adapters
    python experimental/adapters/compare.py rows --model DIR --rows FILE --out outputs/adapters

Each run is the main job in a process of its own. `rows` splits a file of prompts and completions by
passage (the text before the first line break), and asks for exact answers. A run that is complete
is not repeated: after an interruption the same command goes on. The table goes to stdout, all
numbers to results.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

from torchprime.evaluation.intervals import score


class Variant(NamedTuple):
    """A choice of the weights to train."""

    name: str
    overrides: Sequence[str]
    rate: float


class Case(NamedTuple):
    """A model with its rows.

    Attributes:
        rate: the learning rate of all weights.
        adapter_rate: that of adapters.
        adapter: overrides for all adapters, which train whole modules too.
        largest: rank of LoRA that the model's dims allow.
    """

    overrides: Sequence[str]
    rate: float
    adapter_rate: float
    adapter: Sequence[str]
    largest: int

    def variants(self) -> list[Variant]:
        """Return the runs to compare: all weights, adapters, and if these train whole modules too,
        one adapter alone."""
        asked = [("LoRA", rank) for rank in (4, 16, self.largest)] + [("DoRA", 16), ("QLoRA", 16)]
        found = [Variant("all weights", ["adapter=none"], self.rate)]
        found += [self._adapter(kind, rank, self.adapter) for kind, rank in asked]
        int8 = self._adapter("LoRA", 16, (*self.adapter, "adapter.base_dtype=int8"))
        found.append(int8._replace(name=f"{int8.name}, int8 base"))
        if self.adapter:
            alone = self._adapter("LoRA", 16, ())
            found.append(alone._replace(name=f"{alone.name}, alone"))
        return found

    def _adapter(self, kind: str, rank: int, more: Sequence[str]) -> Variant:
        """Return a run that trains an adapter; alpha is twice the rank."""
        options = [f"adapter={kind.lower()}", f"adapter.rank={rank}", f"adapter.alpha={2 * rank}"]
        return Variant(f"{kind}, rank {rank}", [*options, *more], self.adapter_rate)


BACKEND = ["--backend", "native"]  # nothing to compile, and the losses are those of XLA
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # a thread that waits for another would count as busy
COMMON = ["logging_steps=50", "task.sample_prompts=0", "export.which=last", "mesh=single"]


class Result(TypedDict):
    """One run. `right` of `asked` answers were right; `bytes` are those of a checkpoint."""

    variant: str
    seed: int
    right: int
    asked: int
    eval_loss: float
    trained: int
    parameters: int
    bytes: int
    cpu_seconds: float


def quickstart() -> Case:
    """Return the shipped model and rows."""
    overrides = ["--config-name", "quickstart", "eval.every_steps=150", "task.max_steps=150"]
    return Case(overrides, 1e-3, 1e-2, (), largest=64)


def own_rows(model: Path, rows: Path, out: Path) -> Case:
    """Return a model and a file of rows, a quarter of whose passages are held out.

    The embedding is trained beside an adapter: such a base may never have ended a text, and then
    the row of its end token has to be learned.
    """
    sides: dict[bool, list[str]] = {True: [], False: []}
    for line in rows.read_text().splitlines():
        passage = json.loads(line)["prompt"].split("\n")[0]
        sides[int(hashlib.sha256(passage.encode()).hexdigest(), 16) % 4 == 0].append(line)
    for name, held_out in (("train", False), ("test", True)):
        (out / f"{name}.jsonl").write_text("\n".join(sides[held_out]) + "\n")
    overrides = [
        f"model.pretrained_model={model}",
        "dataset=file",
        f"dataset.file_dataset_path={out / 'train.jsonl'}",
        "dataset.block_size=256",
        "eval=file",
        f"eval.file_dataset_path={out / 'test.jsonl'}",
        "eval.every_steps=84",
        f"eval.generate.max_examples={len(sides[True])}",
        "eval.generate.max_new_tokens=12",
        "eval.graders=[{name: answer_accuracy, kind: exact_match}]",
        "task.global_batch_size=4",
        "task.max_steps=84",
        "task.lr_scheduler.name=cosine",
        "task.lr_scheduler.warmup_steps=5",
    ]
    return Case(overrides, 1e-3, 3e-3, ("adapter.modules_to_train=[embed_tokens]",), largest=32)


def run(variant: Variant, seed: int, case: Case, out: Path) -> Result:
    """Train once, unless it was done, and return the result."""
    name = f"{variant.name.replace(', ', '-').replace(' ', '-').lower()}-{seed}"
    folder, done = out / name, out / f"{name}.seconds"
    if not done.is_file():
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
        argv = [
            *(sys.executable, "-m", "torchprime.cli.main", "train", *BACKEND),
            *(*case.overrides, *COMMON),
            *variant.overrides,
            f"task.optimizer.learning_rate={variant.rate}",
            *("checkpoint.every_steps=1000000", "task.export_checkpoint_path=null"),
            *(f"seed={seed}", f"output_dir={out}", f"run_name={name}"),
        ]
        before = cpu_seconds()
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, env=os.environ | ONE_THREAD)
        done.write_text(str(cpu_seconds() - before))
    return read(folder, variant.name, seed, float(done.read_text()))


def cpu_seconds() -> float:
    """Return the CPU time of all runs so far, which other work on the machine changes little."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def read(folder: Path, variant: str, seed: int, seconds: float) -> Result:
    """Return a finished run's result, from its records."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [r for r in records if r.get("kind") == "eval"][-1]
    saved = [r["bytes"] for r in records if r.get("kind") == "checkpoint"]
    plan = json.loads((folder / "run.json").read_text())["plan"]
    score = last["scores"]["answer_accuracy"]
    return {
        "variant": variant,
        "seed": seed,
        "right": round(score["value"] * score["count"]),
        "asked": score["count"],
        "eval_loss": last["eval_loss"],
        "trained": plan["trained_parameters"],
        "parameters": plan["parameters"],
        "bytes": saved[-1] if saved else 0,
        "cpu_seconds": seconds,
    }


def table(results: Sequence[Result]) -> list[str]:
    """Return a Markdown table: each variant's answers over all seeds."""
    lines = [
        "| Trained | right answers | 95% interval | by seed | held-out loss | share trained "
        "| checkpoint, MB | CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for variant in dict.fromkeys(result["variant"] for result in results):
        own = [result for result in results if result["variant"] == variant]
        right, asked = sum(r["right"] for r in own), sum(r["asked"] for r in own)
        pooled = score([1.0] * right + [0.0] * (asked - right))
        assert pooled is not None
        seeds = ", ".join(f"{r['right'] / r['asked']:.1%}" for r in own)
        loss = sum(r["eval_loss"] for r in own) / len(own)
        seconds = sum(r["cpu_seconds"] for r in own) / len(own)
        lines.append(
            f"| {variant} | {right / asked:.1%} | {pooled.low:.1%} to {pooled.high:.1%} "
            f"| {seeds} | {loss:.3f} | {own[0]['trained'] / own[0]['parameters']:.1%} "
            f"| {own[0]['bytes'] / 1e6:.1f} | {seconds:.0f} |"
        )
    return lines


def main() -> None:
    """Train all variants with all seeds, and print the table after each round of seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=["quickstart", "rows"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    out = given.out.absolute() / given.case
    out.mkdir(parents=True, exist_ok=True)
    if given.case == "quickstart":
        case = quickstart()
    elif given.model is None or given.rows is None:
        parser.error("rows needs --model and --rows")
    else:
        case = own_rows(given.model.absolute(), given.rows, out)
    results: list[Result] = []
    for seed in range(1, given.seeds + 1):
        results += [run(each, seed, case, out) for each in case.variants()]
        (out / "results.json").write_text(json.dumps(results, indent=1))
        print("\n".join(table(results)), flush=True)


if __name__ == "__main__":
    main()
