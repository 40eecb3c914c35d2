"""tokenizer.json read with the tokenizers library; each fault becomes one line.

The library is written in Rust. For most faults in a file it raises a bare `Exception`. For others
it panics: `except Exception` does not catch that, and the library prints pages of its own stack to
the terminal.
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
from torchprime.files.json_files import LARGE, read_regular

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
        # A file may contain the settings of an earlier call; truncation, padding and random merges
        # are not part of the tokenizer.
        raw.no_truncation()
        raw.no_padding()
        if getattr(raw.model, "dropout", None):
            raw.model.dropout = None
    return raw, data


@contextmanager
def library_faults(what: str) -> Iterator[None]:
    """Turn any exception of the library into a CheckpointError that begins with `what`.

    Output of the library is shown afterwards, unless it panicked.
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
    """Turn exceptions of the library while it encodes texts into a CheckpointError.

    Unlike `library_faults` it does not capture stderr: other threads write to it meanwhile.
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
    """Return True for a panic in Rust, whose class cannot be imported."""
    return type(error).__name__ == "PanicException"


@contextmanager
def _stderr_held() -> Iterator[IO[bytes]]:
    """Capture this process's output to file descriptor 2 in a file, and write it out at the end.

    Rust writes there directly, not through `sys.stderr`.
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
