"""Writer of sharded tensors into one torch.distributed.checkpoint (DCP).

A backend lists its tensors by Hugging Face name with the regions that this process holds. The
regions become DCP's write items. All processes know all items, and a region that several hold is
written by one of them. Each process writes a few files in parallel, tensor after tensor, so that
host memory holds a few tensors' shards and not the model. The main process adds `.metadata`, which
says where each region lies. The result depends on no mesh: any other mesh, either backend and
torch's own tools can read it.

DCP's own file writer is not used: in torch 2.9 it holds every tensor of a file until the file ends.
"""

from __future__ import annotations

import math
import os
import pickle
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint._dedup_save_plans import dedup_save_plans
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from torchprime.checkpoint.run.hashing_file import HashingFile
from torchprime.checkpoint.run.storage import HASHERS, FolderWriter
from torchprime.errors import CheckpointError
from torchprime.files.hashing import FileFacts

METADATA = ".metadata"
DCP_VERSION = "1.0.0"
# One file is written no faster than a core hashes it (1.5 to 2 GB/s), and disks are faster.
MOST_FILES = HASHERS
SMALLEST_FILE = 32 << 20  # bytes; below this, another file costs more than it saves

Place = tuple[int, ...]
Gather = Callable[[Any], list[Any]]
Written = dict[MetadataIndex, _StorageInfo]


@dataclass(frozen=True)
class TensorShards:
    """The regions of one tensor that this process holds.

    Attributes:
        shape: of the whole tensor.
        chunks: (offsets, sizes) of each region held here; regions that other processes or devices
            hold, too, are written once.
        read: gives the chunks' values, in their order. Called once, when the tensor is written, and
            not at all where other processes write all of it.
        live: `read` gives the training's own memory, on its device: what is written later than the
            next update begins has to be copied before.
    """

    name: str
    shape: Place
    dtype: torch.dtype
    chunks: list[tuple[Place, Place]]
    read: Callable[[], list[Tensor]]
    live: bool = False


def write_shards(
    writer: FolderWriter,
    tensors: Sequence[TensorShards],
    *,
    process_index: int = 0,
    process_count: int = 1,
    gather: Gather | None = None,
) -> None:
    """Write the tensors of all processes into one folder; every process has to call this.

    Args:
        gather: gives every process the objects of all, in order; needed for several processes.
            Called twice: before writing, with the plans, and after, with the results.

    Raises:
        CheckpointError: this process could not write, or another one; all processes raise.
    """
    assert gather or process_count == 1, "several processes need a way to exchange their plans"
    exchange: Gather = gather or (lambda mine: [mine])
    plans, metadata = create_default_global_save_plan(
        dedup_save_plans(exchange(SavePlan(_write_items(tensors))))
    )
    _check_complete(metadata)
    written: Written = {}
    failure: Exception | None = None
    try:
        cores = (os.cpu_count() or 1) // process_count
        written = _write_files(
            writer, process_index, plans[process_index].items, tensors, min(cores, MOST_FILES)
        )
    except Exception as error:  # the other processes learn it first: none of them hangs
        failure = error
    mine = (written, writer.files, None if failure is None else str(failure))
    parts: list[tuple[Written, dict[str, FileFacts], str | None]] = exchange(mine)
    if failure is not None:
        raise failure
    for index, (_, files, reason) in enumerate(parts):
        if reason is not None:
            raise CheckpointError(f"Process {index} could not write its part: {reason}")
        writer.adopt(files)
    if process_index == 0:
        metadata.storage_data = {key: value for part, _, _ in parts for key, value in part.items()}
        metadata.storage_meta = StorageMeta()
        metadata.version = DCP_VERSION
        writer.write_bytes(METADATA, pickle.dumps(metadata))


def _write_items(tensors: Sequence[TensorShards]) -> list[WriteItem]:
    """Return this process's plan: one item for each region that is not empty."""
    assert len({tensor.name for tensor in tensors}) == len(tensors), "a tensor is listed twice"
    items: dict[MetadataIndex, WriteItem] = {}
    for tensor in tensors:
        properties = TensorProperties(dtype=tensor.dtype)
        size = torch.Size(tensor.shape)
        for offsets, sizes in tensor.chunks:
            index = MetadataIndex(tensor.name, offsets)
            if index in items or 0 in sizes:
                continue
            chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            data = TensorWriteData(chunk, properties, size)
            items[index] = WriteItem(index, WriteItemType.SHARD, tensor_data=data)
    return list(items.values())


def _check_complete(metadata: Metadata) -> None:
    """Check that the regions fill each tensor; a gap would be our own bug."""
    for name, tensor in metadata.state_dict_metadata.items():
        held = sum(math.prod(chunk.sizes) for chunk in tensor.chunks)  # type: ignore[union-attr]
        whole = math.prod(tensor.size)  # type: ignore[union-attr]
        if held != whole:
            raise ValueError(f"The regions of {name} hold {held} of its {whole} values.")


def _write_files(
    writer: FolderWriter,
    process_index: int,
    items: list[WriteItem],
    tensors: Sequence[TensorShards],
    most: int,
) -> Written:
    """Write the regions assigned to this process; each tensor is read, written and freed.

    A tensor goes to the file that has got the least so far, and is read when that file has written
    the one before: as many tensors are in memory as there are files.
    """
    regions: dict[str, list[WriteItem]] = defaultdict(list)
    for item in items:
        regions[item.index.fqn].append(item)
    mine = [tensor for tensor in tensors if tensor.name in regions]
    sizes = {tensor.name: sum(map(_bytes, regions[tensor.name])) for tensor in mine}
    written: Written = {}
    if not mine:
        return written
    count = max(1, min(most, sum(sizes.values()) // SMALLEST_FILE))
    files = [f"__{process_index}_{number}.distcp" for number in range(count)]
    given = dict.fromkeys(files, 0)
    under_way: dict[str, Future[Written]] = {}
    with ExitStack() as stack, _no_crc32():
        streams = {file: stack.enter_context(writer.stream(file)) for file in files}
        pool = stack.enter_context(ThreadPoolExecutor(count, thread_name_prefix="write"))
        for tensor in mine:
            file = min(files, key=given.__getitem__)
            given[file] += sizes[tensor.name]
            if file in under_way:
                written |= under_way.pop(file).result()
            under_way[file] = pool.submit(
                _write_tensor, streams[file], file, tensor, [*tensor.read()], regions[tensor.name]
            )
        for last in under_way.values():
            written |= last.result()
    return written


def _write_tensor(
    stream: HashingFile,
    file: str,
    tensor: TensorShards,
    read: list[Tensor],
    items: list[WriteItem],
) -> Written:
    """Write some of a tensor's regions into a file and free their values, also for the caller."""
    written: Written = {}
    values = {offsets: value for (offsets, _), value in zip(tensor.chunks, read, strict=True)}
    read.clear()
    for item in items:
        assert item.tensor_data is not None and item.index.offset is not None
        value = values.pop(tuple(item.index.offset))
        start = stream.tell()
        torch.save(_alone(value, item.tensor_data, tensor.name), cast(IO[bytes], stream))
        written[item.index] = _StorageInfo(file, start, stream.tell() - start)
        del value
    return written


def _bytes(item: WriteItem) -> int:
    assert item.tensor_data is not None
    return math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize


@contextmanager
def _no_crc32() -> Iterator[None]:
    """Turn off torch.save's own checksum: it takes a third of the time, and the file has a
    sha256."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _alone(value: Tensor, planned: TensorWriteData, name: str) -> Tensor:
    """Return the tensor with a storage of its own size: torch.save writes the whole storage."""
    assert value.shape == planned.chunk.sizes and value.dtype == planned.properties.dtype, (
        f"{name}: {value.dtype} {tuple(value.shape)} read, {planned} planned"
    )
    value = value.detach().cpu().contiguous()
    if value.untyped_storage().nbytes() != value.numel() * value.element_size():
        value = value.clone()
    return value
