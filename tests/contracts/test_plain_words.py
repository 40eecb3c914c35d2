"""Docstrings begin with an imperative or a noun phrase, never with an indirect question."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from source_tree import REPO

RIDDLES = {"What", "Which", "Whether", "How", "Where", "Who", "Why", "When"}
FOLDERS = ("torchprime", "tests", "benchmarks", "docs", "experimental")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def scripts() -> list[Path]:
    """Return every Python file of the repository's folders, tests included."""
    found = [path for folder in FOLDERS for path in (REPO / folder).rglob("*.py")]
    assert {path.relative_to(REPO).parts[0] for path in found} == set(FOLDERS)
    return sorted(found)


def riddles(text: str) -> list[str]:
    """Return "line: first line" of each docstring that begins with a question word."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, DOCUMENTED):
            continue
        docstring = ast.get_docstring(node) or ""
        # "What's" begins with "What", "Wherever" with a word of its own.
        first_word = re.match(r"\W*([A-Za-z]*)", docstring)
        if first_word and first_word[1] in RIDDLES:
            found.append(f"{node.body[0].lineno}: {docstring.splitlines()[0]}")
    return found


def test_no_docstring_begins_with_a_question_word() -> None:
    found = [
        f"{path.relative_to(REPO)}:{riddle}"
        for path in scripts()
        for riddle in riddles(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "is_found"),
    [
        ('"""What a reader knows."""', True),
        ('class A:\n    """Which one is kept."""', True),
        ('def f():\n    """Whether it is equal."""', True),
        ('class A:\n    async def f(self):\n        """\n        How many.\n        """', True),
        ('def f():\n    """What\'s kept."""', True),
        ('"""A reader of files."""', False),
        ('def f():\n    """Return True when it is equal, and where."""', False),
        ('def f():\n    """Wherever it lies, read the file."""', False),
        ('WORDS = """What is no docstring."""', False),
        ('def f():\n    """123"""', False),
        ("def f():\n    pass", False),
    ],
)
def test_a_riddle_is_found(text: str, is_found: bool) -> None:
    assert bool(riddles(text)) == is_found
