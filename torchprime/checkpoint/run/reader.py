"""Reader of a checkpoint's tensors by name, assembled from the regions in which they were written.

`.metadata` says where each region lies (see dcp_metadata), and each region is read with
`weights_only=True`, so a checkpoint can't run code. One tensor is in memory at a time. If only a
region of it is requested, only the overlapping regions are read.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Collection, Sequence
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from torchprime.checkpoint.run.dcp_metadata import MOST_BYTES, parse_metadata
from torchprime.checkpoint.run.manifest import read_manifest
from torchprime.checkpoint.run.shards import METADATA
from torchprime.checkpoint.run.storage import Storage
from torchprime.errors import CheckpointError

MOST_PICKLED = 1 << 16  # bytes by which torch.save describes a tensor; 200 are usual

Reader = TypeVar("Reader", bound="TensorReader")
Region = tuple[Sequence[int], Sequence[int]]  # offsets, sizes


class TensorReader:
    """The tensors in the folder of a checkpoint, finished or being written, one at a time.

    Args:
        files: of the checkpoint, as listed in its manifest; None while it is being written.

    Raises:
        CheckpointError: `.metadata` is missing or damaged.
    """

    def __init__(self, storage: Storage, name: str, files: Collection[str] | None = None) -> None:
        self.storage, self.name = storage, name
        self._metadata = self._read_metadata(files)
        self._files: dict[str, BinaryIO] = {}

    def tensor_names(self) -> list[str]:
        return list(self._metadata.state_dict_metadata)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name).size)

    def dtype(self, name: str) -> torch.dtype:
        return self._entry(name).properties.dtype

    def get(self, name: str, region: Region | None = None) -> Tensor:
        """Return a tensor in host memory, or the region of it with these offsets and sizes.

        Raises:
            CheckpointError: no such tensor, or the file it is in cannot be read.
        """
        entry = self._entry(name)
        dtype = entry.properties.dtype
        offsets, sizes = region or ([0] * len(entry.size), entry.size)
        result: Tensor | None = None
        filled = 0
        for chunk in entry.chunks:
            start, common = _overlap(offsets, sizes, chunk.offsets, chunk.sizes)
            if any(size <= 0 for size in common):
                continue
            value = self._read_chunk(name, chunk, dtype)
            if list(sizes) == list(chunk.sizes) == common:
                return value
            if result is None:
                result = torch.empty(tuple(sizes), dtype=dtype)
            result[_cut(start, offsets, common)] = value[_cut(start, chunk.offsets, common)]
            filled += math.prod(common)
        if result is None or filled != math.prod(sizes):
            raise CheckpointError(
                f"{self.storage.describe(self.name)}: {METADATA} lists {filled} of the "
                f"{math.prod(sizes)} values of {name}. Resume from another checkpoint."
            )
        return result

    def close(self) -> None:
        """Close the open files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self: Reader) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _entry(self, name: str) -> TensorStorageMetadata:
        entry = self._metadata.state_dict_metadata.get(name)
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{self.storage.describe(self.name)} has no tensor {name}.")
        return entry

    def _read_metadata(self, files: Collection[str] | None) -> Metadata:
        path = f"{self.name}/{METADATA}"
        data = self.storage.read_bytes(path, MOST_BYTES)
        return parse_metadata(data, self.storage.describe(path), files)

    def _read_chunk(self, name: str, chunk: ChunkStorageMetadata, dtype: torch.dtype) -> Tensor:
        info = (self._metadata.storage_data or {}).get(MetadataIndex(name, chunk.offsets))
        if info is None:
            raise CheckpointError(
                f"{self.storage.describe(self.name)}: {METADATA} does not say where {name} at "
                f"{list(chunk.offsets)} lies. Resume from another checkpoint."
            )
        path = f"{self.name}/{info.relative_path}"
        if path not in self._files:
            self._files[path] = self.storage.open(path)
        where = (
            f"{self.storage.describe(path)} (bytes {info.offset} to {info.offset + info.length})"
        )
        window: Any = io.BufferedReader(_Window(self._files[path], info.offset, info.length))
        try:
            _check_archive(window, info.length)
            value = torch.load(window, map_location="cpu", weights_only=True)
            if type(value) is not Tensor or not value.is_contiguous():
                raise ValueError(f"it holds a {type(value).__name__} that is no whole tensor")
        except Exception as error:  # damaged archives raise nearly any exception
            raise CheckpointError(
                f"{name} cannot be read from {where}: {error}. Resume from another checkpoint."
            ) from error
        if tuple(value.shape) != tuple(chunk.sizes) or value.dtype != dtype:
            raise CheckpointError(
                f"{name} should have {dtype} {list(chunk.sizes)} in {where}; there is "
                f"{value.dtype} {list(value.shape)}. The files are not of one checkpoint."
            )
        return value


class CheckpointReader(TensorReader):
    """One checkpoint: its manifest, and its tensors one at a time.

    Raises:
        CheckpointError: no manifest, or it or `.metadata` is damaged. That all files are as they
            were written is for `Catalog.check` to say.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self.manifest = read_manifest(storage, name)
        super().__init__(storage, name, self.manifest.files)


def _overlap(
    offsets: Sequence[int], sizes: Sequence[int], others: Sequence[int], other_sizes: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Return the overlap of two regions, its size by dim: none if a size is not positive."""
    start = [max(a, b) for a, b in zip(offsets, others, strict=True)]
    ends = (
        min(a + n, b + m) for a, n, b, m in zip(offsets, sizes, others, other_sizes, strict=True)
    )
    return start, [end - begin for begin, end in zip(start, ends, strict=True)]


def _cut(start: Sequence[int], origin: Sequence[int], sizes: Sequence[int]) -> tuple[slice, ...]:
    """Return the slices for the region at `start` within a tensor that begins at `origin`."""
    begins = (a - b for a, b in zip(start, origin, strict=True))
    return tuple(slice(begin, begin + size) for begin, size in zip(begins, sizes, strict=True))


def _check_archive(file: Any, length: int) -> None:
    """Check, before reading, that no entry of the archive expands when it is read."""
    with zipfile.ZipFile(file) as archive:
        listed = archive.infolist()
    pickled = [entry.file_size for entry in listed if entry.filename.endswith("/data.pkl")]
    if sum(entry.file_size for entry in listed) > length or len(pickled) != 1:
        raise ValueError("its archive is not as torch.save writes one")
    if pickled[0] > MOST_PICKLED:
        raise ValueError(f"its archive describes one tensor by {pickled[0]:,} bytes")
    file.seek(0)


class _Window(io.RawIOBase):
    """A part of a file, as a file object."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length = file, start, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(self._length - self._position, 0)]
        self._file.seek(self._start + self._position)
        count = self._file.readinto(view)  # type: ignore[attr-defined]
        self._position += count
        return count
