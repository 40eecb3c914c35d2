"""`torchprime compare RUN RUN [RUN...]`: a check that runs trained identically.

The verdict goes to the terminal, its evidence to `parity.json`, and the curves to a figure (PNG and
SVG). torchprime/compare/judge.py defines the verdict, torchprime/compare/logs/read.py the forms of
a RUN. `--measure-noise` writes the noise floor for runs with less precision than float32.
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchprime.cli.shared.arguments import make_parser, run_command
from torchprime.compare.judge import compare, imprecise
from torchprime.compare.logs.read import read_run
from torchprime.compare.logs.run import HowLogged, Run
from torchprime.compare.noise_floor import FACTOR, WINDOW, NoiseFloor, measure_noise, read_floor
from torchprime.compare.verdict import (
    AGREE,
    DIFFER,
    DIFFERENT_DATA,
    QUANTITIES,
    TOO_FEW,
    Comparison,
    Judged,
    Pair,
    usual_speed,
)
from torchprime.config.paths import local_path
from torchprime.errors import ConfigError, RuntimeSetupError
from torchprime.files.atomic import write_json
from torchprime.text.terminal import print_lines

PARITY = "parity.json"
FLOOR = "noise_floor.json"
NO_FIGURE = "none"
SHOWN_DIFFERENCES = 8

EPILOG = f"""\
A RUN is a run's folder, a metrics.jsonl, a trainer_state.json of transformers or a folder with one,
or a text log; NAME=RUN names it. The first one is the reference.
Exit code: 0 all agree; 1 they do not, had different data, too few steps in common or could not be
judged; 2 a user error, such as a log line with an ambiguous number.
float32: losses to 1e-4, gradient norm to 1e-3, learning rate to 1e-6, relative. Other dtypes: to
{FACTOR:g} times the largest spread of {WINDOW} neighbouring records of runs that ought to be equal:
  torchprime compare --measure-noise RUN RUN [RUN...] --out {FLOOR}
"""


def compare_main(argv: list[str]) -> int:
    """Run the command with the arguments after `compare`; return the exit code."""

    def command(given: argparse.Namespace) -> int:
        named = name_runs(given.runs)
        how = read_how([label for label, _ in named], given.mean_over, given.resumed_at)
        runs = [read_run(label, path, how[label]) for label, path in named]
        return _measure(runs, given) if given.measure_noise else _compare(runs, given, argv)

    return run_command(_parser(), argv, command)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("torchprime compare", "Check that runs trained identically.", EPILOG)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN")
    add("--out", metavar="FOLDER", help=f"folder for {PARITY} and the figure (default: .)")
    add(
        "--figure",
        metavar="NAME",
        default="parity",
        help=f"NAME.png and NAME.svg in --out (default: parity); {NO_FIGURE}: do not draw",
    )
    add("--loss-tolerance", type=float, metavar="X", help="relative tolerance of losses")
    add("--noise-floor", metavar="FILE", help="judge by this measured noise floor")
    add("--steps", type=int, metavar="N", help="compare only the first N common steps")
    add(
        "--mean-over",
        action="append",
        default=[],
        metavar="NAME=N",
        help="each loss in the log of NAME is the mean of N steps (1: of its own step)",
    )
    add(
        "--resumed-at",
        action="append",
        default=[],
        metavar="NAME=STEP",
        help="the run of NAME, which logs means, was resumed after STEP; may be repeated",
    )
    add("--measure-noise", action="store_true", help="write a noise floor to --out FILE instead")
    return parser


def name_runs(given: Sequence[str]) -> list[tuple[str, str]]:
    """Return (label, path) of each argument: NAME=PATH, or a path that gives the name."""
    named = []
    for argument in given:
        name, equals, path = argument.partition("=")
        if equals and name and "/" not in name and not Path(argument).exists():
            named.append((name, str(local_path("RUN", path))))
        else:
            named.append((None, str(local_path("RUN", argument))))
    labels = [name for name, _ in named if name]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise ConfigError(f"RUN: the name {twice[0]} is given twice, expected one for each run")
    short = [name or _short(path) for name, path in named]
    unique: list[str] = []
    for (name, path), label in zip(named, short, strict=True):
        if not name and short.count(label) > 1:
            label = path
        unique.append(label if label not in unique else f"{label}#{len(unique) + 1}")
    return list(zip(unique, (path for _, path in named), strict=True))


def read_how(
    labels: Sequence[str], mean_over: Sequence[str], resumed_at: Sequence[str]
) -> dict[str, HowLogged]:
    """Return by run the values of the options NAME=N, which describe its log.

    Raises:
        ConfigError: no such run, or not a number.
    """
    how = dict.fromkeys(labels, HowLogged())
    for option, texts in (("--mean-over", mean_over), ("--resumed-at", resumed_at)):
        for text in texts:
            label, _, number = text.rpartition("=")
            if label not in how or not number.isascii() or not number.isdigit() or int(number) < 1:
                raise ConfigError(
                    f"{option}: given {text!r}, expected NAME=N with one of the runs "
                    f"{', '.join(labels)} and a whole number from 1 on"
                )
            if option == "--mean-over":
                how[label] = replace(how[label], mean_over=int(number))
            else:
                steps = (*how[label].resumed_at, int(number))
                how[label] = replace(how[label], resumed_at=steps)
    return how


def _short(path: str) -> str:
    """Return a short name of a run: its folder's, if the file's name is a usual one."""
    absolute = Path(path).absolute()
    if absolute.name in ("metrics.jsonl", "trainer_state.json"):
        return absolute.parent.name
    return absolute.name if absolute.is_dir() else absolute.stem


def _measure(runs: Sequence[Run], given: argparse.Namespace) -> int:
    floor = measure_noise(runs)
    path = local_path("--out", given.out or FLOOR)
    path = path / FLOOR if path.is_dir() else path
    _write(path, floor.to_dict())
    lines = [f"noise floor of {', '.join(run.label for run in runs)} in {floor.dtype}"]
    for name, spreads in floor.spreads.items():
        lines.append(
            f"  {name:<9} spread at most {max(spreads.values()):.1e} over {len(spreads):,} steps, "
            f"so a band of up to {floor.factor * max(spreads.values()):.1e}"
        )
    told = ", ".join(floor.differences) or "nothing in run.json or config.yaml"
    print_lines([*lines, f"  they differ in {told}", f"wrote {path}"], "backslashreplace")
    return 0


def _compare(runs: Sequence[Run], given: argparse.Namespace, argv: Sequence[str]) -> int:
    floor: NoiseFloor | None = None
    if given.noise_floor:
        floor = read_floor(local_path("--noise-floor", given.noise_floor))
    comparison = compare(runs, loss_tolerance=given.loss_tolerance, floor=floor, steps=given.steps)
    folder = local_path("--out", given.out or ".")
    wrote = [folder / PARITY]
    _write(wrote[0], comparison.to_dict())
    name = given.figure.removesuffix(".png").removesuffix(".svg")
    old: list[str] = []
    if comparison.verdict == DIFFERENT_DATA:
        left = [path for end in (".png", ".svg") if (path := folder / f"{name}{end}").exists()]
        old = [
            f"note: {path} is from an earlier comparison; nothing was drawn now" for path in left
        ]
    elif name != NO_FIGURE:
        # late: matplotlib takes a second, and only a figure needs it
        from torchprime.compare.draw import draw

        wrote += draw(comparison, folder / name)
    print_lines(
        [
            *terminal(comparison),
            "",
            f"wrote {', '.join(map(str, wrote))}",
            *old,
            *_advice(comparison, argv),
            final_line(comparison),
        ],
        "backslashreplace",
    )
    return 0 if comparison.verdict == AGREE else 1


def _write(path: Path, content: Mapping[str, object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, content)
    except OSError as error:
        raise RuntimeSetupError(
            f"--out: {path} cannot be written ({error.strerror}), expected a place that can be"
        ) from error


# Printing -----------------------------------------------------------------------------------------


def terminal(comparison: Comparison) -> Iterator[str]:
    """Yield the lines for the terminal, all but the final one."""
    width = max(len(run.label) for run in comparison.runs)
    for run in comparison.runs:
        role = "reference" if run is comparison.reference else "run"
        speed = usual_speed(run)
        told = [run.source, f"{len(run.steps):,} steps ({_span(list(run.steps))})"]
        told += [run.dtype or "dtype unknown"]
        told += [f"{speed:,.0f} supervised tok/s"] if speed else []
        yield f"{role:<10} {run.label:<{width}}  {', '.join(told)}"
        yield from (f"{'':<10} {'':<{width}}  {note}" for note in run.notes)
    judged = len(comparison.steps)
    alone = "" if judged == comparison.common else f", the first {judged:,} judged"
    yield f"{'common':<10} {comparison.common:,} steps{alone} ({_span(comparison.steps)})"
    for pair in comparison.pairs:
        yield f"{'data':<10} {pair.run.label:<{width}}  {data_line(comparison, pair)}"
    for pair in comparison.pairs:
        if pair.differences:
            told = _differences(pair)
            yield f"{'other':<10} {pair.run.label:<{width}}  {told}"
    if comparison.verdict != DIFFERENT_DATA:
        yield ""
        yield from _table(comparison, width)
    for note in comparison.notes:
        yield f"note: {note}"


def _span(steps: Sequence[int]) -> str:
    return f"{min(steps):,} to {max(steps):,}"


def data_line(comparison: Comparison, pair: Pair) -> str:
    """Return a line about the pair's data."""
    check, count = pair.data, len(comparison.steps)
    if (first := check.first_difference) is not None:
        moved = first.moved_from
        hint = f", which {comparison.reference.label} has at step {moved}" if moved else ""
        return (
            f"DIFFERENT at step {first.step}: {first.what} {first.value}{hint}; "
            f"{comparison.reference.label} has {first.reference}"
        )
    if check.hashes:
        return f"the same batches at {check.hashes:,} of {count:,} steps, by their hashes"
    if check.tokens:
        return (
            f"could not be checked: no batch hashes; supervised tokens are equal at "
            f"{check.tokens:,} of {count:,} steps"
        )
    return "could not be checked: no batch hashes"


def _differences(pair: Pair) -> str:
    told = [f"{name} {_value(a)} -> {_value(b)}" for name, (a, b) in pair.differences.items()]
    more = len(told) - SHOWN_DIFFERENCES
    return "; ".join(told[:SHOWN_DIFFERENCES]) + (f"; {more} more in {PARITY}" if more > 0 else "")


def _value(value: Any) -> str:
    text = (
        value if isinstance(value, str) and value.isprintable() else json.dumps(value, default=str)
    )
    return text if len(text) <= 40 else text[:37] + "..."


def _table(comparison: Comparison, width: int) -> Iterator[str]:
    names = [n for n in QUANTITIES if any(n in pair.quantities for pair in comparison.pairs)]
    cells = [["", *names, "verdict"]]
    for pair in comparison.pairs:
        judged = [pair.quantities.get(name) for name in names]
        cells.append([pair.run.label, *map(_worst, judged), pair.verdict])
    cells.append(["", *(_band(comparison, name) for name in names), ""])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    widths[0] = max(widths[0], width)
    for row in cells:
        line = "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True))
        yield line.rstrip()
    for pair in comparison.pairs:
        if pair.first_beyond:
            yield f"{pair.run.label}: {first_line(comparison, pair)}"
        yield from (f"{pair.run.label}: {note}" for note in pair.notes)


def _band(comparison: Comparison, name: str) -> str:
    judged = [pair.quantities[name] for pair in comparison.pairs if name in pair.quantities]
    widths = [point.band for each in judged for point in each.points if point.band is not None]
    if not widths:
        return "no band"
    low, high = f"{min(widths):.1e}", f"{max(widths):.1e}"
    return f"band {low}" if low == high else f"band {low} to {high}"


def _worst(judged: Judged | None) -> str:
    if judged is None:
        return "-"
    worst = judged.worst
    return f"{worst.relative:.1e} at step {worst.step:,}" if worst.relative else "equal"


def first_line(comparison: Comparison, pair: Pair) -> str:
    """Return a line about the place where the pair first leaves a band."""
    assert pair.first_beyond is not None
    name, point = pair.first_beyond
    return (
        f"first out of its band at step {point.step:,}: {name} {point.value:.8g}, "
        f"{comparison.reference.label} has {point.reference:.8g}; {point.relative:.1e} apart, "
        f"the band is {point.band:.1e}"
    )


def _advice(comparison: Comparison, argv: Sequence[str]) -> Iterator[str]:
    """Return the commands that measure a missing noise floor."""
    if comparison.bands["loss"] is None and comparison.verdict != DIFFERENT_DATA:
        dtype = " or ".join(imprecise(comparison.runs))
        yield f"measure the noise floor, on two or more runs of this config in {dtype}:"
        yield f"  torchprime compare --measure-noise RUN RUN --out {FLOOR}"
        yield f"  torchprime compare {shlex.join(argv)} --noise-floor {FLOOR}"


def final_line(comparison: Comparison) -> str:
    """Return the verdict in a line."""
    reference = comparison.reference.label
    of_verdict = [pair for pair in comparison.pairs if pair.verdict == comparison.verdict]
    labels = ", ".join(pair.run.label for pair in of_verdict)
    if comparison.verdict == AGREE:
        labels = labels if len(of_verdict) < 4 else f"{len(of_verdict)} runs"
        return f"AGREE: {labels} with {reference} over {comparison.told_steps}"
    if comparison.verdict == TOO_FEW:
        return f"TOO FEW STEPS: {too_few(comparison, of_verdict[0])}"
    if comparison.verdict == DIFFER:
        return f"DIFFER: {labels} from {reference}"
    if comparison.verdict == DIFFERENT_DATA:
        return f"DIFFERENT DATA: {labels} did not see the batches of {reference}; nothing compared"
    return "NOT JUDGED: measure the noise floor"


def too_few(comparison: Comparison, pair: Pair) -> str:
    """Return the reason why equal losses do not prove agreement, and the way to a proof."""
    coverage, count = pair.coverage, len(pair.quantities["loss"].points)
    assert coverage is not None
    return (
        f"the losses of {pair.run.label} and {comparison.reference.label} were compared at "
        f"{coverage.told}, which lie in {coverage.stretches} of the {coverage.of_stretches} equal "
        f"parts of the run; an agreement needs {coverage.needed}. Log the same steps in both, or "
        f"judge the common ones alone: --steps {count}"
    )
