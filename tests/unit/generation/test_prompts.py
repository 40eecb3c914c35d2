"""Files of prompts: what a line is, and what a file that has none is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchprime.data.files.source import SourceSpec
from torchprime.data.rows.read import load_rows
from torchprime.errors import DataError
from torchprime.generation.prompts import read_prompts


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_bytes(text.encode())
    return folder / name


def test_a_prompt_on_each_line(tmp_path: Path) -> None:
    path = written(tmp_path, "a.txt", '\ufeffWho?\r\n\n  {"prompt": 1}\nwhat\u2028now')
    assert read_prompts(path) == ["Who?", '  {"prompt": 1}', "what\u2028now"]


def test_objects_give_their_prompt_or_question(tmp_path: Path) -> None:
    lines = ['{"prompt": "a\\nb", "x": 1}', "", '{"question": "How many?", "answer": "2"}']
    path = written(tmp_path, "a.JSONL", "\n".join(lines))
    (row,) = load_rows(SourceSpec(file_dataset_path=str(written(tmp_path, "q.jsonl", lines[2]))), 9)
    assert read_prompts(path) == ["a\nb", row.prompt]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.txt", " \n\n", "is empty, expected a prompt on each line"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt"', r"a\.jsonl:2 is not JSON .*expected an object"),
        ("a.jsonl", '{"text": "a", "b": 1}', r"a\.jsonl:1 has no prompt .*with text, b\)"),
        ("a.jsonl", '{"prompt": " "}', r"a\.jsonl:1 has no prompt"),
        ("a.jsonl", "[1]", r"a\.jsonl:1 has no prompt \(it is \[1\]\)"),
    ],
)
def test_what_is_no_prompt(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_prompts(written(tmp_path, name, text))


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        read_prompts(tmp_path / "none")
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path)
    (tmp_path / "latin").write_bytes(b"\xe9")
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        read_prompts(tmp_path / "latin")
