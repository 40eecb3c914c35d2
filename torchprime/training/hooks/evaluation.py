"""The hook that measures held-out loss and answers before the first step, every N steps, and at the
end.

The metrics decide if the step is the best so far (the checkpoint hook asks), if the run ends
early, and if a warning of overfitting is due. All processes measure and decide the same; the first
one grades, since a grader may be a user's own code, and sends the grades to the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

from torchprime.data.blocks.dataset import PackedDataset
from torchprime.errors import RuntimeSetupError
from torchprime.evaluation.behaviour import ask, grade, sample_lines, samples_file, scores_of
from torchprime.evaluation.graders.samples import Sample
from torchprime.evaluation.heldout import heldout_loss
from torchprime.evaluation.intervals import Score
from torchprime.evaluation.selection import Evaluated, overfitting
from torchprime.files.atomic import write_text
from torchprime.files.private_folders import own_folder
from torchprime.metrics.goodput import EVALUATION
from torchprime.metrics.record import EvalRecord, StepRecord
from torchprime.training.backend import Backend
from torchprime.training.evaluating import AnswerFields, Evaluation, answer_fields
from torchprime.training.loop import BaseHook, RunControl
from torchprime.training.regularization.near_base import NAME as KL
from torchprime.training.regularization.penalty import PENALTIES
from torchprime.training.run.resume import KeptEvaluations, Past


@dataclass(frozen=True)
class HeldOut:
    """The held-out set of a run and the schedule of its loss.

    Attributes:
        batch_size: blocks per forward.
        every_steps: None measures only before the first step and after the last.
    """

    data: PackedDataset
    batch_size: int
    every_steps: int | None


class EvaluationHook(BaseHook):
    """Hook that evaluates; its time is excluded from the steps' by pausing their stopwatch.

    Args:
        evaluation: prompts, graders, and the decisions that depend on them.
        control: of the loop; the hook may end the run early.
        past: steps and evaluations before this start.
        emit: writes a record.
    """

    def __init__(
        self,
        backend: Backend,
        held_out: HeldOut,
        evaluation: Evaluation,
        control: RunControl,
        past: Past,
        *,
        emit: Callable[[EvalRecord], None],
        say: Callable[[str], None],
    ) -> None:
        self.backend, self.held_out, self.evaluation = backend, held_out, evaluation
        self.control, self.emit, self.say = control, emit, say
        self.first_step, self.history = past.step, list(past.history)
        self._losses = list(past.losses)  # of training, since the last evaluation
        self._started = time.perf_counter()
        self.seconds = 0.0  # of all evaluations of this start

    def on_start(self) -> None:
        self._started = time.perf_counter()
        if not self.history:
            self._evaluate(self.first_step, answers=True)

    def remembered(self) -> dict[str, KeptEvaluations]:
        """Return the state that a resumed run needs."""
        return Past(self.first_step, tuple(self.history), tuple(self._losses)).to_dict()

    def on_record(self, record: StepRecord) -> None:
        self._losses.append(cross_entropy_of(record))

    def scores_after(self, step: int) -> dict[str, float]:
        """Return the scores measured after exactly this step; {} if there are none."""
        last = self.history[-1] if self.history else None
        return last.scores if last is not None and last.step == step else {}

    def after_step(self, step: int, last: bool) -> None:
        every = self.held_out.every_steps
        due = every is not None and step % every == 0
        if not (last or due):
            return
        between = self.evaluation.answers_every or every or 1
        self._evaluate(step, answers=last or step % between == 0)
        if (warning := overfitting(self.history)) is not None:
            self.say(warning)
        if last:
            return
        stopping = self.evaluation.choosing.stopping
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
        data, batch_size = self.held_out.data, self.held_out.batch_size
        self.backend.synchronize()  # unfinished steps count as the steps' time
        with self.control.watch.paused(), self.control.ledger.at(EVALUATION):
            started = time.perf_counter()
            generated: AnswerFields = {}
            # What is measured is what is exported. Before the first update there is no average.
            with self.backend.averaged() if step else nullcontext():
                with self.control.guard.watch("held-out step", (batch_size, data.block_size)):
                    loss = heldout_loss(self.backend, data, batch_size)
                if answers and self.evaluation.prompts:
                    generated = self._answers(step)
            now = time.perf_counter()
            self.seconds += now - started
            record = EvalRecord(
                step=step,
                eval_loss=loss.mean,
                eval_supervised_tokens=data.supervised_tokens,
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

    def _answers(self, step: int) -> AnswerFields:
        """Generate and grade answers; return what a record says of them."""
        started = time.perf_counter()
        e = self.evaluation
        shapes = (e.options.batch_size, e.options.max_new_tokens)
        with self.control.guard.watch("generation", shapes):
            samples = ask(self.backend, e.prompts, e.options, e.decode)
        seconds = time.perf_counter() - started
        scores = self.backend.processes.first_does(lambda: self._grade(step, samples))
        return {**answer_fields(scores, samples), "generate_seconds": seconds}

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
                "write there; the same command then resumes."
            ) from error
        return scores_of(grades, list(e.graders), e.measures)


def cross_entropy_of(record: StepRecord) -> float:
    """Return the part of a step's loss that held-out loss has too."""
    terms = record.terms or {}
    if "cross_entropy" in terms:
        return terms["cross_entropy"]
    return record.loss - sum(terms.get(name, 0.0) for name in (*PENALTIES, KL))
