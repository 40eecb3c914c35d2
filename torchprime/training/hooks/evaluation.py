"""The hook that measures held-out loss and answers before the first step, every N steps, and at the
end.

The metrics decide if the step is the best so far (the checkpoint hook asks), if the run ends
early, and if a warning of overfitting is due. All processes measure and decide the same; the first
one grades, since a grader may be a user's own code, and sends the grades to the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from torchprime.data.blocks.dataset import PackedDataset
from torchprime.errors import RuntimeSetupError
from torchprime.evaluation.behaviour import ask, grade, sample_lines, samples_file, scores_of
from torchprime.evaluation.graders.samples import Sample
from torchprime.evaluation.heldout import heldout_loss
from torchprime.evaluation.intervals import Score
from torchprime.evaluation.selection import Evaluated, overfitting
from torchprime.files.atomic import write_text
from torchprime.files.private_folders import own_folder
from torchprime.metrics.record import EvalRecord, StepRecord
from torchprime.metrics.throughput import Stopwatch
from torchprime.training.agreeing import from_first
from torchprime.training.backend import Backend
from torchprime.training.evaluating import Evaluation
from torchprime.training.loop import BaseHook, CompileGuard, RunControl
from torchprime.training.run.resume import Past


class EvaluationHook(BaseHook):
    """Hook that evaluates; its time is excluded from the steps' by pausing their stopwatch.

    Args:
        data: the packed held-out rows.
        evaluation: prompts, graders, and the decisions that depend on them.
        batch_size: blocks per forward of the held-out loss.
        every_steps: None measures only before the first step and after the last.
        emit: writes a record.
        control: ends the run early.
        past: evaluations before a resume.
        first_step: updates that were done before this start.
    """

    def __init__(
        self,
        backend: Backend,
        data: PackedDataset,
        evaluation: Evaluation,
        *,
        batch_size: int,
        every_steps: int | None,
        emit: Callable[[EvalRecord], None],
        say: Callable[[str], None],
        guard: CompileGuard,
        watch: Stopwatch,
        control: RunControl,
        past: Past,
        first_step: int,
    ) -> None:
        self.backend, self.data, self.evaluation = backend, data, evaluation
        self.batch_size, self.every_steps = batch_size, every_steps
        self.emit, self.say, self.guard, self.watch = emit, say, guard, watch
        self.control, self.history = control, list(past.history)
        self._losses = list(past.losses)  # of training, since the last evaluation
        self.first_step = first_step
        self._started = time.perf_counter()
        self.seconds = 0.0  # of all evaluations of this start

    def on_start(self) -> None:
        self._started = time.perf_counter()
        if not self.history:
            self._evaluate(self.first_step, answers=True)

    def remembered(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        return Past(tuple(self.history), tuple(self._losses)).to_dict()

    def on_record(self, record: StepRecord) -> None:
        self._losses.append(record.loss)

    def scores_after(self, step: int) -> dict[str, float]:
        """Return the scores measured after exactly this step; {} if there are none."""
        last = self.history[-1] if self.history else None
        return last.scores if last is not None and last.step == step else {}

    def after_step(self, step: int, last: bool) -> None:
        due = self.every_steps is not None and step % self.every_steps == 0
        if not (last or due):
            return
        between = self.evaluation.answers_every or self.every_steps or 1
        self._evaluate(step, answers=last or step % between == 0)
        if (warning := overfitting(self.history)) is not None:
            self.say(warning)
        if last:
            return
        stopping = self.evaluation.stopping
        reason = None if stopping is None else stopping.reason(self.history)
        if reason is not None:
            if not self.evaluation.complete(self.scores_after(step)):
                self._evaluate(step, answers=True)  # the last evaluation has answers
            self.control.stop_reason = reason
            self.say(f"early stopping after step {step}: {reason}")

    def on_end(self) -> None:
        if self.history and self.seconds:
            share = self.seconds / max(time.perf_counter() - self._started, 1e-9)
            self.say(f"evaluation took {self.seconds:.1f} s, {share:.1%} of the run")

    def _evaluate(self, step: int, answers: bool) -> None:
        self.backend.synchronize()  # unfinished steps count as the steps' time
        with self.watch.paused():
            started = time.perf_counter()
            with self.guard.watch("held-out step", (self.batch_size, self.data.block_size)):
                loss = heldout_loss(self.backend, self.data, self.batch_size)
            generated: dict[str, Any] = {}
            if answers and self.evaluation.prompts:
                generated = self._answers(step)
            now = time.perf_counter()
            self.seconds += now - started
            record = EvalRecord(
                step=step,
                eval_loss=loss.mean,
                eval_supervised_tokens=self.data.supervised_tokens,
                seconds=now - started,
                train_loss=sum(self._losses) / len(self._losses) if self._losses else None,
                source_losses=loss.by_source,
                share_of_run=self.seconds / (now - self._started),
                **generated,
            )
        if self.history and self.history[-1].step == step:  # measured again, now with answers
            record = replace(record, train_loss=self.history.pop().train_loss)
        self.history.append(Evaluated.of(record.to_dict()))
        self._losses.clear()
        self.emit(record)

    def _answers(self, step: int) -> dict[str, Any]:
        """Return the fields of a record that describe answers."""
        started = time.perf_counter()
        e = self.evaluation
        shapes = (e.options.batch_size, e.options.max_new_tokens)
        with self.guard.watch("generation", shapes):
            samples = ask(self.backend, e.prompts, e.options, e.decode)
        seconds = time.perf_counter() - started
        scores = from_first(self.backend, lambda: self._grade(step, samples))
        return {
            "scores": {name: asdict(score) for name, score in scores.items()},
            "generated_tokens": sum(sample.tokens for sample in samples),
            "generate_seconds": seconds,
        }

    def _grade(self, step: int, samples: Sequence[Sample]) -> dict[str, Score]:
        e = self.evaluation
        grades = grade(samples, e.graders)
        path = samples_file(e.folder, step)
        own_folder(e.folder, path.parent.name, "output_dir")
        try:
            write_text(path, "".join(sample_lines(samples, grades)))
        except OSError as error:
            raise RuntimeSetupError(
                f"{path} cannot be written: {error}. Make room, or give this user the right to "
                "write there; the same command then goes on."
            ) from error
        return scores_of(grades, list(e.graders), e.measures)
