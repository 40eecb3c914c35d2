"""Data preparation from sources to packed blocks, with an account of every row.

Rows are streamed, tokenized in chunks (by several processes if there are many) and written to an
example store. The plan of the blocks is then made from lengths alone, so only the plan is ever in
memory whole. The result is cached under a hash of its inputs, and the next start reads it from
there.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from torchprime.data.advice import advise
from torchprime.data.blocks.chunks import Outcome, Settings, Work, run_in_worker, start_worker
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.data.blocks.mixture import Share, choose, groups_to_pack
from torchprime.data.blocks.pack import Plan, joined, pack
from torchprime.data.blocks.store import ExampleStore, StoreWriter, writing
from torchprime.data.files.open_source import expected_rows, source_fingerprint
from torchprime.data.files.record import UNREADABLE, Rejection
from torchprime.data.files.source import SourceSpec
from torchprime.data.report import (
    DataReport,
    SourceCount,
    SourceReport,
    describe_rejected,
    length_summary,
    new_source_report,
)
from torchprime.data.rows.formats import FormatDecision
from torchprime.data.rows.limits import characters, too_long
from torchprime.data.rows.read import Row, RowReading, open_rows
from torchprime.data.shared import cache
from torchprime.data.shared.notes import RowNotes
from torchprime.data.shared.worker_pool import worker_pool
from torchprime.data.templates.render import ChatTemplate
from torchprime.data.tokenizer.load import Tokenizer
from torchprime.errors import DataError
from torchprime.files.atomic import open_new, write_text

# Part of every cache key: raise it when the same rows would give other examples or blocks.
DATA_VERSION = 4

CHUNK_ROWS = 512
CHUNK_CHARACTERS = 4_000_000  # these end a chunk, too: a tokenizer needs memory for all of them
# Starting processes takes seconds, so shorter work is done without them.
PARALLEL_AFTER_SECONDS = 1.5
# chunks queued for each process, and queued before the first one starts
AHEAD, MOST_PENDING = 2, 32
EXAMPLES_FILE, REPORT_FILE = "examples.arrow", "report.json"
PLAN_FILES = {name: f"plan_{name}.npy" for name in ("examples", "begins", "lengths", "starts")}


@dataclass(frozen=True)
class Part:
    """One source, the settings for reading its records, and its share of a mixture."""

    source: SourceSpec
    reading: RowReading = RowReading()
    weight: float | None = None
    replay: bool = False


class Side(NamedTuple):
    """The rows that belong to this data set if one source is split in two."""

    name: str
    description: str  # of the rule, for the cache key and the report
    has: Callable[[Row], bool]


def prepare_dataset(
    parts: Sequence[Part],
    tokenizer: Tokenizer,
    settings: Settings,
    *,
    template: ChatTemplate | None = None,
    side: Side | None = None,
    keep_in: Path | None = None,
    workers: int = 1,
) -> tuple[PackedDataset, DataReport]:
    """Read, tokenize and pack the data, or load it from the cache.

    Args:
        parts: the sources of rows; several are a mixture.
        template: for rows of messages.
        keep_in: folder of prepared data; None stores nothing.
        workers: processes that tokenize, when there are many rows.

    Raises:
        DataError: unreadable sources, too many rejected rows, no example at all.
    """
    started = time.perf_counter()
    job = _Job(parts, tokenizer, settings, template, side, workers)
    if keep_in is None:
        store, plan, report = job.build(None)
    else:
        ingredients = job.ingredients()
        key = cache.cache_key(ingredients)
        folder = cache.find(keep_in, key)
        cached = folder is not None
        if folder is None:
            folder = cache.build(keep_in, key, ingredients, lambda path: job.write(path))
        store, plan, report = _load(folder)
        report = replace(report, cached=cached)
    report = replace(report, prepare_seconds=time.perf_counter() - started)
    pad = tokenizer.pad_id
    return PackedDataset(store, plan, block_size=settings.block_size, pad_id=pad), report


def _load(folder: Path) -> tuple[ExampleStore, Plan, DataReport]:
    arrays = {name: np.load(folder / file, mmap_mode="r") for name, file in PLAN_FILES.items()}
    report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    return ExampleStore.open(folder / EXAMPLES_FILE), Plan(**arrays), DataReport.from_dict(report)


@dataclass
class _Account:
    """The account of all rows: used, rejected, or left out."""

    sources: dict[str, SourceReport] = field(default_factory=dict)
    rejected: dict[str, list[str]] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    truncated: list[str] = field(default_factory=list)
    boundaries: Counter[str] = field(default_factory=Counter)
    notes: RowNotes = field(default_factory=RowNotes)

    def reject(self, rejection: Rejection) -> None:
        self.rejected.setdefault(rejection.reason, []).append(rejection.row_id)
        self.details.setdefault(rejection.reason, rejection.detail)

    def total(self, name: SourceCount) -> int:
        return sum(source[name] for source in self.sources.values())


@dataclass(frozen=True)
class _Job:
    """One preparation."""

    parts: Sequence[Part]
    tokenizer: Tokenizer
    settings: Settings
    template: ChatTemplate | None
    side: Side | None
    workers: int

    @property
    def section(self) -> str:
        """The config section of the sources, named in messages."""
        return self.parts[0].source.section

    def ingredients(self) -> dict[str, object]:
        """Return everything that shapes the result, as JSON; its hash is the cache key."""
        return {
            "data_version": DATA_VERSION,
            "parts": [
                {
                    "rows": source_fingerprint(part.source),
                    "name": part.source.name,
                    "split": part.source.split,
                    "described": part.source.describe(),  # row ids are made of it
                    "reading": cache.chosen(asdict(part.reading)),
                    "weight": part.weight,
                    "replay": part.replay,
                }
                for part in self.parts
            ],
            "settings": cache.chosen(asdict(self.settings)),
            "tokenizer": self.tokenizer.fingerprint(),
            "template": self.template and self.template.fingerprint(),
            "side": self.side and [self.side.name, self.side.description],
            "section": self.section,
        }

    def write(self, folder: Path) -> None:
        """Build into a folder, in the form that `_load` reads."""
        _, plan, report = self.build(folder / EXAMPLES_FILE)
        for name, array in plan.arrays().items():
            with open_new(folder / PLAN_FILES[name]) as file:
                np.save(file, array)
        write_text(folder / REPORT_FILE, json.dumps(report.to_dict()))

    def build(self, path: Path | None) -> tuple[ExampleStore, Plan, DataReport]:
        """Build examples (in a file, or in memory) and their plan from rows."""
        groups = groups_to_pack(  # report weights that cannot be mixed before anything is read
            [Share(p.source.name, p.weight, p.replay) for p in self.parts],
            self.settings.replay_share,
            self.settings.replay_apart,
        )
        account = _Account()
        decisions: list[FormatDecision] = []
        shown = sys.stderr.isatty()
        counts = [expected_rows(part.source) for part in self.parts if shown]
        bar = tqdm(
            desc=f"preparing {self.section}",
            unit=" rows",
            total=sum(count or 0 for count in counts) if all(counts) else None,
            disable=not shown,
            leave=False,
            delay=1.0,
        )
        with writing(path) as writer, bar:
            for part in self.parts:
                decision, rows = open_rows(part.source, part.reading, account.notes)
                self._check_markers(decision)
                decisions.append(decision)
                self._read_part(part, rows, account, writer, bar)
        self._check(account)
        store = writer.open()
        s = self.settings
        chosen = [None if shares is None else self._choose(store, shares) for shares in groups]
        plan = joined([pack(store.lengths, s.block_size, s.packing, each) for each in chosen])
        return store, plan, self._report(account, decisions, store, plan)

    def _check_markers(self, decision: FormatDecision) -> None:
        markers = self.settings.markers
        if markers is not None and decision.kind != "text":
            raise DataError(
                f"dataset.response_marker={markers.response!r} is for rows of text, but these are "
                f"{decision.kind} ({decision.why}). Set dataset.format=text, or "
                "dataset.response_marker=null"
            )

    def _read_part(
        self,
        part: Part,
        rows: Iterator[Row | Rejection],
        account: _Account,
        writer: StoreWriter,
        bar: tqdm,
    ) -> None:
        new = new_source_report(part.source.describe())
        tally = account.sources.setdefault(part.source.name, new)

        def usable() -> Iterator[tuple[Row, int]]:
            for row in rows:
                bar.update()
                if isinstance(row, Rejection):
                    tally["rows"] += 1
                    account.reject(row)
                elif self.side is not None and not self.side.has(row):
                    tally["other_side"] += 1
                elif row.messages and self.template is None:
                    raise DataError(
                        f"{row.row_id}: the row is made of messages, and the tokenizer in "
                        f"{self.tokenizer.folder} has no chat template. Set dataset.chat_template "
                        "to a family (chatml, llama3, qwen3, ...) or a .jinja file"
                    )
                else:
                    tally["rows"] += 1
                    count = characters(row)
                    if count > self.settings.max_row_characters:
                        account.reject(too_long(row, count))
                        continue
                    tally["chats"] += bool(row.messages)
                    yield row, count

        def missing() -> int:
            limit = self.settings.max_examples
            return CHUNK_ROWS if limit is None else limit - account.total("examples")

        for outcome in self._outcomes(_chunks(usable(), missing)):
            outcome = self._no_more_than(outcome, account)
            tally["examples"] += outcome.count
            account.truncated += outcome.truncated
            account.boundaries.update(outcome.boundaries)
            account.notes.add(outcome.notes)
            for rejection in outcome.rejected:
                account.reject(rejection)
            if outcome.examples is not None:
                writer.write(outcome.examples)

    def _no_more_than(self, outcome: Outcome, account: _Account) -> Outcome:
        """Truncate to max_examples: a row with several answers can exceed it."""
        limit = self.settings.max_examples
        if limit is None or outcome.examples is None:
            return outcome
        room = limit - account.total("examples")
        if outcome.count <= room:
            return outcome
        return replace(outcome, examples=outcome.examples.slice(0, room), count=room)

    def _outcomes(self, chunks: Iterator[list[Row]]) -> Iterator[Outcome]:
        """Yield each chunk's outcome, in order; other processes help if there are many rows."""
        work = Work(self.tokenizer, self.template, self.settings)
        started = time.perf_counter()
        for chunk in chunks:
            yield work.run(chunk)
            # With a limit on examples, the number of rows to read depends on the last outcomes.
            alone = self.workers == 1 or self.settings.max_examples is not None
            if not alone and time.perf_counter() - started >= PARALLEL_AFTER_SECONDS:
                break
        first = next(chunks, None)
        if first is None:
            return
        given = (self.tokenizer.folder, self.template, self.settings)
        # This process is one of the workers.
        with worker_pool(self.workers - 1, "tokenizing rows", start_worker, given) as pool:
            yield from self._shared_out(chain([first], chunks), work, pool)

    def _shared_out(
        self, chunks: Iterator[list[Row]], work: Work, pool: ProcessPoolExecutor
    ) -> Iterator[Outcome]:
        """Yield the pool's outcomes; this process does a chunk itself when all workers are busy."""
        pending: deque[Future[Outcome] | Outcome] = deque()
        for chunk in chunks:
            open_futures = sum(isinstance(p, Future) and not p.done() for p in pending)
            given_away = open_futures < AHEAD * (self.workers - 1)
            pending.append(pool.submit(run_in_worker, chunk) if given_away else work.run(chunk))
            too_many = len(pending) > MOST_PENDING * self.workers
            while pending and (too_many or not isinstance(pending[0], Future) or pending[0].done()):
                yield _result(pending.popleft())
                too_many = False
        yield from map(_result, pending)

    def _check(self, account: _Account) -> None:
        """Raise an error with counts if too many rows are rejected or no example is left."""
        rows, rejected = account.total("rows"), sum(map(len, account.rejected.values()))
        # With turns=branch every answer of a row is one example.
        tries = max(rows, account.total("examples") + rejected)
        allowed = self.settings.max_rejected_fraction
        where = f"{self.section} ({', '.join(p.source.describe() for p in self.parts)})"
        by_count = sorted(account.rejected, key=lambda reason: -len(account.rejected[reason]))
        advice = f"Advice {advise(by_count)}"
        reasons = describe_rejected(account.rejected, account.details)
        unreadable = {r: ids for r, ids in account.rejected.items() if r in UNREADABLE}
        count = sum(map(len, unreadable.values()))
        if count > self.settings.max_unreadable_rows:
            raise DataError(
                f"{where}: {count:,} of {rows:,} rows cannot be read, "
                f"dataset.max_unreadable_rows allows {self.settings.max_unreadable_rows:,}: "
                f"{describe_rejected(unreadable, account.details)}. Correct the file, which may be "
                "damaged or cut off; or raise dataset.max_unreadable_rows if losing them is meant"
            )
        if not rows and self.side is not None:
            raise DataError(
                f"{where}: the split leaves no row for {self.side.name} "
                f"({account.total('other_side'):,} rows are on the other side). Change "
                "dataset.eval_fraction"
            )
        if not account.total("examples"):
            raise DataError(f"{where}: none of the {rows:,} rows can be used: {reasons}. {advice}")
        if rejected / tries > allowed:
            raise DataError(
                f"{where}: {rejected:,} of {tries:,} {'rows' if tries == rows else 'answers'} "
                f"({rejected / tries:.1%}) are rejected, "
                f"dataset.max_rejected_fraction allows {allowed:.1%}: {reasons}. {advice}. Or "
                "raise dataset.max_rejected_fraction if losing them is meant"
            )

    def _choose(self, store: ExampleStore, shares: Mapping[str, float]) -> np.ndarray:
        by_tokens = self.settings.mixture_by == "tokens"
        sizes = store.lengths if by_tokens else np.ones(len(store), dtype=np.int64)
        return choose(sizes, store.sources, store.source_names, shares, self.settings.seed)

    def _report(
        self,
        account: _Account,
        decisions: Sequence[FormatDecision],
        store: ExampleStore,
        plan: Plan,
    ) -> DataReport:
        s = self.settings
        packed = PackedDataset(store, plan, block_size=s.block_size, pad_id=self.tokenizer.pad_id)
        used = np.unique(plan.examples)
        notes = account.notes.to_dict()
        for place, name in enumerate(store.source_names):
            mine = used[store.sources[used] == place]
            account.sources[name]["used_examples"] = len(mine)
            account.sources[name]["used_tokens"] = int(store.lengths[mine].sum())
        return DataReport(
            section=self.section,
            source=", ".join(part.source.describe() for part in self.parts),
            format=", ".join(dict.fromkeys(decision.kind for decision in decisions)),
            format_why="; ".join(dict.fromkeys(decision.why for decision in decisions)),
            template=None if self.template is None else self.template.name,
            compute_loss_on=s.compute_loss_on,
            average=s.average,
            packing=s.packing,
            truncation=s.truncation,
            block_size=s.block_size,
            split=None if self.side is None else f"{self.side.name} of {self.side.description}",
            rows=account.total("rows"),
            examples=len(used),
            sources=account.sources,
            rejected=account.rejected,
            rejected_details=account.details,
            truncated=account.truncated,
            boundaries=dict(account.boundaries),
            like_input=_like_input(self.parts, decisions),
            unused_keys=notes["unused_keys"],
            noticed=notes["noticed"],
            real_tokens=packed.real_tokens,
            supervised_tokens=packed.supervised_tokens,
            lengths=length_summary(store.lengths[used]),
            num_blocks=packed.num_blocks,
            packing_efficiency=packed.efficiency,
            fingerprint=packed.fingerprint(),
            tokenizer_fingerprint=self.tokenizer.fingerprint(),
            template_fingerprint=None if self.template is None else self.template.fingerprint(),
        )


def _like_input(parts: Sequence[Part], decisions: Sequence[FormatDecision]) -> dict[str, str]:
    """Return unused columns that look like input, with examples and the mixture part's name."""
    found = {}
    for part, decision in zip(parts, decisions, strict=True):
        of = f" of {part.source.name}" if part.source.name else ""
        found |= {f"{column}{of}": decision.unused[column] for column in decision.like_input}
    return found


def _result(pending: Future[Outcome] | Outcome) -> Outcome:
    return pending.result() if isinstance(pending, Future) else pending


def _chunks(rows: Iterator[tuple[Row, int]], missing: Callable[[], int]) -> Iterator[list[Row]]:
    """Yield chunks until the rows end or there are enough examples; read no more rows than needed.

    Args:
        rows: each with its number of characters, which also limits a chunk.
    """
    while True:
        chunk, size = [], 0
        for row, count in islice(rows, max(0, min(CHUNK_ROWS, missing()))):
            chunk.append(row)
            size += count
            if size >= CHUNK_CHARACTERS:
                break
        if not chunk:
            return
        yield chunk
