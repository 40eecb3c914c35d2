"""Data sets from the config's data sections: training rows, held-out rows, and the leak check.

Sources and reading come from the config, the rest from torchprime.data: rows are split, prepared
(or found prepared), and compared. Later code gets no config objects.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

from torchprime.checkpoint.hf.source import hub_name
from torchprime.config.schema import TrainConfig
from torchprime.config.sections.dataset import DatasetConfig, Format, MixturePart
from torchprime.config.sections.evaluation import EvalConfig, EvalSource
from torchprime.config.sections.loss import Average, LossConfig
from torchprime.data.blocks.chunks import Settings
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.data.files.source import SourceSpec
from torchprime.data.leaks.find import find_leaks
from torchprime.data.leaks.report import LeakReport
from torchprime.data.leaks.shingles import TextRow
from torchprime.data.prepare import DATA_VERSION, Part, Side, prepare_dataset
from torchprime.data.report import DataReport
from torchprime.data.rows.read import Row, RowReading, open_rows
from torchprime.data.rows.split import SplitRule, content_text, plan_split
from torchprime.data.shared import cache
from torchprime.data.templates.choose import resolve_template
from torchprime.data.templates.render import ChatTemplate, render
from torchprime.data.tokenizer.load import Tokenizer
from torchprime.data.tokens.branches import WHOLE, row_of
from torchprime.data.tokens.marked_text import Markers
from torchprime.errors import DataError, RuntimeSetupError
from torchprime.files import private_folders
from torchprime.files.atomic import make_folder, write_text

MOST_WORKERS = 8
LEAKS_FILE = "leaks.json"


class RunReports(TypedDict):
    """The content of data_report.json: the reports of training rows, held-out rows and the leak
    check."""

    dataset: dict[str, object]
    eval: NotRequired[dict[str, object]]
    leaks: NotRequired[dict[str, object]]


@dataclass(frozen=True)
class RunData:
    """All data of a run."""

    sources: RunRows
    train: PackedDataset
    report: DataReport
    heldout: PackedDataset | None
    heldout_report: DataReport | None
    leaks: LeakReport | None

    def rejected(self, side: Literal["train", "eval"]) -> set[str]:
        """Return the ids of rows of which the preparation rejected all or one answer."""
        report = self.report if side == "train" else self.heldout_report
        found = [] if report is None else report.rejected.values()
        apart = self.sources.dataset.turns != WHOLE
        return {row_of(i) if apart else i for ids in found for i in ids}

    def reports(self) -> RunReports:
        """Return the content of data_report.json."""
        found: RunReports = {"dataset": self.report.to_dict()}
        if self.heldout_report is not None:
            found["eval"] = self.heldout_report.to_dict()
        if self.leaks is not None:
            found["leaks"] = self.leaks.to_dict()
        return found

    def fingerprints(self) -> dict[str, str | None]:
        """Return the fingerprints of the run's data, for run.json: equal fingerprints, equal
        batches."""
        return {
            "data": self.report.fingerprint,
            "eval": self.heldout_report and self.heldout_report.fingerprint,
            "tokenizer": self.report.tokenizer_fingerprint,
            "template": self.report.template_fingerprint,
            "data_version": str(DATA_VERSION),
        }


@dataclass(frozen=True)
class RunRows:
    """The sources of a config's rows, before they are tokenized."""

    dataset: DatasetConfig
    eval: EvalConfig
    seed: int

    @classmethod
    def of(cls, config: TrainConfig) -> RunRows:
        return cls(config.dataset, config.eval, config.seed)

    @cached_property
    def train_parts(self) -> list[Part]:
        d = self.dataset
        if not d.mixture:
            return [Part(_source("dataset", d, d.cache_dir), self._reading(d.format, d.columns))]
        return [
            Part(
                replace(_source("dataset", part, d.cache_dir), name=part.name),
                self._reading(part.format, part.columns),
                part.weight,
                part.replay,
            )
            for part in d.mixture
        ]

    def hub_names(self) -> list[str]:
        """Return the hub's names of the training rows' datasets."""
        names = (hub_name(part.source.hf_dataset_name) for part in self.train_parts)
        return list(dict.fromkeys(name for name in names if name is not None))

    @cached_property
    def heldout_parts(self) -> list[Part]:
        """The eval section's sources, read like the training rows; with a split, the same rows.

        `dataset.weight_key` is for training: held-out loss can be compared between weights.
        """
        d = self.dataset
        if not self.eval.enabled:
            split = self.train_parts if d.eval_fraction is not None else []
            parts = [replace(p, source=replace(p.source, section="eval")) for p in split]
        elif self.eval.sources:
            parts = [
                Part(
                    replace(_source("eval", each, d.cache_dir), name=each.name),
                    self._reading(each.format, each.columns),
                )
                for each in self.eval.sources
            ]
        else:
            source = _source("eval", self.eval, d.cache_dir)
            parts = [Part(source, self._reading(d.format, d.columns))]
        return [replace(p, reading=replace(p.reading, weight_key=None)) for p in parts]

    def _reading(self, format: Format, columns: dict[str, str]) -> RowReading:
        d = self.dataset
        return RowReading(
            format=format,
            columns=columns or None,
            group_key=d.group_key,
            time_key=d.time_key,
            id_key=d.id_key,
            as_messages=d.as_messages,
            answer_form=d.answer_form,
            weight_key=d.weight_key,
        )

    @cached_property
    def _rule(self) -> SplitRule:
        """The rule of the split. It reads all rows once, only if a split is new."""
        assert self.dataset.eval_fraction is not None
        rows = (row for part in self.train_parts for row in _rows_of(part))
        by_time = self.dataset.time_key is not None
        return plan_split(rows, self.dataset.eval_fraction, self.seed, by_time)

    def side(self, name: str) -> Side | None:
        """Return `train` or `eval` of a split; None without a split."""
        d = self.dataset
        if d.eval_fraction is None:
            return None
        key = d.group_key or "row"
        way = f"the latest by {d.time_key}, " if d.time_key else ""
        described = f"a split ({way}dataset.eval_fraction={d.eval_fraction}, {key}, {self.seed})"
        return Side(name, described, lambda row: self._rule.side_of(row, content_text(row)) == name)

    def rows(self, name: str) -> Iterator[Row]:
        """Yield the usable rows of one side, `train` or `eval`, in the sources' order."""
        parts = self.train_parts if name == "train" else self.heldout_parts
        return self._rows(parts, self.side(name))

    def asked(self) -> Iterator[Row]:
        """Yield the usable held-out rows whose prompts may be answered, in the sources' order."""
        silent = {source.name for source in self.eval.sources if not source.generate}
        parts = [part for part in self.heldout_parts if part.source.name not in silent]
        return self._rows(parts, self.side("eval"))

    @staticmethod
    def _rows(parts: Sequence[Part], side: Side | None) -> Iterator[Row]:
        for part in parts:
            for row in _rows_of(part):
                if side is None or side.has(row):
                    yield row

    def first_heldout(self, count: int) -> list[Row]:
        """Return the first held-out rows, to show answers to the user."""
        return list(islice(self.asked(), count))


class Question(NamedTuple):
    """A held-out row as a prompt."""

    text: str
    ids: list[int]  # the messages for a model server
    answer: str


def question_of(row: Row, tokenizer: Tokenizer, template: ChatTemplate | None) -> Question:
    """Return the prompt of a row, or its messages up to the last answer, in training's form."""
    if not row.messages:
        return Question(row.prompt, tokenizer.prompt_ids(row.prompt), row.completion)
    assert template is not None
    last = max(i for i, message in enumerate(row.messages) if message.role == "assistant")
    asked = [message.template for message in row.messages[:last]]
    text = render(template, asked, row.tools, add_generation_prompt=True)
    ids = tokenizer.encode_ids([text])[0]
    return Question(row.messages[last - 1].content, ids, row.messages[last].content)


def template_of(
    dataset: DatasetConfig, tokenizer: Tokenizer, date: str | None = None
) -> ChatTemplate | None:
    """Return the chat template that a dataset section asks for, or the tokenizer's own.

    Args:
        date: for templates that write one; dataset.template_date goes before it, today after it.

    Raises:
        DataError: there is no such template, or it does not read an option.
    """
    return resolve_template(
        dataset.chat_template,
        tokenizer,
        options=dataset.template_options,
        date=dataset.template_date or date,
    )


def prepare_run_data(
    config: TrainConfig,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    say: Callable[[str], None],
) -> RunData:
    """Prepare, report and compare all rows of a run.

    Raises:
        DataError: rows that can't be used, or a leak with dataset.leak_check=error.
    """
    d = config.dataset
    rows = RunRows.of(config)
    kept_in = _kept_in(d.prepared_dir, say)
    settings = settings_of(d, config.seed, config.task.loss.average)
    workers = d.num_proc or min(MOST_WORKERS, os.cpu_count() or 1)

    def prepared(
        parts: Sequence[Part], limit: int | None, side: str
    ) -> tuple[PackedDataset, DataReport]:
        data, report = prepare_dataset(
            parts,
            tokenizer,
            replace(settings, max_examples=limit),
            template=template,
            side=rows.side(side),
            keep_in=kept_in,
            workers=workers,
        )
        say(report.summary())
        for warning in report.warnings():
            say(f"note: {warning}")
        return data, report

    train, report = prepared(rows.train_parts, d.max_train_examples, "train")
    if template is not None and report.has_chats:
        for warning in template.warnings:
            say(f"note: {warning}")
    if not config.holds_out:
        return RunData(rows, train, report, None, None, None)
    # All held-out rows are used, whatever their mixture.
    parts = [replace(part, weight=None, replay=False) for part in rows.heldout_parts]
    # Their loss is per token, so that it can be compared between runs.
    settings = replace(settings, replay_share=None, replay_apart=False, average="tokens")
    heldout, heldout_report = prepared(parts, config.eval.max_examples, "eval")
    _require_sources(config.eval, heldout)
    if set(heldout_report.format.split(", ")) - set(report.format.split(", ")):
        say(
            f"note: held-out rows are read as {heldout_report.format}, training rows as "
            f"{report.format}. If that is not meant, set dataset.format or correct the rows"
        )
    leaks = None
    if d.leak_check != "off":
        key = [report.fingerprint, heldout_report.fingerprint, d.leak_threshold, DATA_VERSION]
        leaks = _check_leaks(rows, d.leak_threshold, d.leak_check, key, workers, kept_in, say)
    return RunData(rows, train, report, heldout, heldout_report, leaks)


def _require_sources(eval: EvalConfig, heldout: PackedDataset) -> None:
    """Check that each of several held-out sources has a loss.

    Raises:
        DataError: a source has no usable row.
    """
    for place, source in enumerate(eval.sources):
        if source.name not in heldout.source_names:
            raise DataError(
                f"eval.sources[{place}]: {source.name} has no usable row, expected one or more, "
                "since its loss is a metric. Correct its rows, or remove the source"
            )


def _source(
    section: str,
    given: DatasetConfig | EvalConfig | EvalSource | MixturePart,
    cache_dir: str | None,
) -> SourceSpec:
    return SourceSpec(
        file_dataset_path=given.file_dataset_path,
        hf_dataset_name=given.hf_dataset_name,
        hf_dataset_config_name=given.hf_dataset_config_name,
        split=given.split,
        cache_dir=cache_dir,
        section=section,
    )


def settings_of(
    dataset: DatasetConfig, seed: int, average: Average = LossConfig.average
) -> Settings:
    """Return the settings that make examples of the rows of a dataset section."""
    d = dataset
    return Settings(
        block_size=d.block_size,
        compute_loss_on=d.compute_loss_on,
        packing=d.packing,
        truncation=d.truncation,
        max_examples=None,  # of training rows and of held-out rows differ
        max_rejected_fraction=d.max_rejected_fraction,
        max_unreadable_rows=d.max_unreadable_rows,
        max_row_characters=d.max_row_characters,
        replay_share=d.replay_share,
        mixture_by=d.mixture_by,
        turns=d.turns,
        reasoning=d.reasoning,
        special_tokens_in_text=d.special_tokens_in_text,
        markers=_markers(d),
        seed=seed if d.mixture else 0,
        average=average,
        replay_apart=d.replay_schedule.enabled,
    )


def _markers(dataset: DatasetConfig) -> Markers | None:
    if dataset.response_marker is None:
        return None
    return Markers(dataset.response_marker, dataset.instruction_marker)


def _rows_of(part: Part) -> Iterator[Row]:
    _, rows = open_rows(part.source, part.reading)
    return (row for row in rows if isinstance(row, Row))


def _kept_in(given: str | None, say: Callable[[str], None]) -> Path | None:
    """Return the folder of prepared data, created if needed; None, with a message, if it can't
    be."""
    folder = Path(given) if given is not None else cache.default_folder()
    try:
        make_folder(folder)
        usable = os.access(folder, os.W_OK)
    except OSError:
        usable = False
    if usable and (fault := private_folders.fault_of(folder)) is not None:
        if given is not None:
            raise RuntimeSetupError(f"{cache.KEY}: {fault}")
        say(f"note: prepared data is not kept: {fault}")
        return None
    if usable:
        return folder
    if given is not None:
        raise DataError(
            f"dataset.prepared_dir={given} is not a folder that can be written. Choose another, or "
            "null for the user's cache folder"
        )
    say(f"note: {folder} can't be written, so prepared data is not kept (dataset.prepared_dir).")
    return None


@dataclass(frozen=True)
class _Texts:
    """The rows of one side as texts, iterable several times."""

    rows: RunRows
    side: str

    def __iter__(self) -> Iterator[TextRow]:
        return ((row.row_id, content_text(row), row.group) for row in self.rows.rows(self.side))


def _check_leaks(
    rows: RunRows,
    threshold: float,
    mode: str,
    key: Sequence[Any],
    workers: int,
    kept_in: Path | None,
    say: Callable[[str], None],
) -> LeakReport:
    """Compare both sides, or return the stored result for the same rows."""

    def find() -> LeakReport:
        sides = (_Texts(rows, "train"), _Texts(rows, "eval"))
        return find_leaks(*sides, threshold=threshold, workers=workers)

    def write(folder: Path) -> None:
        write_text(folder / LEAKS_FILE, json.dumps(find().to_dict()))

    if kept_in is None:
        found = find()
    else:
        ingredients = {"leaks": list(key)}
        name = cache.cache_key(ingredients)
        folder = cache.find(kept_in, name) or cache.build(kept_in, name, ingredients, write)
        found = LeakReport.from_dict(json.loads((folder / LEAKS_FILE).read_text(encoding="utf-8")))
    message = f"leak check: {found.summary()}"
    if found.leaks and mode == "error":
        shown = "; ".join(
            f"{p.train_id} and {p.eval_id} ({p.similarity:.2f})" for p in found.pairs[:5]
        )
        raise DataError(
            f"{message}. The first: {shown or ', '.join(found.shared_groups[:5])}. Remove them "
            "from the training rows, set dataset.group_key so that a split keeps them together, or "
            "set dataset.leak_check=warn"
        )
    say(message + (" (all in data_report.json)" if found.leaks else ""))
    return found
