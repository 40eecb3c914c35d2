"""`torchprime lr-range --config-name NAME [...]`: which learning rates train this config.

One run of some hundred steps, whose learning rate rises by equal factors, in one compile. Nothing
is exported or evaluated.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

from torchprime.cli.shared.arguments import make_parser, positive, run_with_rest
from torchprime.cli.shared.backends import NAMES, refuse_sweep
from torchprime.cli.train import train
from torchprime.config.checks import refuse
from torchprime.config.entry import run_main
from torchprime.config.schema import TrainConfig
from torchprime.errors import DivergedError
from torchprime.files.atomic import write_text
from torchprime.metrics.writers import read_metrics
from torchprime.text.terminal import is_first_process, print_lines

STEPS, FROM, TO = 100, 1e-7, 1e-1
EPILOG = """\
The run's folder gets lr_range.json and lr_range.png. The suggested interval goes from the rate at
which the loss fell most steeply to a tenth of the rate with the lowest loss, or the other way
round: a baseline to test. Exit code: 0, or 2 for a mistake or a loss that never fell.
"""
# What a config sets for a whole run, and a range test does not need.
OFF = (
    "eval=none", "dataset.eval_fraction=null", "selection.gates=[]",
    "selection.early_stopping.metric=null", "export.which=last", "task.num_epochs=null",
    "task.export_checkpoint_path=null", "task.sample_prompts=0", "logging_steps=1",
    "checkpoint.every_steps=null", "checkpoint.every_minutes=null", "resume=never",
    "task.lr_scheduler.warmup_steps=null", "task.lr_scheduler.warmup_ratio=null",
    "task.lr_scheduler.decay_steps=null", "task.lr_scheduler.decay_ratio=null",
    "task.lr_scheduler.decay_shape=null", "task.lr_scheduler.cycles=null",
    "task.lr_scheduler.name=exponential",
)  # fmt: skip


def lr_range_main(argv: list[str]) -> int:
    """Run `lr-range` with the arguments after it; return the exit code."""
    parser = make_parser(
        "torchprime lr-range", "Find the learning rates at which a config's loss falls.", EPILOG
    )
    parser.usage = "torchprime lr-range [--from R] [--to R] [--steps N] --config-name NAME [...]"
    add = parser.add_argument
    add("--from", dest="first", type=float, default=FROM, help=f"first rate (default: {FROM:g})")
    add("--to", dest="last", type=float, default=TO, help=f"last rate (default: {TO:g})")
    add("--steps", type=positive, default=STEPS, help=f"updates (default: {STEPS})")
    add("--backend", choices=list(NAMES), help="instead of the one that fits this host")
    return run_with_rest(parser, argv, _run)


def _run(given: argparse.Namespace, rest: list[str]) -> int:
    if not 0 < given.first < given.last:
        refuse(
            "--from and --to",
            f"{given.first:g} and {given.last:g}",
            "two rates above 0, the smaller first",
            f"Leave them out for {FROM:g} and {TO:g}.",
        )
    named = any(word.startswith("run_name=") for word in rest)
    asked = [
        *OFF,
        *([] if named else [f"run_name={_name(rest)}-lr-range"]),
        f"task.max_steps={given.steps}",
        f"task.optimizer.learning_rate={given.last}",
        f"task.lr_scheduler.min_lr_ratio={given.first / given.last}",
    ]
    no_sweep = partial(refuse_sweep, "lr-range", "makes one run")
    return run_main(lambda config: _test(config, given), [*rest, *asked], no_sweep)


def _name(rest: list[str]) -> str:
    """Return the config's name on a command line."""
    for flag, word in zip(rest, [*rest[1:], ""], strict=True):
        if flag in ("--config-name", "-cn"):
            return word.replace("/", "_")
        if flag.startswith("--config-name="):
            return flag.partition("=")[2].replace("/", "_")
    return "default"


def _test(config: TrainConfig, given: argparse.Namespace) -> int:
    try:
        train(config, given.backend)
    except DivergedError:  # the losses before it are in the records
        print_lines(["the loss was not finite at the last learning rate"])
    if is_first_process():
        _report(Path(config.output_dir) / str(config.run_name))
    return 0


def _report(folder: Path) -> None:
    # late: matplotlib takes time, and a wrong config needs none
    from torchprime.training.advice.lr_range import find_range
    from torchprime.training.advice.lr_range_figure import draw_range

    steps = [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]
    found = find_range([r["lr"] for r in steps], [r["loss"] for r in steps])
    write_text(folder / "lr_range.json", json.dumps(found.to_dict(), indent=1) + "\n")
    draw_range(found, folder / "lr_range.png")
    print_lines(
        [
            f"lowest loss at {found.lowest:.1e}, steepest fall at {found.steepest:.1e}",
            f"try first: {found.low:.1e} to {found.high:.1e}, a baseline to test "
            f"(task.optimizer.learning_rate={found.high:.1e})",
            f"{folder}/lr_range.png shows the loss against the learning rate",
        ]
    )
