"""The evaluation of a run, made from the config's eval and selection sections.

Every error that a config can have there is found here, before a weight is read: a grader or
a metric that does not exist, a prompt that leaves no room. Later code gets no config objects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TypedDict, cast

from torchprime.config.schema import TrainConfig
from torchprime.config.sections.evaluation import EvalConfig
from torchprime.evaluation.behaviour import Prompt, check_prompts
from torchprime.evaluation.graders.make import MEASURES, make_grader
from torchprime.evaluation.graders.samples import Grader, Sample
from torchprime.evaluation.intervals import Score
from torchprime.evaluation.selection import EarlyStopping, Rule, known_metric, parse_rule
from torchprime.generation.decode import GenerateOptions
from torchprime.metrics.record import GradedScore
from torchprime.training.setup.datasets import question_of
from torchprime.training.setup.inputs import RunInputs


@dataclass(frozen=True)
class Choosing:
    """The decisions that depend on the metrics: selection, early stopping."""

    rule: Rule
    stopping: EarlyStopping | None


@dataclass(frozen=True)
class Evaluation:
    """The prompts and graders of an evaluation, and the decisions that depend on it.

    Attributes:
        prompts: of the held-out rows that are answered; none where only the loss is measured.
        decode: from an answer's token ids to its text.
        measures: those of the graders that measure, rather than pass or fail.
        answers_every: steps between answers; None: at each evaluation of the loss.
        folder: of the run.
    """

    prompts: list[Prompt]
    options: GenerateOptions
    decode: Callable[[list[int]], str]
    graders: Mapping[str, Grader]
    measures: frozenset[str]
    answers_every: int | None
    folder: Path
    choosing: Choosing

    def complete(self, scores: Mapping[str, float]) -> bool:
        """Return True if these scores have a value from every grader."""
        return all(name in scores for name in self.graders)


def make_choosing(config: TrainConfig) -> Choosing:
    """Check gates, ranking and patience against the metrics of the run.

    Raises:
        ConfigError: a malformed rule, or a metric that is not measured.
    """
    selection, known = config.selection, config.measured
    stopping = selection.early_stopping
    rule = parse_rule(selection.gates, selection.ranking, known)
    if stopping.metric is None:
        return Choosing(rule, None)
    metric = known_metric(stopping.metric, known, "selection.early_stopping.metric")
    highest = stopping.mode == "max"
    return Choosing(rule, EarlyStopping(metric, highest, stopping.patience, stopping.min_delta))


def make_graders(eval: EvalConfig) -> dict[str, Grader]:
    """Return the graders by name.

    Raises:
        ConfigError: a kind, option or value that does not exist.
    """
    graders = {}
    for place, given in enumerate(eval.graders):
        options = {key: value for key, value in given.items() if key not in ("name", "kind")}
        key = f"eval.graders[{place}]"
        graders[given["name"]] = make_grader(given["kind"], key=key, **options)
    return graders


def make_evaluation(
    inputs: RunInputs, choosing: Choosing, graders: Mapping[str, Grader], folder: Path
) -> Evaluation:
    """Read and check the prompts.

    Args:
        folder: of the run.

    Raises:
        DataError: a prompt that leaves no room for an answer.
    """
    eval, tokenizer = inputs.config.eval, inputs.files.tokenizer
    max_length = inputs.files.architecture.max_position_embeddings
    g = eval.generate
    prompts = []
    if g.enabled:
        rejected = inputs.rows.rejected("eval")
        kept = (row for row in inputs.rows.sources.asked() if row.row_id not in rejected)
        for row in islice(kept, g.max_examples):
            asked = question_of(row, tokenizer, inputs.template)
            prompts.append(Prompt(row.row_id, asked.text, asked.ids, asked.answer))
        check_prompts(prompts, max_length)
    options = GenerateOptions(
        max_new_tokens=g.max_new_tokens,
        stop_ids=inputs.stop_ids,
        max_length=max_length,
        temperature=g.temperature,
        top_k=g.top_k,
        top_p=g.top_p,
        seed=inputs.config.seed,
        batch_size=g.batch_size,
    )
    return Evaluation(
        prompts,
        options,
        tokenizer.decode,
        graders,
        frozenset(each["name"] for each in eval.graders if each["kind"] in MEASURES),
        g.every_steps,
        folder,
        choosing,
    )


class AnswerFields(TypedDict, total=False):
    """The fields of an EvalRecord that describe answers, absent where none were generated."""

    scores: dict[str, GradedScore]
    generated_tokens: int
    generate_seconds: float


def answer_fields(scores: Mapping[str, Score], samples: Sequence[Sample]) -> AnswerFields:
    """Return what a record says of graded answers."""
    return {
        "scores": {name: cast("GradedScore", asdict(score)) for name, score in scores.items()},
        "generated_tokens": sum(sample.tokens for sample in samples),
    }
