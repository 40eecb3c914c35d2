"""Parser of torch.distributed.checkpoint's `.metadata`: a pickle, treated as untrusted input.

Only the operations, classes and forms that the metadata of plain tensors consists of are accepted.
With them a pickle can call nothing, and the result is at most some tens of times as large as
the file. Then every field is checked: types, sizes, file names, and that the regions of a
tensor lie in it, fill it, and are no larger than their place in a file.
"""

from __future__ import annotations

import io
import math
import pickle
import re
from collections.abc import Collection
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from torchprime.checkpoint.field_kinds import told
from torchprime.errors import CheckpointError
from torchprime.files.foreign_names import checked_path

# A region takes about 140 bytes: 1.8 million regions.
MOST_BYTES = 256 << 20
MOST_NAME = 1000  # characters
MOST_DIMS = 16
MOST_TUPLE, MOST_STATE = 32, 16  # entries: what a pickle can copy by a reference of two bytes
# The only operations in DCP's metadata of plain tensors.
ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
}
OPERATIONS = re.findall(
    r"\w+",
    "PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 SHORT_BINUNICODE "
    "BINUNICODE GLOBAL STACK_GLOBAL EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND "
    "APPENDS EMPTY_DICT SETITEM SETITEMS NEWOBJ REDUCE BUILD MEMOIZE BINPUT LONG_BINPUT BINGET "
    "LONG_BINGET",
)

# The Unpickler that is written in Python: each operation is a method that can be left out.
_Loader: Any = pickle._Unpickler  # type: ignore[attr-defined]


class _Unpickler(_Loader):
    """Python's Unpickler with only the operations in OPERATIONS; any other raises a KeyError."""

    dispatch = {
        ord(getattr(pickle, name)): _Loader.dispatch[ord(getattr(pickle, name))]
        for name in OPERATIONS
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return super().find_class(module, name)
        value = getattr(torch, name, None) if module == "torch" else None
        if isinstance(value, torch.dtype):
            return value
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")

    def _check_tuple(self) -> None:
        """Check that tuples are short and hold at most tuples of plain values: hashing one recurses
        in C, as deep as it is nested."""
        made = self.stack[-1]
        inner = [each for each in made if isinstance(each, tuple)]
        if len(made) > MOST_TUPLE or any(not isinstance(x, int | str) for t in inner for x in t):
            raise pickle.UnpicklingError("it holds a tuple of a kind that no checkpoint contains")

    def _load_build(self) -> None:
        state = self.stack[-1]
        if not isinstance(state, dict | tuple) or len(state) > MOST_STATE:
            raise pickle.UnpicklingError("it sets the state of an object, which no checkpoint does")
        _Loader.load_build(self)


def _checked(load: Any) -> Any:
    def load_checked(self: _Unpickler) -> None:
        load(self)
        self._check_tuple()

    return load_checked


for _name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
    _code = ord(getattr(pickle, _name))
    _Unpickler.dispatch[_code] = _checked(_Unpickler.dispatch[_code])
_Unpickler.dispatch[ord(pickle.BUILD)] = _Unpickler._load_build


def parse_metadata(data: bytes, where: str, files: Collection[str] | None = None) -> Metadata:
    """Parse `.metadata`.

    Args:
        where: names the file in messages.
        files: of the checkpoint, as listed in its manifest; None while it is being written.

    Raises:
        CheckpointError: it is damaged, or was never written by a checkpoint's writer.
    """
    try:
        metadata = _Unpickler(io.BytesIO(data)).load()
        _check(metadata, where, files)
    except CheckpointError:
        raise
    except Exception as error:  # damaged pickles raise nearly any exception
        reason = f"operation {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(
            f"{where} is damaged: {reason}. Resume from another checkpoint."
        ) from error
    return metadata


# Checks of the fields -----------------------------------------------------------------------------


def _check(metadata: Any, where: str, files: Collection[str] | None) -> None:
    _require(metadata, Metadata, "it")
    entries = _dict_of(metadata, "state_dict_metadata", str)
    places = _dict_of(metadata, "storage_data", MetadataIndex)
    for index, place in places.items():
        _check_index(index)
        _check_place(place, f"storage_data[{index.fqn!r:.80}]", where, files)
    for name, entry in entries.items():
        _check_entry(name, entry, places)


def _check_index(index: MetadataIndex) -> None:
    _require(index.fqn, str, "a key of storage_data")
    _sizes(index.offset, f"the offset of {index.fqn!r:.80} in storage_data")


def _check_place(place: Any, field: str, where: str, files: Collection[str] | None) -> None:
    _require(place, _StorageInfo, field)
    name = checked_path(place.relative_path, where)
    if files is not None and name not in files:
        raise ValueError(f"{field}.relative_path: {name} is not among the manifest's files")
    for part in ("offset", "length"):
        value = getattr(place, part)
        if type(value) is not int or value < 0:
            raise ValueError(told(f"{field}.{part}", value, "a whole number from 0"))
    if place.transform_descriptors is not None:
        raise ValueError(f"{field}: it was written with transforms, which are not undone here")


def _check_entry(name: str, entry: Any, places: dict[MetadataIndex, Any]) -> None:
    field = f"state_dict_metadata[{name!r:.80}]"
    if not name or len(name) > MOST_NAME:
        raise ValueError(told(field, name, f"a name of 1 to {MOST_NAME} characters"))
    _require(entry, TensorStorageMetadata, field)
    _require(entry.properties, TensorProperties, f"{field}.properties")
    _require(entry.properties.dtype, torch.dtype, f"{field}.properties.dtype")
    _require(entry.chunks, list, f"{field}.chunks")
    whole, filled = _sizes(entry.size, f"{field}.size"), 0
    for number, chunk in enumerate(entry.chunks):
        place = f"{field}.chunks[{number}]"
        _require(chunk, ChunkStorageMetadata, place)
        offsets = _sizes(chunk.offsets, f"{place}.offsets")
        sizes = _sizes(chunk.sizes, f"{place}.sizes")
        ends = [offset + size for offset, size in zip(offsets, sizes, strict=True)]
        if len(ends) != len(whole) or any(e > n for e, n in zip(ends, whole, strict=True)):
            raise ValueError(f"{place} lies outside of the tensor's {list(whole)}")
        filled += math.prod(sizes)
        _check_room(
            chunk, entry.properties.dtype, places.get(MetadataIndex(name, chunk.offsets)), place
        )
    if filled != math.prod(whole):
        raise ValueError(f"{field}.chunks hold {filled} of its {math.prod(whole)} values")


def _check_room(
    chunk: ChunkStorageMetadata, dtype: torch.dtype, place: _StorageInfo | None, field: str
) -> None:
    """Check that no region takes more memory than its file has bytes."""
    if place is None:
        raise ValueError(f"storage_data does not say where {field} lies")
    needed = math.prod(chunk.sizes) * dtype.itemsize
    if needed > place.length:
        raise ValueError(f"{field} needs {needed:,} bytes, and its place has {place.length:,}")


def _dict_of(metadata: Metadata, name: str, key: type) -> dict[Any, Any]:
    found: Any = getattr(metadata, name, None)
    _require(found, dict, name)
    for each in found:
        _require(each, key, f"a key of {name}")
    return found


def _sizes(value: Any, field: str) -> tuple[int, ...]:
    """Return the sizes; torch.Size accepts whole numbers only."""
    _require(value, torch.Size, field)
    if len(value) > MOST_DIMS or any(size < 0 for size in value):
        raise ValueError(told(field, str(list(value)), f"at most {MOST_DIMS} sizes from 0"))
    return value


def _require(value: Any, kind: type, field: str) -> None:
    if type(value) is not kind:
        raise ValueError(told(field, value, kind.__name__))
