"""Measured bands: the difference between runs that ought to be equal.

In bfloat16 two correct implementations differ by more than any fixed tolerance that would be
useful, and the difference grows with the steps. So it is measured. Runs of one config and dtype
that differ only in settings that must not matter, such as mesh or accumulation, have a spread at
each step: the largest less the smallest value, relative to the first run's. The band at a step is
the largest spread among the WINDOW records around it (one small spread by chance makes no narrow
band) times FACTOR (the spread of two or three runs underestimates the difference of the next one).

`torchprime compare --measure-noise RUN RUN [RUN...] --out FILE` writes a floor, and
`--noise-floor FILE` judges by it. It says nothing about steps after its last one.
"""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchprime.compare.align import (
    align,
    check_data,
    check_means,
    common_steps,
    differences,
    relative,
)
from torchprime.compare.entries import BandEntry, NoiseFloorFile
from torchprime.compare.logs.run import Run
from torchprime.errors import DataError
from torchprime.files.atomic import read_regular_text

NOISY = ("loss", "eval_loss", "grad_norm")  # the learning rate has no noise
LR_TOLERANCE = 1e-6
FACTOR = 3.0
WINDOW = 11
KIND = "torchprime noise floor"
MOST_BYTES = 256 << 20  # of a floor; one of a million steps has some 100 MB
EXPECTED = "expected a file that `torchprime compare --measure-noise RUN RUN --out FILE` wrote"


@dataclass(frozen=True)
class Band:
    """The largest accepted distance of a quantity from the reference, relative, and its origin."""

    origin: str
    least: float
    steps: tuple[int, ...] = ()  # from a noise floor; if empty, `least` holds at every step
    widths: tuple[float, ...] = ()

    def at(self, step: int) -> float:
        """Return the width at a step of the floor; between two of them, the larger one."""
        if not self.steps:
            return self.least
        right = min(bisect.bisect_left(self.steps, step), len(self.steps) - 1)
        left = right if self.steps[right] == step else max(right - 1, 0)
        return max(self.least, *self.widths[left : right + 1])

    def to_dict(self) -> BandEntry:
        """Return the band's entry in parity.json."""
        if self.steps:
            return {"relative_at_least": self.least, "from": self.origin}
        return {"relative": self.least, "from": self.origin}


@dataclass(frozen=True)
class MeasuredRun:
    """One of the runs that a noise floor was measured on."""

    label: str
    path: str
    steps: int  # that it logged


@dataclass(frozen=True)
class NoiseFloor:
    """The spread of each noisy quantity at each step, and what it was measured on."""

    dtype: str
    factor: float
    window: int
    runs: tuple[MeasuredRun, ...]
    differences: tuple[str, ...]  # the settings that were not the same in all runs
    spreads: Mapping[str, Mapping[int, float]]

    @property
    def last_step(self) -> int:
        return max(self.spreads["loss"])

    def band(self, name: str, least: float, origin: str) -> Band | None:
        """Return the quantity's band, nowhere below `least`; None if it was not measured.

        The held-out loss is logged seldom, and few spreads may all be lucky: its band is nowhere
        below the training loss's, which is a mean over fewer tokens.
        """
        spreads = self.spreads.get(name)
        if not spreads:
            return None
        steps = tuple(sorted(spreads))
        widths = [self.factor * w for w in running_max([spreads[s] for s in steps], self.window)]
        if name == "eval_loss" and (loss := self.band("loss", least, origin)):
            widths = [max(w, loss.at(step)) for step, w in zip(steps, widths, strict=True)]
        return Band(origin, least, steps, tuple(widths))

    def to_dict(self) -> NoiseFloorFile:
        """Return the file's content."""
        return {
            "kind": KIND,
            "dtype": self.dtype,
            "factor": self.factor,
            "window": self.window,
            "runs": [
                {"label": run.label, "path": run.path, "steps": run.steps} for run in self.runs
            ],
            "differences": list(self.differences),
            "spreads": {
                name: {str(step): spread for step, spread in spreads.items()}
                for name, spreads in self.spreads.items()
            },
        }


def running_max(values: Sequence[float], window: int) -> list[float]:
    """Return at each place the largest of the `window` values around it; fewer at the ends."""
    half = window // 2
    return [max(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def measure_noise(runs: Sequence[Run]) -> NoiseFloor:
    """Return the noise floor of runs that ought to be equal.

    Raises:
        DataError: if they are fewer than two, have different data, learning rates or dtypes or
            none that is known, a number that is not finite, or losses equal to the last bit.
    """
    if len(runs) < 2:
        raise DataError(f"--measure-noise: got {len(runs)} run, expected two or more")
    reference, *others = runs
    check_means(runs)
    steps = common_steps(runs)
    for run in others:
        _check_comparable(reference, run, steps)
    spreads = {name: spread for name in NOISY if (spread := _spread(runs, name, steps))}
    if not any(spreads.get("loss", {}).values()):
        raise DataError(
            "--measure-noise: the runs' losses are equal to the last bit, or not logged by all; "
            "expected runs that differ in something that must not matter but changes rounding, "
            "such as mesh or task.gradient_accumulation_steps"
        )
    assert reference.dtype is not None
    return NoiseFloor(
        dtype=reference.dtype,
        factor=FACTOR,
        window=WINDOW,
        runs=tuple(MeasuredRun(run.label, run.path, len(run.steps)) for run in runs),
        differences=tuple(sorted({name for run in others for name in differences(reference, run)})),
        spreads=spreads,
    )


def _check_comparable(reference: Run, run: Run, steps: Sequence[int]) -> None:
    if reference.dtype is None or run.dtype != reference.dtype:
        raise DataError(
            f"--measure-noise: {reference.label} is {reference.dtype or 'of unknown dtype'} and "
            f"{run.label} {run.dtype or 'of unknown dtype'}, expected one dtype, as run.json tells "
            "it; give folders of runs with the same torch_dtype"
        )
    check = check_data(reference, run, steps)
    if check.first_difference is not None:
        at = check.first_difference
        raise DataError(
            f"--measure-noise: {run.label} had other data than {reference.label}: "
            f"{at.what} {at.value}, not {at.reference}, at step {at.step}; expected "
            "runs with the same dataset, seed and global batch size"
        )
    for each in align(reference, run, "lr", steps):
        if not relative(each.reference, each.value) <= LR_TOLERANCE:
            raise DataError(
                f"--measure-noise: the lr of {run.label} is {each.value:g}, not {each.reference:g} "
                f"as in {reference.label}, at step {each.step}; expected one schedule"
            )


def _spread(runs: Sequence[Run], name: str, steps: Sequence[int]) -> dict[int, float]:
    reference, *others = runs
    values: dict[int, list[float]] = {}
    for run in others:
        for each in align(reference, run, name, steps):
            values.setdefault(each.step, [each.reference]).append(each.value)
    spreads = {}
    for step, found in sorted(values.items()):
        if len(found) < len(runs):
            continue  # not logged by all
        if not all(map(math.isfinite, found)) or found[0] == 0:
            raise DataError(
                f"--measure-noise: {name} at step {step} is {found}; expected finite numbers and a "
                "reference that is not 0"
            )
        spreads[step] = (max(found) - min(found)) / abs(found[0])
    return spreads


def read_floor(path: str | Path) -> NoiseFloor:
    """Read the JSON of `NoiseFloor.to_dict`. Raise a DataError if it is malformed."""
    try:
        values = json.loads(read_regular_text(Path(path), MOST_BYTES))
        if values["kind"] != KIND:
            raise ValueError(f"kind is {values['kind']!r}")
        floor = NoiseFloor(
            dtype=str(values["dtype"]),
            factor=float(values["factor"]),
            window=int(values["window"]),
            runs=tuple(
                MeasuredRun(str(run["label"]), str(run["path"]), int(run["steps"]))
                for run in values["runs"]
            ),
            differences=tuple(values["differences"]),
            spreads={
                name: {int(step): float(spread) for step, spread in spreads.items()}
                for name, spreads in values["spreads"].items()
            },
        )
        numbers = [floor.factor, *(v for s in floor.spreads.values() for v in s.values())]
        if not floor.spreads.get("loss") or not all(0 <= n < math.inf for n in numbers):
            raise ValueError("no spread of the loss, or one that is no number")
    except OSError as error:
        raise DataError(
            f"--noise-floor: {path} cannot be read ({error.strerror}); {EXPECTED}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"--noise-floor: {path} is not a noise floor ({error!r}); {EXPECTED}"
        ) from error
    return floor
