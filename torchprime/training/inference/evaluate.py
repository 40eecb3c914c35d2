"""The evaluation of a model outside a run: what a run's evaluation hook measures, once.

config + model -> rows, prompts, graders -> engine -> loss, samples -> scores
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torchprime.config.checks import refuse
from torchprime.config.schema import TrainConfig
from torchprime.config.sections.evaluation import LOSSES
from torchprime.evaluation.before_after import lines_of, table_of
from torchprime.evaluation.behaviour import Grades, ask, grade, sample_lines, scores_of
from torchprime.evaluation.graders.samples import Sample
from torchprime.evaluation.selection import Evaluated, parse_rule
from torchprime.files.atomic import atomic_folder, write_json, write_text
from torchprime.metrics.record import EvalRecord
from torchprime.text.terminal import only_first
from torchprime.training.evaluating import (
    Choosing,
    Evaluation,
    answer_fields,
    make_evaluation,
    make_graders,
)
from torchprime.training.inference.engine import Engine, OpenEngine
from torchprime.training.inference.model import fingerprint_of, with_model
from torchprime.training.inference.placed import read_inputs
from torchprime.training.run.folder import versions
from torchprime.training.setup.inputs import RunInputs

FORMAT_VERSION = 1
RESULT, SAMPLES = "evaluation.json", "samples.jsonl"
NOTHING_CHOSEN = Choosing(parse_rule([], ["eval_loss asc"], LOSSES), None)  # there is one step
Say = Callable[[str], None]


@dataclass(frozen=True)
class EvaluateRequest:
    """A model to evaluate, as it was given, and the new folder for the result."""

    model: str
    out: Path

    def check(self, config: TrainConfig) -> None:
        """Check what needs no file of the model.

        Raises:
            ConfigError: a config without held-out rows, or an output that exists.
        """
        if not config.holds_out:
            refuse(
                "eval",
                "no held-out rows",
                "some, whose loss is measured",
                "Choose them: eval=file eval.file_dataset_path=rows.jsonl.",
            )
        require_new_folder(self.out)


def require_new_folder(out: Path) -> None:
    """Raise a ConfigError if something is at `out`, other than an empty folder."""
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        refuse("--out", str(out), "a new or empty folder", "Give another name, or remove this one.")


def evaluate_model(
    config: TrainConfig, request: EvaluateRequest, open_engine: OpenEngine, say: Say
) -> list[str]:
    """Measure held-out loss and grades as a run does after its last step, and write them.

    Args:
        config: of the run whose evaluation this is; `request.model` replaces its model.
        say: prints a line for the user; called on the first process only.

    Returns:
        The table of scores, one line each.

    Raises:
        ConfigError, CheckpointError, DataError: as for a run of the config.
    """
    say = only_first(say)
    request.check(config)
    graders = make_graders(config.eval)
    inputs = read_inputs(with_model(config, request.model), say)
    evaluation = make_evaluation(inputs, NOTHING_CHOSEN, graders, request.out)
    with open_engine(inputs) as engine:
        started = time.perf_counter()
        record = _loss(inputs, engine)
        samples = _samples(evaluation, engine)
        answered = time.perf_counter()
        record = replace(record, seconds=answered - started)

        def finish() -> list[str]:
            grades = grade(samples, evaluation.graders)
            done = _with_scores(record, samples, grades, evaluation)
            _write(inputs, engine, request, done, list(sample_lines(samples, grades)))
            return _table(done, request.model)

        return engine.processes.first_does(finish)


def _loss(inputs: RunInputs, engine: Engine) -> EvalRecord:
    data = inputs.rows.heldout
    assert data is not None  # holds_out
    loss = engine.loss(data, inputs.micro_batch_size)
    return EvalRecord(
        step=0,
        eval_loss=loss.mean,
        eval_supervised_tokens=data.supervised_tokens,
        seconds=0.0,
        source_losses=loss.by_source,
    )


def _samples(evaluation: Evaluation, engine: Engine) -> list[Sample]:
    e = evaluation
    return ask(engine.generator, e.prompts, e.options, e.decode) if e.prompts else []


def _with_scores(
    record: EvalRecord, samples: list[Sample], grades: list[Grades], evaluation: Evaluation
) -> EvalRecord:
    if not samples:
        return record
    scores = scores_of(grades, list(evaluation.graders), evaluation.measures)
    return replace(record, **answer_fields(scores, samples))


def _write(
    inputs: RunInputs,
    engine: Engine,
    request: EvaluateRequest,
    record: EvalRecord,
    lines: list[str],
) -> None:
    """Write the folder of the result; its samples have the form of a run's."""
    content = {
        "format_version": FORMAT_VERSION,
        "model": request.model,
        "sha256": fingerprint_of(inputs.files),
        "engine": engine.name,
        **engine.facts,
        "data": inputs.rows.fingerprints(),
        "versions": versions(),
        "evaluation": record.to_dict(),
    }
    with atomic_folder(request.out) as folder:
        write_json(folder / RESULT, content)
        if lines:
            write_text(folder / SAMPLES, "".join(lines))


def _table(record: EvalRecord, model: str) -> list[str]:
    return lines_of(*table_of({model: Evaluated.of(record.to_dict())}))
