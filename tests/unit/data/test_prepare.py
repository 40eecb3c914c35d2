"""The whole way from a file to blocks, and the account of every row on it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import data_settings
import numpy as np
import pytest

from torchprime.data import prepare
from torchprime.data.blocks import chunks
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.data.files.source import SourceSpec
from torchprime.data.prepare import Part, Side, prepare_dataset
from torchprime.data.report import DataReport
from torchprime.data.rows.read import RowReading
from torchprime.data.templates.render import ChatTemplate
from torchprime.data.tokenizer.load import Tokenizer, load_tokenizer
from torchprime.errors import DataError

WriteRows = Callable[..., Path]
Run = Callable[..., tuple[PackedDataset, DataReport]]


PLAIN = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.role }}: {{ m.content }};{% endif %}{% endfor %}"
)


def qa(question: str, answer: object) -> dict:
    return {"question": question, "answer": answer}


@pytest.fixture
def run(build: SimpleNamespace, make_tokenizer: Callable[..., Tokenizer]) -> Run:
    tokenizer = make_tokenizer(build.byte_level())

    def prepare_file(
        *paths: Path,
        keep_in: Path | None = None,
        section: str = "dataset",
        side: Side | None = None,
        workers: int = 1,
        parts: list[Part] | None = None,
        **settings: object,
    ) -> tuple[PackedDataset, DataReport]:
        options: dict = {"block_size": 64} | settings
        sources = [SourceSpec(file_dataset_path=str(path), section=section) for path in paths]
        return prepare_dataset(
            parts or [Part(source) for source in sources],
            tokenizer,
            data_settings.settings(**options),
            side=side,
            keep_in=keep_in,
            workers=workers,
        )

    return prepare_file


def error_of(run: Run, path: Path, **settings: object) -> str:
    with pytest.raises(DataError) as caught:
        run(path, **settings)
    return str(caught.value)


def test_every_row_is_accounted_for(run: Run, write_rows: WriteRows) -> None:
    good = [qa("q", f"answer {n}") for n in range(6)]
    path = write_rows(*good, qa("q", None), qa("q", "x" * 99), qa("q", 7), qa("q", "y" * 50))
    packed, report = run(path, max_rejected_fraction=0.4)
    assert report.rows == 10
    assert report.examples == packed.num_examples == 6
    assert report.rejected == {
        "field answer is null": ["rows.jsonl:7"],
        "longer than block_size": ["rows.jsonl:8", "rows.jsonl:10"],
        "field answer is not a string": ["rows.jsonl:9"],
    }
    assert report.rows == report.examples + report.num_rejected
    longer = "longer than block_size: 2 (rows.jsonl:8, rows.jsonl:10; the first: 122 tokens)"
    for part in ("4 rows rejected", longer):
        assert part in report.summary()


def test_report_agrees_with_the_blocks_and_is_json(run: Run, write_rows: WriteRows) -> None:
    path = write_rows(*[qa("q" * n, "a" * n) for n in range(1, 12)])
    packed, report = run(path)
    batch = packed.batch(np.arange(packed.num_blocks))
    written = json.loads(json.dumps(report.to_dict()))
    assert written["real_tokens"] == batch.real_tokens
    assert written["supervised_tokens"] == batch.supervised_tokens
    assert written["packing_efficiency"] == batch.real_tokens / batch.slot_tokens
    assert written["fingerprint"] == packed.fingerprint()
    prompt = len("Question:\n\n\n\nAnswer:\n")
    assert written["lengths"]["min"] == prompt + 1 + 1 + 1
    assert written["lengths"]["max"] == prompt + 11 + 11 + 1
    assert written["supervised_tokens"] == sum(n + 1 for n in range(1, 12))
    assert (written["format"], written["num_rejected"]) == ("question_answer", 0)
    assert "11 of the first 11 rows have question and answer" in written["format_why"]
    assert written["boundaries"] == {"joint": 11}


def test_truncated_rows_are_listed(run: Run, write_rows: WriteRows) -> None:
    _, report = run(write_rows(qa("q", "a"), qa("q", "a" * 99)), truncation="right")
    assert report.truncated == ["rows.jsonl:2"]
    assert "1 rows truncated (rows.jsonl:2)" in report.summary()


def test_too_many_rejected(run: Run, write_rows: WriteRows) -> None:
    path = write_rows(*[qa("q", "a")] * 18, qa("q", ""), qa("q", None))
    assert run(path, max_rejected_fraction=0.1)[1].num_rejected == 2
    message = error_of(run, path, max_rejected_fraction=0.09)
    assert "2 of 20 rows (10.0%) are rejected" in message
    assert "dataset.max_rejected_fraction allows 9.0%" in message
    assert "field answer is empty: 1 (rows.jsonl:19)" in message
    assert "field answer is null: 1 (rows.jsonl:20)" in message
    assert "\n" not in message


def test_no_example_at_all(run: Run, write_rows: WriteRows) -> None:
    path = write_rows(*[qa("q", "a" * 99)] * 5)
    message = error_of(run, path, max_rejected_fraction=1.0, section="eval")
    assert message.startswith(f"eval ({path}): none of the 5 rows can be used")
    assert (
        "longer than block_size: 5 (rows.jsonl:1, rows.jsonl:2, rows.jsonl:3, ...; the first"
        in message
    )
    assert "raise dataset.block_size or set dataset.truncation=right" in message


def test_advice_is_that_of_the_reasons(run: Run, write_rows: WriteRows) -> None:
    path = write_rows(*[{"messages": [{"role": "narrator", "content": "x"}]}] * 3)
    message = error_of(run, path)
    assert 'for "unknown role": rename the roles' in message
    assert "block_size" not in message
    path = write_rows(*[qa("q", "a")] * 5, *[qa("q", None)] * 2, qa("q", 3))
    message = error_of(run, path)
    assert message.index('for "field answer is null"') < message.index("Or raise dataset.max_")


def test_keys_not_used_and_columns_like_input_are_reported(
    run: Run, write_rows: WriteRows, tmp_path: Path
) -> None:
    rows = [
        qa("q", "a") | {"id": n, "context": f"A long text, different in row {n}, and unused."}
        for n in range(4)
    ]
    path, kept = write_rows(*rows), tmp_path / "kept"
    for cached in (False, True):  # what was found prepared says so, too
        _, report = run(path, keep_in=kept)
        assert report.cached == cached
        assert report.unused_keys["context"] == {
            "count": 4,
            "row_id": "rows.jsonl:1",
            "example": "'A long text, different in row 0, and unused.'",
        }
        assert report.unused_keys["id"]["count"] == 4
        assert report.warnings() == [
            "column context looks like input but is not used, e.g. 'A long text, different in row "
            "0, and unused.': map it (dataset.columns) or put it into the question"
        ]
        assert "keys not used: id: 4 (first rows.jsonl:1, e.g. 0)" in report.summary()
    source = SourceSpec(file_dataset_path=str(path), section="eval")
    parts = [Part(replace(source, name=name)) for name in ("one", "two")]
    _, report = run(parts=parts)
    assert list(report.like_input) == ["context of one", "context of two"]
    assert report.warnings()[0].startswith("eval: column context of one looks like input")
    assert report.unused_keys["id"]["count"] == 8


def test_preference_rows_and_trees_are_prepared(
    build: SimpleNamespace, make_tokenizer: Callable[..., Tokenizer], write_rows: WriteRows
) -> None:
    tokenizer = make_tokenizer(build.byte_level())
    pair = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    part = Part(SourceSpec(str(write_rows(pair, pair))), RowReading("preference"))
    _, report = prepare_dataset([part], tokenizer, data_settings.settings(64))
    assert (report.format, report.supervised_tokens) == ("preference", 2 * 5)
    assert report.noticed == {
        "preference rows: chosen is trained, rejected is not used": {
            "count": 2,
            "row_id": "rows.jsonl:1",
            "example": "",
        }
    }
    answers = [{"text": text, "role": "assistant"} for text in ("ab", "cd")]
    asked = [{"text": "q", "role": "prompter", "replies": [answer]} for answer in answers]
    first = {"text": "f", "role": "assistant", "replies": asked}
    tree = {"message_tree_id": "t", "prompt": {"text": "p", "role": "prompter", "replies": [first]}}
    template = ChatTemplate("plain", PLAIN, eos_token="</s>")
    part = Part(SourceSpec(str(write_rows(tree))))
    settings = data_settings.settings(64)
    packed, report = prepare_dataset([part], tokenizer, settings, template=template)
    assert (report.format, report.rows, report.examples) == ("tree", 2, 2)
    # f</s> once, ab</s> and cd</s>
    assert report.supervised_tokens == 2 + 3 + 3
    ids = [packed.store.row_id(i) for i in range(2)]
    assert ids == ["rows.jsonl:1", "rows.jsonl:1/2"]


def test_truncation_error_and_text_rows_name_the_way_out(run: Run, write_rows: WriteRows) -> None:
    path = write_rows(qa("q", "a"), qa("q", "a" * 99))
    assert "rows.jsonl:2: the row has 122 tokens" in error_of(run, path, truncation="error")
    path = write_rows({"text": "once"})
    message = error_of(run, path, compute_loss_on="completion")
    assert "Set dataset.compute_loss_on=all" in message
    _, report = run(path, compute_loss_on="all")
    assert (report.format, report.supervised_tokens, report.real_tokens) == ("text", 4, 5)


@pytest.mark.parametrize("chunk", [1, 3, 4096])
def test_max_examples_counts_examples_not_rows(
    run: Run, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(prepare, "CHUNK_ROWS", chunk)
    rows = [qa("q", "a"), qa("q", None), qa("q", "b"), qa("q", "c"), qa("q", None), qa("q", "d")]
    _, report = run(write_rows(*rows), max_examples=3, max_rejected_fraction=1.0)
    assert (report.examples, report.rows) == (3, 4)
    assert report.rejected == {"field answer is null": ["rows.jsonl:2"]}


def test_chunks_do_not_change_the_result(
    run: Run, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(*[qa("q" * (n % 7), "a" * (n % 5 + 1)) for n in range(1, 60)])
    settings = {"max_rejected_fraction": 1.0}
    whole = run(path, **settings)[1].fingerprint
    monkeypatch.setattr(prepare, "CHUNK_ROWS", 7)
    assert run(path, **settings)[1].fingerprint == whole


def test_gsm8k(shared_dir: Path) -> None:
    tokenizer = load_tokenizer(shared_dir / "tokenizers/qwen3")
    source = SourceSpec(file_dataset_path=str(shared_dir / "data/gsm8k/train.jsonl"))
    packed, report = prepare_dataset([Part(source)], tokenizer, data_settings.settings(1024))
    assert (report.rows, report.examples, report.num_rejected) == (7473, 7473, 0)
    assert packed.efficiency >= 0.99


# Kept on disk -----------------------------------------------------------------------------------


def same_blocks(one: PackedDataset, other: PackedDataset) -> bool:
    every = np.arange(one.num_blocks)
    return (
        one.num_blocks == other.num_blocks and one.batch(every).hash() == other.batch(every).hash()
    )


def test_the_second_start_reads_what_the_first_kept(
    run: Run, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, kept = (
        write_rows(*[qa("q" * (n % 7), "a" * (n % 9 + 1)) for n in range(99)]),
        tmp_path / "k",
    )
    options: dict = {"keep_in": kept, "max_rejected_fraction": 1.0}
    packed, report = run(path, **options)
    assert not report.cached
    fresh, _ = run(path, max_rejected_fraction=1.0)
    monkeypatch.setattr(chunks, "tokenize_texts", None)  # nothing may be tokenized again
    again, found = run(path, **options)
    assert found.cached and "found prepared" in found.summary()
    assert same_blocks(packed, again) and same_blocks(packed, fresh)
    assert again.fingerprint() == packed.fingerprint() == fresh.fingerprint() == found.fingerprint
    neutral = {"cached": False, "prepare_seconds": 0}
    assert report.to_dict() | neutral == found.to_dict() | neutral


def test_whatever_shapes_the_result_prepares_anew(
    run: Run, write_rows: WriteRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, kept = write_rows(*[qa("q", "a" * (n % 9 + 1)) for n in range(20)]), tmp_path / "kept"

    def cached(**settings: object) -> bool:
        return run(path, keep_in=kept, **settings)[1].cached

    assert not cached()
    changes: list[dict] = [
        {"block_size": 48}, {"packing": "none"}, {"packing": "wrapped"}, {"truncation": "right"},
        {"compute_loss_on": "all"}, {"max_examples": 5}, {"section": "eval"},
        {"side": Side("eval", "odd", lambda row: len(row.completion) % 2 == 1)},
        {"parts": [Part(SourceSpec(file_dataset_path=str(path)), RowReading("question_answer"))]},
    ]  # fmt: skip
    assert not any(cached(**change) for change in changes)
    assert all(cached(**change) for change in [{}, *changes])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], json.dumps(qa("q", "changed"))]))
    assert not cached()
    monkeypatch.setattr(prepare, "DATA_VERSION", prepare.DATA_VERSION + 1)
    assert not cached()


def test_rejected_rows_leave_nothing_behind(
    run: Run, write_rows: WriteRows, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    error_of(run, write_rows(qa("q", None)), keep_in=kept)
    assert list(kept.iterdir()) == []


# Many rows, several sources ---------------------------------------------------------------------


def test_processes_change_nothing(
    run: Run, write_rows: WriteRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [qa("q" * (n % 7), "a" * (n % 90 + 1)) for n in range(900)]
    path, settings = write_rows(*rows), {"max_rejected_fraction": 1.0}
    packed, report = run(path, **settings)
    monkeypatch.setattr(prepare, "CHUNK_ROWS", 50)
    monkeypatch.setattr(prepare, "PARALLEL_AFTER_SECONDS", 0.0)
    with_two, report_two = run(path, workers=2, **settings)
    assert same_blocks(packed, with_two)
    assert report.rejected == report_two.rejected and report.num_rejected > 100
    assert [packed.store.row_id(i) for i in range(len(packed.store))] == [
        with_two.store.row_id(i) for i in range(len(with_two.store))
    ]


def test_a_mixture_with_replay(run: Run, write_rows: WriteRows, tmp_path: Path) -> None:
    own = write_rows(*[qa("own", f"{n}") for n in range(90)])
    general = tmp_path / "general.jsonl"
    general.write_text("".join(json.dumps({"text": f"general {n}"}) + "\n" for n in range(500)))
    parts = [
        Part(SourceSpec(file_dataset_path=str(own), name="own")),
        Part(SourceSpec(file_dataset_path=str(general), name="web"), replay=True),
    ]
    packed, report = run(parts=parts, replay_share=0.1)
    assert report.sources["own"]["used_examples"] == 90
    assert report.sources["web"]["used_examples"] == 10
    assert report.unused == {"web": 490}
    assert "490 examples of web beyond its share are not used" in report.summary()
    assert packed.source_names == ["own", "web"]
    ids = {packed.store.row_id(i) for i in packed.plan.examples}
    assert sum(name.startswith("own/rows.jsonl:") for name in ids) == 90
    assert sum(name.startswith("web/general.jsonl:") for name in ids) == 10
    assert report.format == "question_answer, text"


@pytest.mark.parametrize("packing", ["bfd", "wrapped", "none"])
def test_replay_apart_shares_no_block(
    run: Run, write_rows: WriteRows, tmp_path: Path, packing: str
) -> None:
    """All examples are there, each block is of one kind, and weights hold within a kind."""
    own = write_rows(*[qa("own", f"{n}") for n in range(40)])
    paths = {name: tmp_path / f"{name}.jsonl" for name in ("web", "books")}
    for name, path in paths.items():
        path.write_text("".join(json.dumps({"text": f"{name} {n}"}) + "\n" for n in range(60)))
    parts = [
        Part(SourceSpec(file_dataset_path=str(own), name="own")),
        Part(SourceSpec(file_dataset_path=str(paths["web"]), name="web"), weight=2.0, replay=True),
        Part(
            SourceSpec(file_dataset_path=str(paths["books"]), name="books"), weight=1.0, replay=True
        ),
    ]
    packed, report = run(parts=parts, replay_apart=True, packing=packing)
    used = {name: source["used_examples"] for name, source in report.sources.items()}
    assert used == {"own": 40, "web": 60, "books": 30}
    batch = packed.batch(np.arange(packed.num_blocks))
    assert batch.source_ids is not None
    names = np.array(packed.source_names)
    for block in range(packed.num_blocks):
        found = set(names[batch.source_ids[block][batch.segment_ids[block] > 0]])
        assert names[packed.block_sources[block]] in found
        assert found == {"own"} or found <= {"web", "books"}
    assert packed.num_examples == 130
    # Examples whose tokens follow each other, for no piece may be lost where plans are joined.
    assert packed.real_tokens == sum(packed.store.lengths[np.unique(packed.plan.examples)])


def test_sides_of_a_split_take_what_is_theirs(run: Run, write_rows: WriteRows) -> None:
    path = write_rows(*[qa("q", "a" * (n % 5 + 1)) for n in range(50)])
    odd = Side("eval", "a test", lambda row: len(row.completion) % 2 == 1)
    even = Side("train", "a test", lambda row: len(row.completion) % 2 == 0)
    (_, left), (_, right) = run(path, side=odd), run(path, side=even)
    assert (left.rows, right.rows) == (30, 20)
    assert left.sources[""]["other_side"] == 20
    nobody = Side("eval", "a test", lambda row: False)
    assert "leaves no row for eval (50 rows are on the other side)" in error_of(
        run, path, side=nobody
    )


@pytest.mark.parametrize("packing", ["bfd_split", "wrapped"])
def test_nothing_is_too_long_where_examples_are_cut(
    run: Run, write_rows: WriteRows, packing: str
) -> None:
    path = write_rows(*[qa("q" * n, "a" * 5 * n) for n in range(1, 40)])
    packed, report = run(path, packing=packing)
    assert report.num_rejected == 0 and report.examples == 39
    assert packed.supervised_tokens == sum(5 * n + 1 for n in range(1, 40))


def test_long_texts_are_split(run: Run, write_rows: WriteRows) -> None:
    path = write_rows({"text": "x" * 200}, {"text": "short"})
    packed, report = run(path, truncation="split")
    assert report.num_rejected == 0
    assert packed.supervised_tokens == 200 + 5  # all but the first token of each


def test_a_row_of_a_megabyte(run: Run, write_rows: WriteRows) -> None:
    """It is read, counted and rejected; its neighbours are not touched."""
    path = write_rows(qa("q", "a"), qa("q" * 1_000_000, "a"), qa("q", "b"))
    _, report = run(path, max_rejected_fraction=0.5)
    assert report.rejected == {"longer than block_size": ["rows.jsonl:2"]}
    assert report.examples == 2


def test_messages_need_a_template(run: Run, write_rows: WriteRows) -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    message = error_of(run, write_rows({"messages": turns}))
    assert "rows.jsonl:1: the row is made of messages" in message
    assert "Set dataset.chat_template to a family" in message


def test_nothing_here_imports_a_framework() -> None:
    code = (
        "import sys, torchprime.data.prepare, torchprime.data.blocks.budget; "
        "print([m for m in ('torch', 'torch_xla', 'jax') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


# Averages over examples ---------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["none", "bfd", "bfd_split", "wrapped"])
def test_every_example_counts_as_its_row_however_it_is_packed(
    run: Run, write_rows: WriteRows, packing: str
) -> None:
    """Also one that is cut over several blocks."""
    rows = [qa("q", "a" * n) | {"weight": n % 3 + 0.5} for n in range(1, 40, 3)]
    packed, report = run(
        write_rows(*rows), block_size=48, packing=packing, truncation="right", average="examples"
    )
    batch = packed.batch(np.arange(packed.num_blocks))
    assert batch.weight_sum == pytest.approx(sum(row["weight"] for row in rows), rel=1e-6)
    assert report.average == "examples" and "task.loss.average" in report.summary()
    totals = np.zeros(len(rows))
    for piece, example in enumerate(packed.plan.examples.tolist()):
        totals[example] += packed._targets(piece)[1].sum(dtype=np.float64)
    assert totals == pytest.approx([row["weight"] for row in rows], rel=1e-6)


def test_rows_with_bad_weights_are_counted_and_weight_0_carries_no_loss(
    run: Run, write_rows: WriteRows
) -> None:
    weights = [1, "0.5", -1, math.nan, 0, "much", 2.5]
    path = write_rows(*(qa("q", "a") | {"hard": weight} for weight in weights), qa("q", "a"))
    parts = [Part(SourceSpec(file_dataset_path=str(path)), RowReading(weight_key="hard"))]
    packed, report = run(parts=parts, max_rejected_fraction=0.7)
    assert report.rejected == {
        "weight_key hard is not 0 or a number from 1e-6 to 1e6": [
            f"rows.jsonl:{number}" for number in (3, 4, 6)
        ],
        "no supervised token": ["rows.jsonl:5"],
        "weight_key hard is missing": ["rows.jsonl:8"],
    }
    batch = packed.batch(np.arange(packed.num_blocks))
    assert batch.weight_sum == 2 * (1 + 0.5 + 2.5)
    with pytest.raises(DataError, match="write a weight into every row"):
        run(parts=parts, max_rejected_fraction=0.1)


def test_an_average_over_examples_is_prepared_apart(
    run: Run, write_rows: WriteRows, tmp_path: Path
) -> None:
    path = write_rows(qa("q", "a"), qa("q", "bb"))
    for average, cached in (("tokens", False), ("examples", False), ("tokens", True)):
        assert run(path, keep_in=tmp_path / "kept", average=average)[1].cached is cached
