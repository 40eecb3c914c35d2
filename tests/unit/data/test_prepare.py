"""The whole way from a file to blocks, and the account of every row on it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from torchprime.data import prepare
from torchprime.data.packed import PackedDataset
from torchprime.data.prepare import prepare_dataset
from torchprime.data.report import DataReport
from torchprime.data.sources import SourceSpec
from torchprime.data.tokenizer import Tokenizer, load_tokenizer
from torchprime.errors import DataError

WriteRows = Callable[..., Path]
Run = Callable[..., tuple[PackedDataset, DataReport]]


def qa(question: str, answer: object) -> dict:
    return {"question": question, "answer": answer}


@pytest.fixture
def run(build: SimpleNamespace, make_tokenizer: Callable[..., Tokenizer]) -> Run:
    tokenizer = make_tokenizer(build.byte_level())

    def prepare_file(path: Path, **settings: object) -> tuple[PackedDataset, DataReport]:
        options: dict = {"block_size": 64} | settings
        return prepare_dataset(SourceSpec(file_dataset_path=str(path)), tokenizer, **options)

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
    for part in ("4 rows rejected", "longer than block_size: 2 (rows.jsonl:8, rows.jsonl:10)"):
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
    assert "longer than block_size: 5 (rows.jsonl:1, rows.jsonl:2, rows.jsonl:3, ...)" in message
    assert "raise dataset.block_size or set dataset.truncation=right" in message


def test_truncation_error_and_text_rows_name_the_way_out(run: Run, write_rows: WriteRows) -> None:
    path = write_rows(qa("q", "a"), qa("q", "a" * 99))
    assert "rows.jsonl:2: the row has 122 tokens" in error_of(run, path, truncation="error")
    path = write_rows({"text": "once"})
    assert "Set dataset.compute_loss_on=all" in error_of(run, path)
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
    started = time.process_time()
    packed, report = prepare_dataset(source, tokenizer, block_size=1024)
    seconds = time.process_time() - started
    assert (report.rows, report.examples, report.num_rejected) == (7473, 7473, 0)
    assert packed.efficiency >= 0.99
    # Processor time of all tokenizer threads; on two free cores half of it passes on the clock.
    assert seconds < 10


def test_nothing_here_imports_a_framework() -> None:
    code = (
        "import sys, torchprime.data.prepare, torchprime.data.budget; "
        "print([m for m in ('torch', 'torch_xla', 'jax', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
