"""Measure data preparation, rows to packed blocks: torchprime, TRL, a plain datasets.map.

The same rows, tokenizer and template for all, in one run, each case in a process of its own, one
after the other. Timed is what a run waits for: reading the file, tokens, labels, packing, and what
is written to disk; imports and loading the tokenizer are not. TRL and `datasets.map` run with one
process and with two, and the ratios are to the faster; the latter only tokenizes, in batches: no
labels, no packing. CPU seconds, those of ended children included, vary less than seconds do where
others use the machine.

    gsm8k      7,473 questions and answers, medians of --repeats as for packing
    synthetic  --rows questions and answers: GSM8K's sentences in new order with new numbers
    chat       --chats conversations with tools, made of 780 with words added to each message, in
               TRL's own training template for Qwen 3 (both read its marks)
    packing    lengths alone, a million of them

    python benchmarks/data_prep.py [--data DIR] [--rows N] [--chats N] [--repeats N] [--workers N]
        [--only NAME;...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

SHARED = Path(__file__).resolve().parents[2] / "shared"
PACKAGES = ("trl", "datasets", "transformers", "tokenizers", "numpy", "pyarrow")
BLOCKS = {"gsm8k": 1024, "synthetic": 1024, "chat": 8192}
NOTHING_KEPT, KEPT, AGAIN = "ours, nothing kept", "ours, kept on disk", "ours, second start"
TRL, TRL_2, TRL_AGAIN = "TRL", "TRL, 2 processes", "TRL, second start"
MAP, MAP_2 = "datasets.map", "datasets.map, 2 processes"
IMPLEMENTATIONS = (NOTHING_KEPT, KEPT, AGAIN, TRL, TRL_2, TRL_AGAIN, MAP, MAP_2)
DERIVED = "ours, own template, spans derived"
MILLION = 1_000_000
CASES = {
    **{f"{data}: {name}": (data, name) for data in BLOCKS for name in IMPLEMENTATIONS},
    f"chat: {DERIVED}": ("chat", DERIVED),
    "packing: bfd": ("packing", "bfd"),
    "packing: bfd_split": ("packing", "bfd_split"),
}


# Rows --------------------------------------------------------------------------------------------


def gsm8k_rows(data: Path) -> list[dict[str, str]]:
    lines = (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = map(json.loads, lines)
    return [prompt_and_completion(row["question"], row["answer"]) for row in rows]


def prompt_and_completion(question: str, answer: str) -> dict[str, str]:
    from torchprime.data.rows.read import QUESTION_PROMPT

    return {"prompt": QUESTION_PROMPT.format(question=question), "completion": answer}


def synthetic_rows(data: Path, count: int) -> Iterator[dict[str, str]]:
    """As long and as varied as GSM8K's, none like another."""
    chance = random.Random(0)
    lines = (data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    sentences = {
        side: [re.split(r"(?<=[.?])\s+|\n", json.loads(line)[side]) for line in lines]
        for side in ("question", "answer")
    }
    number = re.compile(r"\d+")

    def mixed(side: str, between: str) -> str:
        parts = list(chance.choice(sentences[side]))
        chance.shuffle(parts)
        return number.sub(lambda _: str(chance.randrange(1000)), between.join(parts)).strip()

    for _ in range(count):
        yield prompt_and_completion(mixed("question", " "), mixed("answer", "\n"))


def chat_rows(data: Path, count: int) -> Iterator[dict[str, Any]]:
    """Conversations again and again, each message with words of its own; tools, which real
    conversations share, unchanged and as text, as TRL's documentation asks for."""
    lines = (data / "sgd_dev_messages.jsonl").read_text(encoding="utf-8").splitlines()
    for i in range(count):
        row = json.loads(lines[i % len(lines)])
        for message in row["messages"]:
            if message["content"]:
                message["content"] += f" So much for {i}."
        yield {"messages": row["messages"], "tools": json.dumps(row["tools"])}


def write_rows(args: argparse.Namespace, folder: Path, wanted: set[str]) -> None:
    makers: dict[str, Callable[[], Any]] = {
        "gsm8k": lambda: gsm8k_rows(args.data),
        "synthetic": lambda: synthetic_rows(args.data, args.rows),
        "chat": lambda: chat_rows(args.data, args.chats),
    }
    for name in wanted & set(makers):
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in makers[name]())


# One case, in this process -----------------------------------------------------------------------


class Clock:
    """Adds up the seconds inside `with`, on the wall and of processors, ended children included."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), sum(os.times()[:4])

    def __enter__(self) -> Clock:
        self._started = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = self._now()
        self.wall += wall - self._started[0]
        self.cpu += cpu - self._started[1]

    def found(self) -> dict[str, float]:
        return {"seconds": self.wall, "cpu_seconds": self.cpu}


def run_ours(args: argparse.Namespace, data: str, name: str) -> dict[str, Any]:
    """Our preparation; `ours, second start` finds what `ours, kept on disk` left."""
    from torchprime.config.sections.dataset import DatasetConfig
    from torchprime.data.files.source import SourceSpec
    from torchprime.data.prepare import Part, prepare_dataset
    from torchprime.data.templates.choose import resolve_template
    from torchprime.data.tokenizer.load import load_tokenizer
    from torchprime.training.setup.datasets import settings_of

    tokenizer, template = load_tokenizer(args.tokenizer), None
    if data == "chat":
        # The template in a Qwen 3 tokenizer is the original, without TRL's marks.
        template = resolve_template(
            None if name == DERIVED else str(args.template.resolve()), tokenizer
        )
    kept = args.folder / f"ours-{data}-{args.repeat}"
    with Clock() as clock:
        rows = DatasetConfig(
            file_dataset_path=str(args.folder / f"{data}.jsonl"),
            block_size=BLOCKS[data],
            packing="bfd",
        )
        packed, report = prepare_dataset(
            [Part(SourceSpec(file_dataset_path=rows.file_dataset_path))],
            tokenizer,
            settings_of(rows, seed=0),
            template=template,
            keep_in=kept if name in (KEPT, AGAIN) else None,
            workers=args.workers,
        )
    assert report.cached == (name == AGAIN)
    return {
        **clock.found(),
        "rows": report.rows,
        "rejected": report.num_rejected,
        "blocks": packed.num_blocks,
        "real_tokens": packed.real_tokens,
        "supervised_tokens": packed.supervised_tokens,
        "real_share": packed.efficiency,
    }


def run_trl(args: argparse.Namespace, data: str, name: str) -> dict[str, Any]:
    """SFTTrainer's preparation with packing; its datasets cache is empty but for a second start."""
    cache = args.folder / f"trl-{data}-{args.repeat}-{2 if name == TRL_2 else 1}"
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    import datasets
    import numpy as np
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    clock = Clock()

    class Timed(SFTTrainer):
        def _prepare_dataset(self, *arguments: Any, **more: Any) -> Any:
            with clock:
                return super()._prepare_dataset(*arguments, **more)

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    if data == "chat":
        tokenizer.chat_template = args.template.read_text(encoding="utf-8")
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 8)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=1))
    with clock:
        rows = datasets.load_dataset(
            "json", data_files=str(args.folder / f"{data}.jsonl"), split="train"
        )
    assert isinstance(rows, datasets.Dataset)
    trainer = Timed(
        model=model,
        args=SFTConfig(
            output_dir=str(args.folder / "trl"),
            report_to=[],
            use_cpu=True,
            max_length=BLOCKS[data],
            packing=True,
            packing_strategy="bfd",
            dataset_num_proc=2 if name == TRL_2 else None,
            assistant_only_loss=data == "chat",
        ),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    packed = trainer.train_dataset
    assert isinstance(packed, datasets.Dataset)
    table = packed.data.table
    real = sum(len(chunk.flatten()) for chunk in table["input_ids"].chunks)
    # A label of a sequence's first token predicts nothing: transformers shifts it away.
    supervised = 0
    for labels, lengths in zip(table["labels"].chunks, table["seq_lengths"].chunks, strict=True):
        values = labels.flatten().to_numpy(zero_copy_only=False)
        sizes_here = lengths.flatten().to_numpy(zero_copy_only=False)
        firsts = values[np.cumsum(sizes_here) - sizes_here]
        supervised += int((values != -100).sum() - (firsts != -100).sum())
    return {
        **clock.found(),
        "rows": len(rows),
        "blocks": len(packed),
        "real_tokens": real,
        "supervised_tokens": supervised,
        "real_share": real / (len(packed) * BLOCKS[data]),
    }


def run_map(args: argparse.Namespace, data: str, name: str) -> dict[str, Any]:
    """Tokens and nothing else: the whole text of each row in batches."""
    os.environ["HF_DATASETS_CACHE"] = str(args.folder / f"map-{data}-{args.repeat}-{name == MAP_2}")
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    template = args.template.read_text(encoding="utf-8")

    def encode(batch: Any) -> Any:
        if data == "chat":
            texts = [
                tokenizer.apply_chat_template(
                    messages, tools=json.loads(tools), chat_template=template, tokenize=False
                )
                for messages, tools in zip(batch["messages"], batch["tools"], strict=True)
            ]
        else:
            texts = [p + c for p, c in zip(batch["prompt"], batch["completion"], strict=True)]
        return {"input_ids": tokenizer(texts)["input_ids"]}

    with Clock() as clock:
        rows = datasets.load_dataset(
            "json", data_files=str(args.folder / f"{data}.jsonl"), split="train"
        )
        assert isinstance(rows, datasets.Dataset)
        rows = rows.map(
            encode,
            batched=True,
            num_proc=2 if name == MAP_2 else None,
            remove_columns=rows.column_names,
        )
    return {**clock.found(), "rows": len(rows)}


def run_packing(args: argparse.Namespace, data: str, name: str) -> dict[str, Any]:
    """pack() on a million lengths, most of them short, as fine-tuning rows are."""
    import numpy as np

    from torchprime.data.blocks.pack import pack

    chance = np.random.default_rng(0)
    drawn = np.exp(chance.normal(5.2, 0.6, MILLION)).astype(np.int64)
    block = 1024
    lengths = np.clip(drawn, 8, block if name == "bfd" else 8 * block)
    with Clock() as clock:
        plan = pack(lengths, block, "bfd" if name == "bfd" else "bfd_split")
    real = int(plan.lengths.sum())
    assert real == lengths.sum()
    return {
        **clock.found(),
        "rows": MILLION,
        "blocks": plan.num_blocks,
        "real_tokens": real,
        "real_share": real / (plan.num_blocks * block),
    }


def work(args: argparse.Namespace) -> dict[str, Any]:
    """One case, in this process."""
    data, name = CASES[args.work]
    if data == "packing":
        run = run_packing
    else:
        run = {"ours": run_ours, "TRL": run_trl}.get(re.split(r"\W", name)[0], run_map)
    found = run(args, data, name)
    own, children = (
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    # The peak of this process or of its largest child, whichever is more.
    return {**found, "peak_memory_bytes": max(own, children) * 1024}


# All cases ---------------------------------------------------------------------------------------


def run_case(name: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run a case repeatedly in processes of its own; return the medians of what is timed."""
    repeats = args.repeats if CASES[name][0] in ("gsm8k", "packing") else 1
    runs: list[dict[str, Any]] = []
    environment = {**os.environ, "USE_TORCH_XLA": "0", "HF_HUB_OFFLINE": "1"}
    for repeat in range(repeats):
        print(f"running: {name} ({repeat + 1} of {repeats})", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--work", name, "--folder", str(folder)]
        command += ["--repeat", str(repeat), "--workers", str(args.workers)]
        command += ["--tokenizer", str(args.tokenizer), "--template", str(args.template)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
            sys.exit(f"{name}: failed with exit status {done.returncode}")
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    found = {**runs[0], "all_seconds": [run["seconds"] for run in runs]}
    for clock in ("seconds", "cpu_seconds"):
        found[clock] = statistics.median(run[clock] for run in runs)
    found["rows_per_s"] = found["rows"] / found["seconds"]
    if "supervised_tokens" in found:
        found["supervised_tokens_per_s"] = found["supervised_tokens"] / found["seconds"]
    return found


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Rows per second of ours, by those of the others; only of cases that ran."""
    ratio: dict[str, float] = {}
    for data in BLOCKS:

        def seconds(*names: str, data: str = data) -> float:
            times = [found[f"{data}: {n}"]["seconds"] for n in names if f"{data}: {n}" in found]
            return min(times, default=float("nan"))

        pairs = {
            f"{data}: {ours} / {theirs}": (seconds(*faster), seconds(ours))
            for ours, theirs, faster in (
                (KEPT, "TRL", (TRL, TRL_2)),
                (NOTHING_KEPT, "TRL", (TRL, TRL_2)),
                (DERIVED, "TRL", (TRL, TRL_2)),
                (KEPT, "datasets.map", (MAP, MAP_2)),
                (AGAIN, "TRL, second start", (TRL_AGAIN,)),
            )
        }
        ratio |= {what: theirs / ours for what, (theirs, ours) in pairs.items()}
    return {what: value for what, value in ratio.items() if value == value}


def show(found: dict[str, dict[str, Any]]) -> None:
    """Return a Markdown table and the ratios."""
    print(
        "| case | rows | s | CPU s | rows/s | supervised tok/s | blocks | real slots | peak GiB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, r in found.items():
        supervised = r.get("supervised_tokens_per_s")
        share = r.get("real_share")
        print(
            f"| {name} | {r['rows']:,} | {r['seconds']:.2f} | {r['cpu_seconds']:.2f} "
            f"| {r['rows_per_s']:,.0f} "
            f"| {'' if supervised is None else f'{supervised:,.0f}'} "
            f"| {r.get('blocks', '')} | {'' if share is None else f'{share:.2%}'} "
            f"| {r['peak_memory_bytes'] / 2**30:.2f} |"
        )
    print()
    for what, value in ratios(found).items():
        print(f"- {value:.2f}x {what}")


def main() -> None:
    """Run the cases one after the other and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=SHARED / "data")
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers" / "qwen3")
    parser.add_argument(
        "--template",
        type=Path,
        default=SHARED / "templates" / "trl_training" / "qwen3_training.jinja",
    )
    parser.add_argument("--rows", type=int, default=100_000, help="of the synthetic set")
    parser.add_argument("--chats", type=int, default=10_140)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="of ours")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--only", help="names of cases or their beginnings, separated by semicolons"
    )
    parser.add_argument("--work", help=argparse.SUPPRESS)  # a case's name: run it here
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--repeat", type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.work:
        print("\n" + json.dumps(work(args)))
        return
    for path in (args.data / "gsm8k" / "train.jsonl", args.tokenizer, args.template):
        if not path.exists():
            sys.exit(f"{path}: no such file; see --data, --tokenizer and --template")
    wanted = tuple(args.only.split(";")) if args.only else ("",)
    names = [name for name in CASES if name.startswith(wanted)]
    if not names:
        sys.exit(f"--only {args.only}: no such case, expected one of {'; '.join(CASES)}")
    with tempfile.TemporaryDirectory() as folder:
        write_rows(args, Path(folder), {CASES[name][0] for name in names})
        found = {name: run_case(name, args, Path(folder)) for name in names}
    report = {
        "machine": {"cores": os.cpu_count(), "processor": platform.machine()},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
        "blocks": BLOCKS,
        "cases": found,
        "ratios": ratios(found),
    }
    print(", ".join(f"{name} {text}" for name, text in report["versions"].items()), end="\n\n")
    show(found)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
