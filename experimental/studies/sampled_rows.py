"""Train on all rows, or on the model's own right answers to them (rejection sampling).

    python experimental/studies/sampled_rows.py --out DIR
    python experimental/studies/sampled_rows.py --out DIR --model DIR --train FILE --test FILE \\
        --grader exact_match

For each seed a model learns the rows for some steps. It then answers the training rows several
times, and its right answers are kept (`torchprime sample`). From there three runs of equal length
go on: on all rows, on the kept answers alone, and on both. Each is graded on the held-out rows.
Without --model these are the shipped model and its word problems.

Whatever is finished is a line of `results.jsonl`; the same command does what is missing, then
writes `table.md`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torchprime.cli.main import main as torchprime
from torchprime.evaluation.intervals import Score, score

START, ALL, KEPT, BOTH = "start", "all rows", "right answers", "both"
ARMS = (ALL, KEPT, BOTH)
COMMON = (
    *("mesh=single", "dataset.leak_check=off", "isolation_probe=false", "task.sample_prompts=0"),
    *("selection.gates=[]", "export.which=last", "logging_steps=20", "resume=never"),
    *("task.lr_scheduler.name=cosine", "task.lr_scheduler.warmup_steps=5"),
    *("selection.ranking=[eval_loss asc]", "eval.every_steps=null"),
)


@dataclass(frozen=True)
class Setting:
    """The model, its rows, and the sizes of the study.

    Attributes:
        config: overrides that name model, rows and graders.
        right: the grader that counts.
        steps: of the start, and of each run after it.
    """

    config: Sequence[str]
    right: str
    train: Path | None
    model: Path | None
    steps: tuple[int, int]
    rates: tuple[float, float]
    answers: int
    limit: int | None


@dataclass(frozen=True)
class Result:
    """One model: its grade of each held-out row.

    Attributes:
        rows: it was trained on in this run.
    """

    arm: str
    seed: int
    rows: int
    right: dict[str, float]


def setting_of(given: argparse.Namespace) -> Setting:
    """Return the setting of the command line."""
    steps, rates = (given.start_steps, given.steps), (given.start_rate, given.rate)
    sizes = (steps, rates, given.answers, given.limit)
    if given.model is None:
        config = ("--config-name", "quickstart", *COMMON)
        return Setting(config, "answer_accuracy", None, None, *sizes)
    config = (
        *("task=sft", "dataset=file", *COMMON, "dataset.block_size=128", "eval=file"),
        *("dataset.truncation=right", "task.global_batch_size=8", "eval.generate.batch_size=64"),
        *(f"eval.file_dataset_path={given.test.absolute()}", "eval.generate.max_examples=null"),
        *("eval.generate.max_new_tokens=12", "task.export_checkpoint_path=export"),
        f"eval.graders=[{{name: right, kind: {given.grader}}}]",
    )
    return Setting(config, "right", given.train.absolute(), given.model.absolute(), *sizes)


def command(*argv: object) -> None:
    """Run a command of torchprime in this process."""
    if code := torchprime([str(each) for each in argv]):
        raise SystemExit(f"{' '.join(map(str, argv[:2]))} ended with {code}")


class Study:
    """The runs of one seed in a folder."""

    def __init__(self, setting: Setting, seed: int, out: Path) -> None:
        self.setting, self.seed, self.folder = setting, seed, out / f"seed-{seed}"

    @property
    def start(self) -> Path:
        return self.folder / "start" / "export"

    @property
    def kept(self) -> Path:
        return self.folder / "sampled" / "rows.jsonl"

    def train(self, arm: str, model: Path | None, rows: Path | None, phase: int) -> Result:
        """Train one model and return its grades."""
        s, name = self.setting, arm.replace(" ", "-")
        shutil.rmtree(self.folder / name, ignore_errors=True)
        named = [] if model is None else [f"model.pretrained_model={model}"]
        given = [] if rows is None else [f"dataset.file_dataset_path={rows}", "dataset.format=auto"]
        command(
            *("train", "--backend", "native", *s.config, *named, *given, f"seed={self.seed}"),
            *(f"task.max_steps={s.steps[phase]}", f"output_dir={self.folder}", f"run_name={name}"),
            f"task.optimizer.learning_rate={s.rates[phase]}",
        )
        folder = self.folder / name
        samples = folder / "evaluations" / f"step_{s.steps[phase]:08d}.jsonl"
        asked = [json.loads(line) for line in samples.read_text().splitlines()]
        report = json.loads((folder / "data_report.json").read_text())["dataset"]
        right = {each["row_id"]: each["grades"][s.right] for each in asked}
        return Result(arm, self.seed, report["rows"], right)

    def sample(self) -> None:
        """Keep right answers of the start to the training rows; it goes on where it stopped."""
        s = self.setting
        if self.kept.exists():
            return
        rows = [] if s.train is None else [f"dataset.file_dataset_path={s.train}"]
        limit = [] if s.limit is None else ["--limit", s.limit]
        command(
            *("sample", self.start, "--out", self.kept.parent, "--engine", "native", "--right"),
            *(s.right, "--answers", s.answers, "--keep", 1, *limit, "--seed", self.seed),
            *(*s.config, *rows),
        )

    def run(self, arm: str) -> Result:
        """Make one model; those it needs are there."""
        if arm == START:
            return self.train(START, self.setting.model, self.setting.train, 0)
        self.sample()
        own = self.setting.train
        if arm == ALL:
            return self.train(arm, self.start, own, 1)
        if arm == KEPT:
            return self.train(arm, self.start, self.kept, 1)
        return self.train(arm, self.start, self.joined(), 1)

    def joined(self) -> Path:
        """Return a file with the rows and the kept answers, as prompts and completions."""
        path = self.folder / "both.jsonl"
        samples = (self.kept.parent / "samples.jsonl").read_text().splitlines()
        firsts = {s["row_id"]: s for s in map(json.loads, samples)}
        rows = [{"prompt": s["prompt"], "completion": s["reference"]} for s in firsts.values()]
        kept = map(json.loads, self.kept.read_text().splitlines())
        rows += [{key: row[key] for key in ("prompt", "completion")} for row in kept]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path


def run_missing(setting: Setting, seeds: Sequence[int], out: Path) -> list[Result]:
    """Return all results; those that are not in the file are made and added to it."""
    path = out / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    done = {(r["arm"], r["seed"]): Result(**r) for r in map(json.loads, lines)}
    for seed in seeds:
        study = Study(setting, seed, out)
        for arm in (START, *ARMS):
            if (arm, seed) not in done:
                done[arm, seed] = study.run(arm)
                with path.open("a") as file:
                    file.write(json.dumps(asdict(done[arm, seed])) + "\n")
    return [result for key, result in done.items() if key[1] in seeds]


def over_seeds(results: Sequence[Result], arm: str) -> dict[str, float]:
    """Return the mean grade of each held-out row over the seeds of an arm."""
    own = [result for result in results if result.arm == arm]
    return {row: sum(r.right[row] for r in own) / len(own) for row in own[0].right}


def table(results: Sequence[Result]) -> list[str]:
    """Return a Markdown table. Intervals are of the questions: each counts with its mean over the
    seeds. Differences are of the same questions."""
    lines = [
        "| Rows | number | right answers | 95% interval | against all rows | 95% interval |",
        "|---|---|---|---|---|---|",
    ]
    against = over_seeds(results, ALL)
    for arm in (START, *ARMS):
        grades = over_seeds(results, arm)
        value = _scored(list(grades.values()))
        gain = _scored([grades[row] - against[row] for row in against])
        counts = [result.rows for result in results if result.arm == arm]
        cells = [
            *(arm, f"{sum(counts) / len(counts):,.0f}", f"{value.value:.1%}"),
            f"{value.low:.1%} to {value.high:.1%}",
            *(f"{100 * gain.value:+.1f}", f"{100 * gain.low:+.1f} to {100 * gain.high:+.1f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _scored(values: Sequence[float]) -> Score:
    found = score(values, measure=True)
    assert found is not None
    return found


def main() -> None:
    """Make what is missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True)
    for name in ("--model", "--train", "--test"):
        add(name, type=Path)
    add("--grader", default="exact_match")
    add("--seeds", type=int, default=3)
    add("--start-steps", type=int, default=60)
    add("--steps", type=int, default=60)
    add("--start-rate", type=float, default=1e-3)
    add("--rate", type=float, default=3e-4)
    add("--answers", type=int, default=4)
    add("--limit", type=int, help="training rows that are answered")
    given = parser.parse_args()
    if given.model is not None and (given.train is None or given.test is None):
        parser.error("--model needs --train and --test")
    out = given.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    results = run_missing(setting_of(given), range(1, given.seeds + 1), out)
    lines = table(results)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
