"""tokenizer.json read with the tokenizers library, its faults as one line.

The library is written in Rust. For most faults in a file it raises a bare `Exception`; for others
it panics: that is an exception which `except Exception` does not catch, and pages of the library's
own stack on the terminal.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import tokenizers

from torchprime.errors import CheckpointError, UserError
from torchprime.json_files import LARGE, read_regular

STDERR = 2
LONGEST_REASON = 300  # characters; a reason may quote the file


def load_tokenizer_json(path: Path) -> tuple[tokenizers.Tokenizer, bytes]:
    """Return the tokenizer in a file, without truncation and padding, and the file's bytes.

    Raises:
        CheckpointError: the file cannot be read, or the library cannot load it.
    """
    data = read_regular(path, most=LARGE)
    with library_faults(f"{path} is not a tokenizer that can be loaded"):
        raw = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        # A file may carry the settings of somebody's last call; cut or padded texts and random
        # merges are not part of what the tokenizer is.
        raw.no_truncation()
        raw.no_padding()
        if getattr(raw.model, "dropout", None):
            raw.model.dropout = None
    return raw, data


@contextmanager
def library_faults(what: str) -> Iterator[None]:
    """Turn whatever the library raises into a CheckpointError that begins with `what`.

    What it prints meanwhile is shown afterwards, unless it panicked.
    """
    with _stderr_held() as held:
        try:
            yield
        except UserError:
            raise
        except BaseException as error:
            if _is_panic(error):
                held.truncate(0)
            elif not isinstance(error, Exception):  # Ctrl-C
                raise
            raise _fault(what, error) from None


@contextmanager
def encoding_faults(what: str) -> Iterator[None]:
    """Turn what the library raises while it works on texts into a CheckpointError.

    As `library_faults`, but the terminal is left alone: other threads write to it meanwhile.
    """
    try:
        yield
    except BaseException as error:
        if _is_panic(error) or type(error) is Exception:
            raise _fault(what, error) from None
        raise


def _fault(what: str, error: BaseException) -> CheckpointError:
    reason = " ".join(str(error).split())[:LONGEST_REASON]
    return CheckpointError(f"{what}: {reason or type(error).__name__}")


def _is_panic(error: BaseException) -> bool:
    """Return True for a panic in Rust. Its class cannot be imported."""
    return type(error).__name__ == "PanicException"


@contextmanager
def _stderr_held() -> Iterator[IO[bytes]]:
    """Collect in a file what this process writes to file descriptor 2, and hand it on at the end.

    Rust writes there directly, past `sys.stderr`.
    """
    with tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        kept = os.dup(STDERR)
        os.dup2(held.fileno(), STDERR)
        try:
            yield held
        finally:
            sys.stderr.flush()
            os.dup2(kept, STDERR)
            os.close(kept)
            held.seek(0)
            if text := held.read():
                os.write(STDERR, text)
