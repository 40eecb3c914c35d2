"""Studies made of sweeps, over several seeds: what a small fine-tune depends on.

    python experimental/studies/run.py rows quickstart --out outputs/studies
    python experimental/studies/run.py rates stories --model DIR --rows FILE --out outputs/studies

`rows` varies the number of training rows, with equally many updates. `rates` varies the learning
rate, for all weights and for LoRA. `quickstart` is the shipped model; `stories` a model with a file
of prompts and completions, a quarter of whose passages are held out (experimental/adapters).

Each study is the command `torchprime train -m`, so the same command goes on after a kill. The
result is table.md and figure.svg in the study's folder; `--page` writes it into a page, too.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import PercentFormatter

from torchprime.config.compose import assets_dir
from torchprime.sweep.groups import OverSeeds, over_seeds
from torchprime.sweep.rows import Row, read_table

CASES = runpy.run_path(str(Path(__file__).parents[1] / "adapters" / "compare.py"))
ROWS = {"quickstart": (128, 256, 512, 1024), "stories": (16, 32, 64, 128)}  # and all
RATES = {"quickstart": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "stories": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)}
ACCURACY, LOSS = "answer_accuracy", "eval_loss"
RATE, FILE = "task.optimizer.learning_rate", "dataset.file_dataset_path"
# The last step is measured, and no other: a best step would be chosen on the rows it is judged by.
COMMON = (
    *(
        "mesh=single",
        "logging_steps=50",
        "task.sample_prompts=0",
        "task.export_checkpoint_path=null",
    ),
    *(
        "export.which=last",
        "selection.gates=[]",
        f"selection.ranking=[{ACCURACY} desc, {LOSS} asc]",
    ),
)
ALL, LORA = ("adapter=none",), ("adapter=lora", "adapter.rank=16", "adapter.alpha=32")
TITLES = {"rows": "Right answers by the number of training rows",
          "rates": "Right answers by the learning rate"}  # fmt: skip
AXES = {"rows": "training rows", "rates": "learning rate"}


class Point(NamedTuple):
    """The runs of all seeds at one value of one series."""

    series: str
    x: float
    right: OverSeeds
    loss: OverSeeds
    seeds: int
    tokens: int  # supervised, in all


class Study(NamedTuple):
    """A study of one case: its folder, the number of seeds, and further overrides."""

    kind: str
    case_name: str
    case: Any
    out: Path
    seeds: int
    more: Sequence[str]

    @property
    def seeds_override(self) -> str:
        return "seed=" + ",".join(str(seed) for seed in range(1, self.seeds + 1))

    def sweep(self, name: str, *argv: str) -> Path:
        """Make a sweep and return its folder. A run that failed ends the study."""
        command = [
            sys.executable,
            "-m",
            "torchprime.cli.main",
            "train",
            "--backend",
            "native",
            "-m",
        ]
        given = {each.partition("=")[0] for each in [*argv, *self.more]}
        own = [each for each in self.case.overrides if each.partition("=")[0] not in given]
        placed = [self.seeds_override, "hydra.sweep.dir=" + name]
        subprocess.run(
            [*command, *own, *COMMON, *argv, *self.more, *placed],
            cwd=self.out,
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        return self.out / name

    def run(self, values: Sequence[float] | None) -> list[Point]:
        """Make the study's sweeps and return its points.

        Args:
            values: numbers of rows, or learning rates; None for the study's own.
        """
        if self.kind == "rows":
            names = write_subsets(self, values or ROWS[self.case_name])
            files = f"{FILE}={','.join(names)}"
            folders = [self.sweep("sweep", files, *ALL, f"{RATE}={self.case.rate}")]
        else:
            rates = f"{RATE}=" + ",".join(f"{v:g}" for v in values or RATES[self.case_name])
            folders = [self.sweep("all", *ALL, rates)]
            folders.append(self.sweep("lora", *LORA, *self.case.adapter, rates))
        return points_of(read_table(folders).rows, FILE if self.kind == "rows" else RATE)


def training_rows(study: Study) -> Path:
    """Return the file of the case's training rows."""
    given = [each for each in study.case.overrides if each.startswith(f"{FILE}=")]
    if given:
        return Path(given[0].partition("=")[2])
    return assets_dir() / "quickstart" / "data" / "train.jsonl"


def write_subsets(study: Study, sizes: Sequence[float]) -> list[str]:
    """Write the training rows in one random order, cut at each size and whole; return the names of
    the files. A smaller file is a part of each larger one."""
    lines = training_rows(study).read_text().splitlines()
    random.Random(0).shuffle(lines)
    names = []
    for size in [*(int(size) for size in sizes if size < len(lines)), len(lines)]:
        names.append(f"rows_{size}.jsonl")
        (study.out / names[-1]).write_text("\n".join(lines[:size]) + "\n")
    return names


def points_of(rows: Sequence[Row], key: str) -> list[Point]:
    """Return a point for each series and value, in their order."""
    groups: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        number = re.search(r"[\d.]+(e-?\d+)?", row.varied[key].removesuffix(".jsonl"))
        assert number is not None and row.metrics is not None, row
        groups.setdefault((str(row.parameterization), float(number[0])), []).append(row)
    points = []
    for (series, x), own in sorted(groups.items()):
        metrics = [row.metrics or {} for row in own]
        right, loss = (over_seeds([m[name] for m in metrics]) for name in (ACCURACY, LOSS))
        tokens = round(sum(row.supervised_tokens or 0 for row in own) / len(own))
        points.append(Point(series, x, right, loss, len(own), tokens))
    return points


# Results ------------------------------------------------------------------------------------------


def interval(point: Point) -> tuple[float, float]:
    """Return the 95% interval of the share of right answers."""
    low, high = point.right.low, point.right.high
    assert low is not None and high is not None, "answers are right or wrong"
    return low, high


def table(study: Study, points: Sequence[Point]) -> list[str]:
    """Return a Markdown table, a line for each point."""
    lines = [
        f"| trained | {AXES[study.kind]} | right answers | 95% interval | held-out loss "
        "| over the seeds | seeds | supervised tokens |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in points:
        low, high = interval(p)
        lines.append(
            f"| {p.series} | {p.x:,g} | {p.right.mean:.1%} | {low:.1%} to {high:.1%} "
            f"| {p.loss.mean:.3f} | {p.loss.lowest:.3f} to {p.loss.highest:.3f} "
            f"| {p.seeds} | {p.tokens:,} |"
        )
    return lines


def draw(study: Study, points: Sequence[Point], path: Path) -> None:
    """Draw right answers with their intervals, a line for each series."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in dict.fromkeys(p.series for p in points):
        own = [p for p in points if p.series == name]
        means = [p.right.mean for p in own]
        ends = [interval(p) for p in own]
        below = [mean - low for mean, (low, _) in zip(means, ends, strict=True)]
        above = [high - mean for mean, (_, high) in zip(means, ends, strict=True)]
        axes.errorbar([p.x for p in own], means, yerr=[below, above], marker="o", label=name)
    axes.set_xscale("log")
    values = sorted({p.x for p in points})
    axes.set_xticks(values, [f"{value:,g}" for value in values])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, 0))
    axes.set(xlabel=AXES[study.kind], ylabel="right answers to held-out questions")
    axes.grid(alpha=0.3)
    axes.legend()
    with matplotlib.rc_context({"svg.hashsalt": "torchprime"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def write_section(page: Path, title: str, lines: Sequence[str]) -> None:
    """Put lines under a heading of a page, instead of those there; make a missing page."""
    text = page.read_text(encoding="utf-8") if page.exists() else ""
    section = f"## {title}\n\n" + "\n".join(lines) + "\n"
    before, heading, rest = text.partition(f"## {title}\n")
    if not heading:
        page.write_text(f"{text.rstrip()}\n\n{section}", encoding="utf-8")
        return
    _, following, after = rest.partition("\n## ")
    page.write_text(before + section + (f"\n## {after}" if following else ""), encoding="utf-8")


def main() -> None:
    """Make a study's runs, or what is missing of them, and write its result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("study", choices=list(TITLES))
    add("case", choices=list(ROWS))
    add("--out", type=Path, required=True)
    add("--model", type=Path, help="of stories")
    add("--rows", type=Path, help="of stories")
    add("--seeds", type=int, default=3)
    add("--values", type=float, nargs="+", help="instead of the study's own")
    add("--page", type=Path, help="a page in whose section the table is written")
    add("--override", action="append", default=[], metavar="KEY=VALUE", help="of every run")
    given = parser.parse_args()
    out = given.out.absolute() / f"{given.study}_{given.case}"
    out.mkdir(parents=True, exist_ok=True)
    if given.case == "quickstart":
        case = CASES["quickstart"]()
    elif given.model is None or given.rows is None:
        parser.error("stories needs --model and --rows")
    else:
        case = CASES["own_rows"](given.model.absolute(), given.rows, out)
    study = Study(given.study, given.case, case, out, given.seeds, given.override)
    points = study.run(given.values)
    lines = table(study, points)
    print("\n".join(lines), flush=True)
    (out / "table.md").write_text("\n".join(lines) + "\n")
    draw(study, points, out / "figure.svg")
    if given.page is not None:
        figure = given.page.parent / "figures" / f"{out.name}.svg"
        figure.parent.mkdir(exist_ok=True)
        figure.write_bytes((out / "figure.svg").read_bytes())
        picture = f"![{TITLES[given.study]}](figures/{figure.name})"
        title = f"{TITLES[given.study]}: {given.case}"
        write_section(given.page, title, [picture, "", *lines])


if __name__ == "__main__":
    main()
