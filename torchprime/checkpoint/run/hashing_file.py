"""A file of a checkpoint that is hashed while it is written.

The hash is computed in a thread, so that the bytes are read once and the manifest can name their
sha256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from typing import BinaryIO

from torchprime.errors import CheckpointError
from torchprime.files.hashing import FileFacts

PIECE = 32 << 20  # bytes written while they are hashed; for URLs, also the buffer size
INLINE = 1 << 20  # below this, passing bytes to another thread takes longer than hashing them


class HashingFile:
    """A file being written, with its size and hash; `torch.save` can write to it.

    Args:
        telling: converts errors into messages that name the file.
        push: starts writing the data so far to the disk, called every PIECE bytes.
    """

    def __init__(
        self,
        file: BinaryIO,
        hasher: Executor,
        telling: Callable[[], AbstractContextManager[None]],
        push: Callable[[BinaryIO], None],
    ) -> None:
        self._file, self._hasher, self._telling, self._push = file, hasher, telling, push
        self._digest = hashlib.sha256()
        self._small = bytearray()  # an archive's headers come in dozens of writes
        self._bytes = self._unpushed = 0
        self.failure: CheckpointError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write all data; large pieces are hashed by another thread meanwhile."""
        view = memoryview(data).cast("B")
        self._bytes += len(view)
        if len(view) < INLINE:
            self._small += view
            if len(self._small) >= INLINE:
                self.hand_on()
            return len(view)
        self.hand_on()
        for start in range(0, len(view), PIECE):
            self._write_piece(view[start : start + PIECE])
        return len(view)

    def _write_piece(self, piece: memoryview) -> None:
        hashed = self._hasher.submit(self._digest.update, piece)
        try:
            self._put(piece)
        finally:
            hashed.result()  # the caller may free its memory after this call

    def _put(self, piece: memoryview) -> None:
        try:
            with self._telling():
                self._file.write(piece)
                self._unpushed += len(piece)
                if self._unpushed >= PIECE:
                    self._push(self._file)
                    self._unpushed = 0
        except CheckpointError as error:
            self.failure = error
            raise

    def tell(self) -> int:
        return self._bytes

    def hand_on(self) -> None:
        """Write the gathered small pieces."""
        if self._small:
            small, self._small = memoryview(self._small), bytearray()
            self._digest.update(small)
            self._put(small)

    def flush(self) -> None:
        """Do nothing: the data is written at the end; torch.save calls this."""

    def facts(self) -> FileFacts:
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}
