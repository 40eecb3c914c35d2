"""Writer of safetensors shards that holds one tensor in host memory.

Names, shapes and dtype are known before the weights arrive, so every shard's layout is planned and
its header is written first (8 bytes of length, a JSON header, then the bytes). Each tensor is then
written to its place in its file, in whatever order the weights arrive, and hashed at once.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

from torchprime.checkpoint.hf.read import DTYPES, INDEX, SINGLE, SafetensorsReader
from torchprime.errors import CheckpointError
from torchprime.files.atomic import open_new, write_text
from torchprime.files.hashing import THREADS

CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Shard:
    """A safetensors file: its name and each tensor's begin and end in the data section."""

    file: str
    places: dict[str, tuple[int, int]]

    @property
    def data_bytes(self) -> int:
        return max((end for _, end in self.places.values()), default=0)


@dataclass(frozen=True)
class WeightLayout:
    """The weights of an export and their split into files.

    Attributes:
        spec: name -> shape of every weight, in the order wanted in the files. Tied: no lm_head.
        dtype: of the exported weights.
        max_shard_bytes: the limit above which files are split.
        file: the name of the only file, if they are not split.
        kept: the types of those tensors that are copied unchanged from another file.
    """

    spec: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    max_shard_bytes: int
    file: str = SINGLE
    kept: Mapping[str, torch.dtype] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.max_shard_bytes <= 0:
            raise CheckpointError(
                f"A shard's size limit must be above 0 bytes, not {self.max_shard_bytes}; set "
                "task.max_shard_size_gb to e.g. 5.0."
            )

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.spec.values())

    @property
    def num_bytes(self) -> int:
        return sum(self.bytes_of(name) for name in self.spec)

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the type of a tensor in the files."""
        return self.kept.get(name, self.dtype)

    def bytes_of(self, name: str) -> int:
        """Return the size of a tensor in the files."""
        return math.prod(self.spec[name]) * self.dtype_of(name).itemsize

    def shards(self) -> list[Shard]:
        """Assign tensors to files in the order of `spec` up to the size limit; a larger tensor gets
        its own file."""
        groups: list[dict[str, tuple[int, int]]] = [{}]
        used = 0
        for name in self.spec:
            size = self.bytes_of(name)
            if groups[-1] and used + size > self.max_shard_bytes:
                groups.append({})
                used = 0
            groups[-1][name] = (used, used + size)
            used += size
        if len(groups) == 1:
            return [Shard(self.file, groups[0])]
        total = len(groups)
        return [
            Shard(f"model-{number:05d}-of-{total:05d}.safetensors", places)
            for number, places in enumerate(groups, start=1)
        ]


def index_json(shards: list[Shard]) -> dict[str, object]:
    """Return the index of several shards; transformers requires its metadata."""
    return {
        "metadata": {"total_size": sum(shard.data_bytes for shard in shards)},
        "weight_map": {name: shard.file for shard in shards for name in shard.places},
    }


def tensor_hash(tensor: torch.Tensor) -> str:
    """Return the sha256 of a tensor's dtype, shape and bytes: equal exactly for equal tensors."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
    digest.update(_raw_bytes(tensor))
    return digest.hexdigest()


def weight_hashes(reader: SafetensorsReader) -> dict[str, str]:
    """Return the hash of every tensor in a folder by name, after reading all of them once."""
    names = list(reader.names())
    with ThreadPoolExecutor(THREADS) as pool:  # hashing leaves the other threads running
        hashes = pool.map(lambda name: tensor_hash(reader.get(name)), names)
        return dict(zip(names, hashes, strict=True))


def hash_of_all(hashes: Mapping[str, str]) -> str:
    """Return one sha256 of all tensors' hashes by name, in any order."""
    lines = "".join(f"{name} {hashes[name]}\n" for name in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def is_finite(tensor: torch.Tensor) -> bool:
    """Return True if no value is NaN or infinite. Minimum and maximum suffice (they propagate NaN),
    need no copy of the tensor and are several times faster than torch.isfinite."""
    if not tensor.numel():
        return True
    low, high = tensor.detach().aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())


def _raw_bytes(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class ShardWriter:
    """Writer that takes tensors one at a time and puts each at its planned place."""

    def __init__(self, folder: Path, layout: WeightLayout) -> None:
        self.shards = layout.shards()
        self.hashes: dict[str, str] = {}
        self._spec = {name: tuple(shape) for name, shape in layout.spec.items()}
        self._layout = layout
        self._places = {
            name: (shard.file, begin)
            for shard in self.shards
            for name, (begin, _) in shard.places.items()
        }
        self._data_start: dict[str, int] = {}
        self._files = {}
        self._stack = ExitStack()
        for shard in self.shards:
            header = self._header(shard)
            file = self._stack.enter_context(open_new(folder / shard.file))
            file.write(header)
            file.truncate(len(header) + shard.data_bytes)
            self._data_start[shard.file] = len(header)
            self._files[shard.file] = file
        if len(self.shards) > 1:
            text = json.dumps(index_json(self.shards), indent=2) + "\n"
            write_text(folder / INDEX, text)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *failure: object) -> None:
        self._stack.close()

    def _header(self, shard: Shard) -> bytes:
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for name, place in shard.places.items():
            shape = list(self._spec[name])
            code = CODES[self._layout.dtype_of(name)]
            entries[name] = {"dtype": code, "shape": shape, "data_offsets": list(place)}
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data section starts aligned
        return len(text).to_bytes(8, "little") + text

    def write_next(self, weights: Iterator[tuple[str, torch.Tensor]]) -> bool:
        """Take one tensor from the iterator and write it; return False if there is none.

        The tensor is freed at the end of this call, before the source makes the next one.
        """
        item = next(weights, None)
        if item is None:
            return False
        name, tensor = item
        self._check(name, tensor)
        tensor = tensor.detach().to("cpu", self._layout.dtype_of(name)).contiguous()
        if name not in self._layout.kept and not is_finite(tensor):
            raise CheckpointError(
                f"The weight {name} holds NaN or infinite values; nothing was exported. Use a "
                "checkpoint from before the loss diverged, or a lower learning rate."
            )
        file, begin = self._places[name]
        self._files[file].seek(self._data_start[file] + begin)
        self._files[file].write(_raw_bytes(tensor))
        self.hashes[name] = tensor_hash(tensor)
        return True

    def finish(self) -> None:
        """Raise an error if a planned tensor was not written."""
        missing = [name for name in self._places if name not in self.hashes]
        if missing:
            raise CheckpointError(
                f"{len(missing)} of {len(self._places)} weights never came, so nothing was exported"
                ": " + ", ".join(missing)
            )

    def _check(self, name: str, tensor: torch.Tensor) -> None:
        if name not in self._places:
            raise CheckpointError(f"The weight {name} is not part of the model that is exported.")
        if name in self.hashes:
            raise CheckpointError(f"The weight {name} came twice.")
        if tuple(tensor.shape) != self._spec[name]:
            raise CheckpointError(
                f"The weight {name} has shape {list(tensor.shape)}; "
                f"{list(self._spec[name])} was announced."
            )
