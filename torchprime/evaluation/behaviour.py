"""Evaluation by generation: held-out prompts -> answers -> grades -> scores.

    prompts  --backend.generate-->  samples  --graders-->  grades  --intervals-->  scores by name

The trainer and the command line use the same functions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple, Protocol

from torchprime.checkpoint.run.catalog import Catalog
from torchprime.errors import DataError
from torchprime.evaluation.graders.samples import Grader, Sample
from torchprime.evaluation.intervals import Score, score
from torchprime.files.atomic import read_regular_text
from torchprime.generation.decode import Answer, GenerateOptions

MOST_BYTES = 2**30  # of a step's samples, which are held whole
EVALUATIONS = "evaluations"  # the folder of the samples in a run's folder
Grades = dict[str, float | None]  # by grader; None if it does not apply


class Prompt(NamedTuple):
    """A held-out row as a prompt."""

    row_id: str
    text: str  # the text for a reader
    ids: list[int]  # the messages for a model server
    reference: str


class Generator(Protocol):
    """The part of a backend that generates answers."""

    def generate(
        self, prompts: Sequence[Sequence[int]], options: GenerateOptions
    ) -> list[Answer]: ...


def check_prompts(prompts: Sequence[Prompt], max_length: int) -> None:
    """Check that every prompt leaves room for an answer.

    Raises:
        DataError: naming the first that does not, its length and the limit.
    """
    for prompt in prompts:
        if not prompt.ids:
            raise DataError(
                f"eval: the prompt of held-out row {prompt.row_id} is empty, and a model needs a "
                "token to continue. Remove the row, or give it a prompt."
            )
        if len(prompt.ids) >= max_length:
            raise DataError(
                f"eval: the prompt of held-out row {prompt.row_id} has {len(prompt.ids):,} tokens, "
                f"and the model's context has {max_length:,} positions, so no answer fits. Remove "
                "the row, or lower eval.generate.max_examples to the rows before it."
            )


def ask(
    backend: Generator,
    prompts: Sequence[Prompt],
    options: GenerateOptions,
    decode: Callable[[list[int]], str],
) -> list[Sample]:
    """Return the model's answers, in the order of the prompts."""
    answers = backend.generate([prompt.ids for prompt in prompts], options)
    return [
        Sample(p.row_id, p.text, decode(a.ids), p.reference, a.stopped, len(a.ids))
        for p, a in zip(prompts, answers, strict=True)
    ]


def grade(samples: Sequence[Sample], graders: Mapping[str, Grader]) -> list[Grades]:
    """Return each grader's grade of each sample."""
    return [{name: grader(sample) for name, grader in graders.items()} for sample in samples]


def scores_of(
    grades: Sequence[Grades], names: Sequence[str], measures: Collection[str] = ()
) -> dict[str, Score]:
    """Return each grader's mean with its count and interval.

    Args:
        measures: those of the names whose numbers are no passes and fails.

    Raises:
        DataError: a grader applies to no row at all.
    """
    found = {
        name: score([each[name] for each in grades], measure=name in measures) for name in names
    }
    idle = [name for name, value in found.items() if value is None]
    if idle:
        raise DataError(
            f"eval.graders: {', '.join(idle)} applies to none of the {len(grades)} held-out rows "
            "(no answer of that form in their completions?). Choose graders that fit the rows "
            "(docs/evaluation.md), or other held-out rows."
        )
    return {name: value for name, value in found.items() if value is not None}


def sample_lines(samples: Sequence[Sample], grades: Sequence[Grades]) -> Iterator[str]:
    """Yield one JSON line per sample, in the form of evaluations/step_*.jsonl."""
    for sample, grade in zip(samples, grades, strict=True):
        yield json.dumps({**asdict(sample), "grades": grade}, ensure_ascii=False) + "\n"


def samples_file(run: Path, step: int) -> Path:
    """Return the path of the samples of a step in a run's folder."""
    return run / EVALUATIONS / f"{Catalog.name_of(step)}.jsonl"


def read_samples(path: Path) -> list[tuple[Sample, Grades]]:
    """Read the lines that `sample_lines` wrote.

    Raises:
        DataError: naming the file, and the line that is no sample.
    """
    try:
        text = read_regular_text(path, MOST_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}), expected a run's samples") from error
    names = [spec.name for spec in fields(Sample)]
    found = []
    # Not splitlines: an answer may contain other characters that it treats as line ends.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        try:
            values = json.loads(line)
            grades: Grades = dict(values["grades"])
            if not all(each is None or isinstance(each, int | float) for each in grades.values()):
                raise ValueError("a grade is no number")
            found.append((Sample(**{name: values[name] for name in names}), grades))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{path}, line {number}: given {line[:80]!r}, expected a sample as the run wrote "
                f"it ({type(error).__name__}: {error}). Remove the file to go without its answers."
            ) from error
    return found
