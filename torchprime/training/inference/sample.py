"""Rejection sampling: several answers to each row, graded; the right ones become training rows.

    rows -> prompts x K -> engine -> samples.jsonl -> right, different, short -> rows.jsonl

The noise of an answer is a function of the seed, the row's id, the answer's number and the token's
place (generation/decode.py). So an answer does not depend on the batch, and a resumed sampling
writes the same file.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from torchprime.checkpoint.run.lock import run_lock
from torchprime.config.checks import refuse
from torchprime.config.schema import TrainConfig
from torchprime.data.rows.read import Row
from torchprime.errors import ConfigError, DataError
from torchprime.evaluation.behaviour import Prompt, ask, grade, sample_lines
from torchprime.evaluation.graders.make import LOWER_IS_BETTER, MEASURES
from torchprime.evaluation.graders.samples import Grader
from torchprime.files.atomic import make_folder, write_text
from torchprime.files.json_files import read_json
from torchprime.generation.decode import GenerateOptions
from torchprime.text.terminal import only_first
from torchprime.training.evaluating import make_graders
from torchprime.training.inference.engine import Engine, OpenEngine
from torchprime.training.inference.kept_rows import KeepRule, count_kept, kept_records
from torchprime.training.inference.model import fingerprint_of, with_model
from torchprime.training.inference.placed import read_inputs
from torchprime.training.inference.samples_file import (
    ROWS,
    SETTINGS,
    SamplesFile,
    require_unfinished,
)
from torchprime.training.run.folder import versions
from torchprime.training.setup.datasets import question_of
from torchprime.training.setup.inputs import RunInputs

FORMAT_VERSION = 1
Say = Callable[[str], None]


@dataclass(frozen=True)
class SampleRequest:
    """A model, the rows it answers, and the answers to keep.

    Attributes:
        out: a folder that is new, or holds the beginning of this sampling.
        side: the training rows or the held-out ones.
        limit: the number of rows; None for all.
        answers: of each row.
        right: names of the graders that decide; None for all that pass or fail.
        keep: answers of a row to keep at most, the shortest; None for all that differ.
        max_new_tokens, seed: None for eval.generate.max_new_tokens and the config's seed.
    """

    model: str
    out: Path
    side: Literal["train", "eval"] = "train"
    limit: int | None = None
    answers: int = 4
    right: Sequence[str] | None = None
    keep: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    max_new_tokens: int | None = None
    seed: int | None = None

    def check(self, config: TrainConfig) -> None:
        """Check what needs no file of the model.

        Raises:
            ConfigError: an output that exists, no grader, values that cannot be sampled with.
        """
        if not config.eval.graders:
            refuse(
                "eval.graders",
                [],
                "graders, which decide what answers are right",
                "Choose a graded task (eval=gsm8k_test_graded), or write some: docs/evaluation.md.",
            )
        if self.side == "eval" and not config.holds_out:
            refuse("--rows", "eval", "train, since the config holds no rows out", "Leave it out.")
        if self.answers > 1 and not self.temperature:
            refuse(
                "--temperature",
                0,
                f"above 0: without it all {self.answers} answers of a row are the same",
                "Give --temperature 1, or --answers 1.",
            )
        self.options(config)
        require_unfinished(self.out)

    def options(self, config: TrainConfig) -> GenerateOptions:
        """Return the options of generation, without the model's own."""
        g = config.eval.generate
        try:
            return GenerateOptions(
                max_new_tokens=g.max_new_tokens
                if self.max_new_tokens is None
                else self.max_new_tokens,
                stop_ids=(),
                max_length=2,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                seed=config.seed if self.seed is None else self.seed,
                batch_size=g.batch_size,
            )
        except ConfigError as error:
            name, _, rest = str(error).partition(":")
            raise ConfigError(f"--{name.replace('_', '-')}:{rest}") from None

    def rule(self, config: TrainConfig) -> KeepRule:
        """Return the rule for the answers that are kept.

        Raises:
            ConfigError: a name in `right` that is no grader, or one that only measures.
        """
        kinds = {each["name"]: each["kind"] for each in config.eval.graders}
        deciding = [name for name, kind in kinds.items() if kind not in MEASURES]
        for name in self.right or ():
            if name not in deciding:
                listed = ", ".join(deciding) or "none in this config"
                refuse("--right", name, f"a grader that passes or fails: {listed}", "Correct it.")
        by = deciding if self.right is None else list(self.right)
        if not by:
            refuse(
                "eval.graders",
                list(kinds),
                "one that passes or fails: these only measure",
                "Add one (docs/evaluation.md).",
            )
        return KeepRule(by, [name for name in by if kinds[name] in LOWER_IS_BETTER], self.keep)


@dataclass(frozen=True)
class Asked:
    """Rows and their prompts, in order, and the number of rows that cannot be asked."""

    rows: list[Row]
    prompts: list[Prompt]
    left_out: int


def asked_rows(inputs: RunInputs, side: Literal["train", "eval"], limit: int | None) -> Asked:
    """Read the rows to answer: those that training would use, and that leave room for an answer.

    Raises:
        DataError: there is none.
    """
    found, left_out = Asked([], [], 0), 0
    rejected = inputs.rows.rejected(side)
    longest = inputs.files.architecture.max_position_embeddings
    rows = (row for row in inputs.rows.sources.rows(side) if row.row_id not in rejected)
    for row in islice(rows, limit):
        asked = question_of(row, inputs.files.tokenizer, inputs.template)
        if not 0 < len(asked.ids) < longest:
            left_out += 1
            continue
        found.rows.append(row)
        found.prompts.append(Prompt(row.row_id, asked.text, asked.ids, asked.answer))
    if not found.rows:
        raise DataError(
            f"--rows: given {side}, but none of its {left_out:,} usable rows has a prompt that "
            f"leaves room for an answer in {longest:,} positions. Choose rows with prompts."
        )
    return replace(found, left_out=left_out)


def number_of(row_id: str, answer: int) -> int:
    """Return the number of a row's answer in the noise of sampling, in the int32 range.

    The answers of one row have different numbers. Two rows may share some, by chance.
    """
    start = int.from_bytes(hashlib.sha256(row_id.encode()).digest()[:4], "big")
    return (start + answer) % 2**32 - 2**31


def sample_rows(
    config: TrainConfig, request: SampleRequest, open_engine: OpenEngine, say: Say
) -> None:
    """Sample and grade answers, and write the right ones as training rows.

    Args:
        config: its rows are asked, and its graders decide.
        say: prints a line for the user; called on the first process only.

    Raises:
        ConfigError, CheckpointError, DataError: as for a run of the config, and see
            `SampleRequest.check`.
    """
    say = only_first(say)
    request.check(config)
    rule, graders = request.rule(config), make_graders(config.eval)
    inputs = read_inputs(with_model(config, request.model), say)
    asked = asked_rows(inputs, request.side, request.limit)
    if asked.left_out:
        say(f"note: {asked.left_out:,} rows are left out: their prompts leave no room for answers")
    options = replace(
        request.options(config),
        stop_ids=inputs.stop_ids,
        max_length=inputs.files.architecture.max_position_embeddings,
    )
    work = _Sampling(inputs, request, asked, options, graders, rule, say)
    with open_engine(inputs) as engine, ExitStack() as held:
        work.run(engine, held)


@dataclass(frozen=True)
class _Sampling:
    """A sampling whose input is read and checked."""

    inputs: RunInputs
    request: SampleRequest
    asked: Asked
    options: GenerateOptions
    graders: Mapping[str, Grader]
    rule: KeepRule
    say: Say

    def run(self, engine: Engine, held: ExitStack) -> None:
        """Answer the rows that are not done, a chunk at a time, then choose.

        Args:
            held: keeps the folder's lock on the first process.
        """
        first, chunk = engine.processes.first_does, self._chunk
        file = SamplesFile(self.request.out, self.request.answers, chunk)
        done = first(lambda: self._open(file, engine, held))
        rows = range(done, len(self.asked.rows), chunk)
        with _Progress(self, done, quiet=engine.processes.index != 0) as progress:
            for start in rows:
                self._answer(engine, file, slice(start, start + chunk), progress)
        first(lambda: self._choose(file))

    @property
    def _chunk(self) -> int:
        """The number of rows that are answered in one call: one batch of prompts."""
        return max(1, self.options.batch_size // self.request.answers)

    def _open(self, file: SamplesFile, engine: Engine, held: ExitStack) -> int:
        make_folder(file.out)
        held.enter_context(run_lock(file.out, "--out", "give another --out"))
        done = file.open(self._settings(engine.name), {**versions(), **engine.facts})
        if done:
            self.say(f"going on in {file.out} after {done:,} of {len(self.asked.rows):,} rows")
        return done

    def _settings(self, engine: str) -> dict[str, Any]:
        """Return what the samples depend on."""
        o, request = self.options, self.request
        return {
            "format_version": FORMAT_VERSION,
            "model": fingerprint_of(self.inputs.files),
            "engine": engine,
            "data": self.inputs.rows.fingerprints(),
            "rows": request.side,
            "number_of_rows": len(self.asked.rows),
            "answers": request.answers,
            "graders": self.inputs.config.eval.graders,
            "temperature": o.temperature,
            "top_k": o.top_k,
            "top_p": o.top_p,
            "max_new_tokens": o.max_new_tokens,
            "stop_ids": list(o.stop_ids),
            "seed": o.seed,
            "batch_size": o.batch_size,
        }

    def _answer(self, engine: Engine, file: SamplesFile, rows: slice, progress: _Progress) -> None:
        """Answer some rows, grade the answers and write them."""
        times = range(self.request.answers)
        prompts = [prompt for prompt in self.asked.prompts[rows] for _ in times]
        numbers = [number_of(p.row_id, n) for p in self.asked.prompts[rows] for n in times]
        options = replace(self.options, numbers=tuple(numbers))
        samples = ask(engine.generator, prompts, options, self.inputs.files.tokenizer.decode)

        def write() -> int:
            grades = grade(samples, self.graders)
            file.append(list(sample_lines(samples, grades)))
            return sum(map(self.rule.is_right, grades))

        progress.add(len(samples), engine.processes.first_does(write))

    def _choose(self, file: SamplesFile) -> None:
        """Write the rows to train on, and tell the user."""
        graded = file.read([row.row_id for row in self.asked.rows])
        settings = read_json(file.out / SETTINGS)
        names = ("model", "engine", "seed", "temperature", "top_k", "top_p", "max_new_tokens")
        provenance = {"model": self.request.model} | {
            "sha256" if name == "model" else name: settings[name] for name in names
        }
        records = [
            json.dumps(record, ensure_ascii=False) + "\n"
            for row, answers in zip(self.asked.rows, graded, strict=True)
            for record in kept_records(row, answers, self.rule, provenance)
        ]
        counts = count_kept(self.rule, graded)
        self.say(counts.describe())
        if not records:
            raise DataError(
                f"No answer is kept, so there is no {ROWS}. The samples are in {file.path}: look "
                "at their grades. Give more --answers, or another model."
            )
        write_text(file.out / ROWS, "".join(records))
        self.say(f"wrote {file.out / ROWS}: {len(records):,} rows")


class _Progress:
    """A bar on a terminal, else a line for each tenth of the answers."""

    def __init__(self, work: _Sampling, done: int, *, quiet: bool) -> None:
        self.total = len(work.asked.rows) * work.request.answers
        self.made = done * work.request.answers
        self.say, self.right, self.counted = work.say, 0, 0
        shown = sys.stderr.isatty() and not quiet
        self.bar = tqdm(
            desc="sampling",
            unit=" answers",
            total=self.total,
            initial=self.made,
            disable=not shown,
            dynamic_ncols=True,
        )
        self.shown = shown

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def add(self, answers: int, right: int) -> None:
        """Count answers, of which so many are right."""
        before = self.made * 10 // self.total
        self.made += answers
        self.counted += answers
        self.right += right
        share = f"{self.right / self.counted:.1%} right"
        self.bar.set_postfix_str(share, refresh=False)
        self.bar.update(answers)
        if not self.shown and self.made * 10 // self.total > before:
            self.say(f"{self.made:,} of {self.total:,} answers, {share}")
