"""`.metadata` says what torch's own reader says of it; bombs cost no more than their bytes."""

from __future__ import annotations

import pickle
import struct
import tracemalloc
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from torchprime.checkpoint.run.dcp_metadata import parse_metadata
from torchprime.checkpoint.run.storage import Storage
from torchprime.errors import CheckpointError


@pytest.fixture
def written(storage: Storage, run_checkpoint: SimpleNamespace) -> bytes:
    tensors = {f"model.{n}": torch.ones(4, 3, dtype=torch.bfloat16) for n in range(20)}
    run_checkpoint.write(storage, "step", {**tensors, "optimizer.step": torch.tensor(3)})
    return storage.read_bytes("step/.metadata")


@pytest.mark.parametrize("protocol", [None, 2, 3, 4, 5])
def test_it_is_what_torchs_reader_finds(written: bytes, protocol: int | None) -> None:
    theirs = pickle.loads(written)
    data = written if protocol is None else pickle.dumps(theirs, protocol)
    ours = parse_metadata(data, "x")
    assert ours == theirs and ours.storage_data == theirs.storage_data
    weight = ours.state_dict_metadata["model.7"]
    assert isinstance(weight, TensorStorageMetadata)
    assert weight.properties.dtype == torch.bfloat16


def test_any_byte_may_be_damaged(written: bytes) -> None:
    """Either it is found, or it says something that may be: never another exception."""
    for place in range(0, len(written), 7):
        for change in (1, 0x80):
            data = bytearray(written)
            data[place] ^= change
            try:
                parse_metadata(bytes(data), "x")
            except CheckpointError as error:
                assert str(error).startswith("x ")


MANY = 1 << 20
BOMBS = {
    "memo": b"\x80\x04]r" + struct.pack("<I", 1 << 26) + b".",
    "bytes": b"\x80\x05\x96" + struct.pack("<Q", 1 << 30) + b".",
    "text": b"\x80\x04X" + struct.pack("<I", 1 << 31) + b"a.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 40) + b".",
    "copies of a tuple": b"\x80\x04(" + b"K\x01" * 5000 + b"t\x940" + b"h\x00\x85" * MANY + b".",
    "sizes of a tuple": b"\x80\x04ctorch\nSize\n\x94(" + b"K\x01" * 5000 + b"t\x94"
    + b"h\x00h\x01\x85R" * 10_000 + b".",
    "states": b"\x80\x04}\x94(" + b"".join(b"M" + struct.pack("<H", n) + b"N" for n in range(9999))
    + b"u" + (b"ctorch.distributed.checkpoint.metadata\nStorageMeta\n)\x81h\x00b" * 1000) + b".",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_is_refused_before_it_goes_off(bomb: str) -> None:
    data = BOMBS[bomb]
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="x is damaged"):
            parse_metadata(data, "x")
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 2_000_000 + 2 * len(data), f"{most:,} bytes for {len(data):,}"
