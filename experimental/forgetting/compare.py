"""Compare ways to keep what a model knows while it learns a task, over several seeds.

    python experimental/forgetting/compare.py --model DIR --rows FILE --texts FILE --out DIR

A model that continues texts learns to answer questions. Rows are prompts and completions; a quarter
of their passages (the text before the first line break) is held out and asked for exact answers.
Texts are stories; some are held out, others are for replay. No story has a passage of the rows.

Each run is the main job. A finished run is a line of `results.jsonl`; the same command runs what is
missing, then writes `table.md` and `forgetting.png` into the folder. First it tries values of each
strength with one seed (`search.jsonl`, `search.md`) and chooses one of each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

from torchprime.config.entry import run_main
from torchprime.data.tokenizer.load import load_tokenizer
from torchprime.evaluation.intervals import Score, score
from torchprime.torch_native.train import main as train

BLOCK = 128
HELD_OUT, REPLAYED = 60, 300  # stories
RATE, ADAPTER_RATE = 1e-3, 3e-3
MARKERS = "os^Dv<>Phd"
LOST = 0.1  # right answers that a strength may cost
ON_ALL = "regularization.kl.on=all"
# A story is longer than a block and is cut: the model never saw the end token.
BLOCKS = (f"dataset.block_size={BLOCK}", "dataset.truncation=right")
FISHER = (*BLOCKS, "mesh=single", "task.max_steps=1", "task.global_batch_size=1")
COMMON = (
    *(*BLOCKS, "mesh=single", "task.global_batch_size=8", "task.max_steps=80"),
    *("task.lr_scheduler.name=cosine", "task.lr_scheduler.warmup_steps=5"),
    *("dataset.leak_check=off", "isolation_probe=false"),
    *("eval.generate.max_new_tokens=12", "eval.generate.max_examples=null"),
    "eval.graders=[{name: right, kind: exact_match}]",
    *("eval.generate.batch_size=64", "logging_steps=40", "task.sample_prompts=0"),
    "task.export_checkpoint_path=null",
)


def learning_rate(value: float) -> str:
    return f"task.optimizer.learning_rate={value}"


class Variant(NamedTuple):
    """One way to train: a group and its overrides of the common ones."""

    name: str
    group: str
    overrides: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    """One run: which held-out questions it answered right, and the loss on held-out stories.

    Attributes:
        stories_before: the same loss of the base.
    """

    variant: str
    seed: int
    overrides: list[str]
    right: dict[str, float]
    stories: float
    stories_before: float
    answers_loss: float
    seconds: float


# Inputs -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """The model and the prepared files of rows and stories."""

    model: Path
    folder: Path

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    def overrides(self) -> list[str]:
        """Return the overrides that name model and held-out rows."""
        asked, texts = self.file("questions_test"), self.file("stories_test")
        return [
            f"model.pretrained_model={self.model}",
            "dataset=file",
            f"eval.sources=[{{name: questions, file_dataset_path: {asked}}}, "
            f"{{name: stories, file_dataset_path: {texts}, generate: false}}]",
            "eval.every_steps=80",
        ]

    def alone(self, *more: str, rate: float = RATE) -> tuple[str, ...]:
        """Return the overrides for training on the questions alone."""
        rows = self.file("questions_train")
        return (f"dataset.file_dataset_path={rows}", learning_rate(rate), *more)

    def lora(self) -> tuple[str, ...]:
        """Return the overrides for training an adapter on the questions. The embedding is trained
        too: without it, the model never learns to end an answer."""
        adapter = ("adapter=lora", "adapter.rank=16", "adapter.alpha=32")
        return self.alone(*adapter, "adapter.modules_to_train=[embed_tokens]", rate=ADAPTER_RATE)

    def mixed(self, share: float, *more: str) -> tuple[str, ...]:
        """Return the overrides for a share of stories among the supervised tokens."""
        own, texts = self.file("questions_train"), self.file("stories_train")
        return (
            "dataset.file_dataset_path=null",
            f"dataset.mixture=[{{name: questions, file_dataset_path: {own}}}, "
            f"{{name: stories, file_dataset_path: {texts}, replay: true}}]",
            f"dataset.replay_schedule.start={share}",
            "dataset.replay_schedule.shape=constant",
            learning_rate(RATE),
            *more,
        )


def passage_of(row: Mapping[str, str]) -> str:
    """Return the passage of a row: the first line of its prompt."""
    return row["prompt"].split("\n")[0]


def split_rows(lines: Iterable[str]) -> dict[str, list[str]]:
    """Return lines of rows by side; a passage is on one side."""
    sides: dict[str, list[str]] = {"train": [], "test": []}
    for line in lines:
        digest = hashlib.sha256(passage_of(json.loads(line)).encode()).hexdigest()
        sides["test" if int(digest, 16) % 4 == 0 else "train"].append(line)
    return sides


def stories_of(text: str, passages: Iterable[str]) -> list[str]:
    """Return the stories of a text that have none of these passages, each without blank lines.

    A story begins at a paragraph that begins like one.
    """
    stories: list[list[str]] = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        if not stories or re.match(r"Once |One day", paragraph):
            stories.append([])
        stories[-1].append(paragraph.strip())
    found = ["\n".join(story) for story in stories]
    known = list(passages)
    return [story for story in found if not any(each in story for each in known)]


def prepare(model: Path, rows: Path, texts: Path, out: Path) -> Inputs:
    """Write the files of questions that fit into a block, and of stories that fill one."""
    tokenizer = load_tokenizer(model)
    lines = [line for line in rows.read_text().splitlines() if line.strip()]
    texts_of = ["".join(json.loads(line).values()) for line in lines]
    ids = tokenizer.encode_ids(texts_of)
    lines = [line for line, own in zip(lines, ids, strict=True) if len(own) < BLOCK - 1]
    files = {f"questions_{side}": part for side, part in split_rows(lines).items()}
    stories = stories_of(texts.read_text(), {passage_of(json.loads(line)) for line in lines})
    ids = tokenizer.encode_ids(stories)
    long = [s for s, tokens in zip(stories, ids, strict=True) if len(tokens) > BLOCK]
    if len(long) < HELD_OUT + REPLAYED:
        raise SystemExit(f"--texts: {len(long)} stories of more than {BLOCK} tokens are too few")
    sides = {"test": long[:HELD_OUT], "train": long[HELD_OUT : HELD_OUT + REPLAYED]}
    for side, part in sides.items():
        files[f"stories_{side}"] = [json.dumps({"text": story}) for story in part]
    inputs = Inputs(model.absolute(), out)
    for name, part in files.items():
        inputs.file(name).write_text("\n".join(part) + "\n")
    return inputs


# Variants -----------------------------------------------------------------------------------------


class Tried(NamedTuple):
    """A method with a strength, the values to try, and the keys for one of them."""

    method: str
    values: Sequence[float]
    keys: Callable[[float], tuple[str, ...]]

    def variant(self, value: float, inputs: Inputs) -> Variant:
        """Return the variant that trains with this value."""
        return Variant(f"{self.method} {value:g}", self.method, inputs.alone(*self.keys(value)))


def tried(inputs: Inputs) -> list[Tried]:
    """Return the methods whose strength is chosen by a search."""
    fisher = f"regularization.ewc.fisher={inputs.folder / 'fisher'}"
    return [
        Tried(
            "EWC", (0.5, 5, 50, 500, 5000), lambda s: (fisher, f"regularization.ewc.strength={s}")
        ),
        Tried("L2-SP", (1e-3, 1e-2, 0.1, 1, 10), lambda s: (f"regularization.l2_sp.strength={s}",)),
        Tried("KL", (0.1, 1, 10, 100), lambda c: (f"regularization.kl.coefficient={c}", ON_ALL)),
    ]


def searched(inputs: Inputs) -> list[Variant]:
    """Return a variant for each value that the search tries, and the one to compare with."""
    values = [(each, value) for each in tried(inputs) for value in each.values]
    none = Variant("nothing", "nothing", inputs.alone())
    return [none, *(each.variant(value, inputs) for each, value in values)]


def chosen(points: Sequence[Point], names: Sequence[str]) -> str:
    """Return the name with the least rise among those that lose at most LOST right answers against
    the first point, which is of no method; the most accurate one if all lose more."""
    own = [point for point in points if point.name in names]
    enough = [p for p in own if points[0].right.value - p.right.value <= LOST + 1e-9]
    if enough:
        return min(enough, key=lambda p: p.rise).name
    return max(own, key=lambda p: p.right.value).name


def variants(inputs: Inputs, points: Sequence[Point]) -> list[Variant]:
    """Return the ways to compare, with the strengths that the search's points choose."""
    best = {}
    for each in tried(inputs):
        of_name = {each.variant(value, inputs).name: value for value in each.values}
        best[each.method] = (each, of_name[chosen(points, list(of_name))])
    ewc, strength = best["EWC"]
    shares = (0.05, 0.1, 0.2)
    return [
        Variant("nothing", "nothing", inputs.alone()),
        *(Variant(f"replay {share:.0%}", "replay", inputs.mixed(share)) for share in shares),
        *(each.variant(value, inputs) for each, value in best.values()),
        Variant("LoRA", "LoRA", inputs.lora()),
        Variant("DFT", "DFT", inputs.alone("task.loss.dft=true")),
        Variant("replay 10%, EWC", "mix", inputs.mixed(0.1, *ewc.keys(strength))),
    ]


def measure_fisher(inputs: Inputs) -> None:
    """Measure the Fisher information of the base on the stories for replay, if it is missing."""
    out = inputs.folder / "fisher"
    if out.is_dir():
        return
    command = [sys.executable, "-m", "torchprime.cli.main", "fisher", "--backend", "native"]
    stories = f"dataset.file_dataset_path={inputs.file('stories_train')}"
    given = [f"model.pretrained_model={inputs.model}", "dataset=file", stories, *FISHER]
    subprocess.run([*command, "--out", out, "--examples", str(REPLAYED), *given], check=True)


# Runs ---------------------------------------------------------------------------------------------


def run(variant: Variant, seed: int, inputs: Inputs) -> Result:
    """Train once and return the result. What an unfinished run left is removed."""
    name = re.sub(r"\W+", "-", f"{variant.name} {seed}").strip("-").lower()
    folder, started = inputs.folder / "runs" / name, time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    argv = [*COMMON, *inputs.overrides(), *variant.overrides, f"seed={seed}"]
    argv += [f"output_dir={folder.parent}", f"run_name={name}", "resume=never"]
    if code := run_main(train, argv):
        raise SystemExit(f"the run {name} ended with {code}")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if record["kind"] == "eval"]
    first, last = records[0]["source_losses"], records[-1]["source_losses"]
    samples = folder / "evaluations" / f"step_{records[-1]['step']:08d}.jsonl"
    asked = [json.loads(line) for line in samples.read_text().splitlines()]
    return Result(
        variant.name,
        seed,
        list(variant.overrides),
        {each["row_id"]: each["grades"]["right"] for each in asked},
        last["stories"],
        first["stories"],
        last["questions"],
        time.monotonic() - started,
    )


def run_missing(
    wanted: Sequence[Variant], seeds: Sequence[int], inputs: Inputs, path: Path
) -> list[Result]:
    """Return the results of all runs; those that are not in the file are run and added to it."""
    lines = path.read_text().splitlines() if path.exists() else []
    known = [Result(**json.loads(line)) for line in lines]
    done = {(r.variant, r.seed, *r.overrides): r for r in known}
    results = []
    for seed in seeds:
        for variant in wanted:
            key = (variant.name, seed, *variant.overrides)
            if key not in done:
                done[key] = run(variant, seed, inputs)
                with path.open("a") as file:
                    file.write(json.dumps(asdict(done[key])) + "\n")
            results.append(done[key])
    return results


# Results ------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """A variant over all seeds: right answers, and how much the loss on stories rose."""

    name: str
    right: Score
    rise: float
    lowest: float
    highest: float


def points_of(results: Sequence[Result]) -> list[Point]:
    """Return a point for each variant, in the order of the results.

    The seeds ask the same questions, so the interval is of the questions: each counts with its mean
    over the seeds.
    """
    points = []
    for name in dict.fromkeys(result.variant for result in results):
        own = [result for result in results if result.variant == name]
        means = [sum(r.right[row] for r in own) / len(own) for row in own[0].right]
        right = score(means, measure=True)
        assert right is not None
        rises = [r.stories - r.stories_before for r in own]
        points.append(Point(name, right, sum(rises) / len(rises), min(rises), max(rises)))
    return points


def frontier(points: Sequence[Point]) -> list[str]:
    """Return the variants that no other one beats in both accuracy and rise."""
    return [
        one.name
        for one in points
        if not any(
            (other.right.value, -other.rise) != (one.right.value, -one.rise)
            and other.right.value >= one.right.value
            and other.rise <= one.rise
            for other in points
        )
    ]


def table(points: Sequence[Point]) -> list[str]:
    """Return a Markdown table; variants of the frontier are in bold."""
    best = frontier(points)
    lines = [
        "| Method | right answers | 95% interval | rise of the loss on stories | over seeds |",
        "|---|---|---|---|---|",
    ]
    for p in points:
        name = f"**{p.name}**" if p.name in best else p.name
        lines.append(
            f"| {name} | {p.right.value:.1%} | {p.right.low:.1%} to {p.right.high:.1%} "
            f"| {p.rise:+.3f} | {p.lowest:+.3f} to {p.highest:+.3f} |"
        )
    return lines


def write_table(points: Sequence[Point], results: Sequence[Result], path: Path) -> None:
    """Write a table with the base's loss above it, and print both."""
    base = f"The base: {results[0].stories_before:.3f} nats per token on held-out stories."
    lines = [base, "", *table(points)]
    path.write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


def draw(points: Sequence[Point], groups: Mapping[str, str], path: Path) -> None:
    """Draw accuracy against the rise of the loss, with the intervals of both. A group has a colour,
    a variant a marker."""
    colours = {group: f"C{n}" for n, group in enumerate(dict.fromkeys(groups.values()))}
    figure, axes = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    for place, p in enumerate(points):
        value, colour = p.right.value, colours[groups[p.name]]
        axes.errorbar(
            p.rise,
            value,
            xerr=[[p.rise - p.lowest], [p.highest - p.rise]],
            yerr=[[value - p.right.low], [p.right.high - value]],
            fmt=MARKERS[place % len(MARKERS)],
            color=colour,
            elinewidth=0.8,
            label=p.name,
        )
    axes.set_xscale("symlog", linthresh=0.01)  # a rise may be below 0
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, 0))
    axes.set(
        xlabel="rise of the loss on held-out stories, nats per token (left is better)",
        ylabel="right answers to held-out questions (up is better)",
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    """Run what is missing, then write table and figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--model", "--rows", "--texts", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    out = given.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    inputs = prepare(given.model, given.rows, given.texts, out)
    measure_fisher(inputs)
    tries = run_missing(searched(inputs), [0], inputs, out / "search.jsonl")
    write_table(points_of(tries), tries, out / "search.md")
    wanted = variants(inputs, points_of(tries))
    results = run_missing(wanted, range(1, given.seeds + 1), inputs, out / "results.jsonl")
    points = points_of(results)
    write_table(points, results, out / "table.md")
    draw(points, {v.name: v.group for v in wanted}, out / "forgetting.png")


if __name__ == "__main__":
    main()
