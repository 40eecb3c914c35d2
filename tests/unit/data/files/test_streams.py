"""Decompressed streams, against the libraries that compressed them; damage is an OSError."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable

import pytest
import zstandard

from torchprime.data.files.streams import READ_BYTES, PlainStream, only_os_errors

TEXT = b"".join(b'{"n": %d}\n' % n for n in range(30_000))
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


@pytest.mark.parametrize("compression", COMPRESS)
def test_content_comes_back_in_any_pieces(compression: str) -> None:
    assert len(TEXT) > 2 * READ_BYTES
    # Two members one after the other are one content, as the command line tools have it.
    data = COMPRESS[compression](TEXT[:1000]) + COMPRESS[compression](TEXT[1000:])
    for size in (-1, 7_777, READ_BYTES, READ_BYTES + 1, len(TEXT), 10**15):
        stream = PlainStream(io.BytesIO(data), compression)
        pieces = [stream.read(size)]
        while size > 0 and pieces[-1]:
            pieces.append(stream.read(size))
        assert b"".join(pieces) == TEXT, size
        assert all(len(piece) == size for piece in pieces[:-2]), size


@pytest.mark.parametrize("compression", [c for c in COMPRESS if c])
def test_a_truncated_file_is_an_error(compression: str) -> None:
    data = COMPRESS[compression](TEXT)
    with pytest.raises(OSError):
        PlainStream(io.BytesIO(data[: len(data) // 2]), compression).read()
    with pytest.raises(OSError):
        PlainStream(io.BytesIO(b"not compressed at all" * 9), compression).read()


@pytest.mark.parametrize("compression", COMPRESS)
def test_only_a_plain_file_can_be_sought_in(compression: str) -> None:
    stream = PlainStream(io.BytesIO(COMPRESS[compression](TEXT)), compression)
    assert stream.readable() and stream.seekable() == (compression == "")
    if stream.seekable():
        assert stream.seek(-4, io.SEEK_END) == len(TEXT) - 4 == stream.tell()
        assert stream.read(10**9) == TEXT[-4:]


def test_closing_closes_the_file() -> None:
    handle = io.BytesIO(TEXT)
    stream = PlainStream(handle, "")
    stream.close()
    stream.close()
    assert handle.closed


def test_a_librarys_own_exception_becomes_an_os_error_with_its_name() -> None:
    with pytest.raises(OSError, match="KeyError: 'bucket'"), only_os_errors():
        raise KeyError("bucket")
    with pytest.raises(FileNotFoundError), only_os_errors():
        raise FileNotFoundError("x")
