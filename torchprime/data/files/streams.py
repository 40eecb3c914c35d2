"""Decompressed byte streams of local and remote files."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import zstandard

READ_BYTES = 64 * 2**10  # read from a file at a time
UTF8_BOM = b"\xef\xbb\xbf"


@contextmanager
def only_os_errors() -> Iterator[None]:
    """Turn any exception of a remote store or a decompressor into an OSError with its name."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class PlainStream(io.RawIOBase):
    """The decompressed bytes of a file; a fault of any kind is an OSError."""

    def __init__(self, handle: IO[bytes], compression: str) -> None:
        self._handle = handle
        self._plain: Any = _decompressed(handle, compression)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._plain is self._handle and bool(self._handle.seekable())

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._handle.seek(offset, whence)

    def tell(self) -> int:
        return self._handle.tell()

    def read(self, size: int = -1) -> bytes:
        """Read `size` bytes, or all there are; less is returned only at the end.

        The size may come from a damaged file: no memory is taken before the bytes are there.
        """
        if size < 0 or (size <= READ_BYTES and self.seekable()):
            return super().read(size)
        if self.seekable():
            here = self.tell()
            size = min(size, max(self.seek(0, io.SEEK_END) - here, 0))
            self.seek(here)
            return super().read(size)
        pieces = []
        while size and (piece := super().read(min(size, READ_BYTES))):
            pieces.append(piece)
            size -= len(piece)
        return b"".join(pieces)

    def readinto(self, buffer: Any) -> int:
        with only_os_errors():
            data = self._plain.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._handle.close()


def _decompressed(handle: IO[bytes], compression: str) -> Any:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=handle)
    if compression == ".bz2":
        return bz2.BZ2File(handle)
    if compression == ".xz":
        return lzma.LZMAFile(handle)
    return _Zstandard(handle) if compression == ".zst" else handle


class _Zstandard:
    """All frames of a zstd file. The library's own reader accepts a truncated file."""

    # One byte may expand to thousands: small inputs keep the outputs small.
    PIECE = 16 * 2**10

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle = handle
        self._frame: Any = None
        self._ahead = b""  # compressed, of the next frame
        self._plain = memoryview(b"")

    def read(self, size: int) -> memoryview:
        while not self._plain:
            piece = self._ahead or self._handle.read(self.PIECE)
            self._ahead = b""
            if not piece:
                if self._frame is not None:
                    raise EOFError("the zstd file ends in the middle of a frame")
                break
            frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._plain = memoryview(frame.decompress(piece))
            self._ahead = frame.unused_data
            self._frame = None if frame.eof else frame
        taken, self._plain = self._plain[:size], self._plain[size:]
        return taken
