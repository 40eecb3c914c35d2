"""User prompts for a model: from a file, or typed.

A file has a prompt on each line. A .jsonl file has an object on each line: `prompt` is used
unchanged, `question` is put into the wording used in training. This module has few imports, for
environments with little more than a model server.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchprime.data.rows.formats import QUESTION_PROMPT
from torchprime.errors import DataError
from torchprime.files.atomic import read_regular_text

OBJECT_ENDINGS = (".jsonl", ".ndjson")


def as_question(text: str) -> str:
    """Return a question in the wording of training rows of question and answer."""
    return QUESTION_PROMPT.format(question=text)


def require_unicode(text: str, where: str) -> str:
    """Return the text if a tokenizer can encode it.

    Raises:
        DataError: it holds a byte that is no UTF-8, or half of a character.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = ord(text[error.start])
        # Python represents such bytes as surrogates.
        byte = 0xDC80 <= found <= 0xDCFF
        what = f"the byte 0x{found - 0xDC00:02x}" if byte else f"U+{found:04X}, half of a character"
        raise DataError(
            f"{where} is no Unicode text: character {error.start + 1:,} is {what}. Write it in "
            "UTF-8"
        ) from None
    return text


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file, in order, without blank lines.

    Raises:
        DataError: no such file, nothing in it, or a line that has no prompt.
    """
    try:
        text = read_regular_text(path).removeprefix("\ufeff")
    except FileNotFoundError:
        raise DataError(f"--prompts: there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts: {path} cannot be read as UTF-8 text: {error}") from error
    lines = re.split("\r\n|\r|\n", text)  # U+2028 ends no line
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"--prompts: {path} is empty, expected a prompt on each line")
    if path.suffix.lower() not in OBJECT_ENDINGS:
        return [line for _, line in numbered]
    return [_prompt_of(line, f"{path}:{number}") for number, line in numbered]


def _prompt_of(line: str, where: str) -> str:
    wanted = 'expected an object such as {"prompt": "..."} or {"question": "..."}'
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise DataError(f"--prompts: {where} is not JSON ({error}), {wanted}") from error
    if isinstance(row, Mapping):
        for field, form in (("prompt", str), ("question", as_question)):
            if isinstance(row.get(field), str) and row[field].strip():
                return form(require_unicode(row[field], f"--prompts: {where}"))
    found = f"an object with {', '.join(row)}" if isinstance(row, Mapping) and row else line[:60]
    raise DataError(f"--prompts: {where} has no prompt (it is {found}), {wanted}")
