"""Reader of a Hugging Face checkpoint: first the headers, then one tensor at a time by mmap.

The names and shapes in the files' headers are compared with the model's before any weight is read.
Then each tensor is fetched by name, as a view of the mapped file. The caller slices it, sends it to
its device and frees it: host memory holds one tensor, not the checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from torchprime.checkpoint.hf.weight_names import (
    EMBEDDING,
    HEAD,
    foreign,
    inner_names,
    public_names,
)
from torchprime.errors import CheckpointError
from torchprime.files.foreign_names import checked_name
from torchprime.files.json_files import LARGE, read_json, read_json_if_there
from torchprime.models.families import is_wrapper

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Older checkpoints have this buffer; every reader computes it from the config.
HARMLESS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

Shape = tuple[int, ...]


class SafetensorsReader:
    """The tensors of a checkpoint folder, by their names in a causal language model.

    Args:
        stored_names: by their names in the files instead; of a wrapper then all parts.
    """

    def __init__(self, folder: Path | str, *, stored_names: bool = False) -> None:
        self.folder = Path(folder)
        self._handles: dict[str, safe_open] = {}
        self._listing: dict[str, tuple[Shape, torch.dtype]] = {}
        self._places: dict[str, tuple[str, str]] = {}  # name -> file, name in that file
        located = _locate(self.folder)
        config = read_json_if_there(self.folder / "config.json") or {}
        names_of = inner_names if is_wrapper(config) else public_names
        stored = [name for _, name in located]
        public_of = {name: name for name in stored} if stored_names else names_of(stored)
        self.left_out = len(located) - len(public_of)  # weights of a wrapper's other parts
        for file, name in located:
            if name not in public_of:
                continue
            public = public_of[name]
            if public in self._places:
                raise CheckpointError(
                    f"{self.folder}: {name} is in both {self._places[public][0]} and {file}; "
                    "shards of different checkpoints are mixed. Fetch the checkpoint again."
                )
            self._places[public] = (file, name)
            view = self._open(file).get_slice(name)
            kind = view.get_dtype()
            if kind not in DTYPES:
                raise CheckpointError(f"{self.folder / file}: {name} has the unknown type {kind}.")
            self._listing[public] = (tuple(view.get_shape()), DTYPES[kind])

    def names(self) -> dict[str, tuple[Shape, torch.dtype]]:
        """Return every tensor's shape and dtype, read from the headers only."""
        return dict(self._listing)

    def share_head(self) -> None:
        """Use a stored output head as the embedding too, as a tied model does."""
        if HEAD in self._places and EMBEDDING not in self._places:
            self._places[EMBEDDING] = self._places.pop(HEAD)
            self._listing[EMBEDDING] = self._listing.pop(HEAD)

    def leave_out(self, names: Iterable[str]) -> None:
        """Forget some tensors."""
        for name in names:
            del self._listing[name], self._places[name]

    def get(self, name: str) -> torch.Tensor:
        """Return one tensor, a view of the mapped file: copy it before writing to it."""
        if name not in self._places:
            raise CheckpointError(f"{self.folder} has no tensor {name}.")
        file, stored = self._places[name]
        return self._open(file).get_tensor(stored)

    def weights(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the named tensors one after the other."""
        for name in names:
            yield name, self.get(name)

    def _open(self, file: str) -> safe_open:
        if file not in self._handles:
            self._handles[file] = open_checked(self.folder / file)
        return self._handles[file]


def open_checked(path: Path) -> safe_open:
    """Open a safetensors file; raise a CheckpointError if it is not whole."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise CheckpointError(
            f"{path} ({size} bytes) is not a whole safetensors file: {error}. The download or copy "
            "was cut short, or it is a git-lfs pointer; fetch this file again."
        ) from error


def _locate(folder: Path) -> list[tuple[str, str]]:
    """Return (file, name in it) of every tensor.

    The index decides where there is one: a first shard named model.safetensors beside it is a
    shard, not the checkpoint.
    """
    if (folder / INDEX).is_file():
        return _locate_by_index(folder)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if SINGLE in files:
        files = [SINGLE]
    if len(files) != 1:
        raise CheckpointError(
            f"{folder} holds {len(files)} *.safetensors files and no {INDEX}"
            + (f" ({', '.join(files[:4])}): fetch the index, too." if files else ".")
        )
    return [(files[0], name) for name in open_checked(folder / files[0]).keys()]  # noqa: SIM118


def _locate_by_index(folder: Path) -> list[tuple[str, str]]:
    path = folder / INDEX
    try:
        weight_map = read_json(path, most=LARGE)["weight_map"]
        items = [(str(file), str(name)) for name, file in weight_map.items()]
    except (KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is not an index with a weight_map: {error}.") from error
    files = sorted({file for file, _ in items})
    for file in files:
        checked_name(file, str(path))
    absent = [file for file in files if not (folder / file).is_file()]
    if absent:
        raise CheckpointError(
            f"{path} names {len(files)} files, of which {len(absent)} are missing: "
            f"{', '.join(absent)}. Fetch them again."
        )
    if SINGLE not in files and (folder / SINGLE).is_file():
        raise CheckpointError(
            f"{folder} holds two checkpoints: {SINGLE} and the shards of {INDEX} (an export over "
            "an older one?). Readers disagree on which counts: remove the one that is not meant."
        )
    there = {file: set(open_checked(folder / file).keys()) for file in files}
    wrong = [f"{name} ({file})" for file, name in items if name not in there[file]]
    listed = {name for _, name in items}
    stray = [f"{name} ({file})" for file in files for name in sorted(there[file] - listed)]
    if wrong or stray:
        raise CheckpointError(
            f"{path} and its files disagree; fetch all of them again."
            + _lines("In the index, not in the file", wrong)
            + _lines("In a file, not in the index", stray)
        )
    return items


def check_names(expected: Mapping[str, Shape], found: SafetensorsReader, *, tied: bool) -> None:
    """Compare a checkpoint's names and shapes with the model's, before any weight is used.

    Tolerated: the rotary buffer of older checkpoints, and the output head of a tied model where it
    equals the embedding, or where it is stored instead of it. A different head would be loaded
    untied by transformers 5: refused.

    Raises:
        CheckpointError: with every missing name, unexpected name and differing shape; or what the
            files are if not the weights of a plain model.
    """
    if tied:
        found.share_head()
    listing = found.names()
    kind = foreign({name: dtype for name, (_, dtype) in listing.items()}, expected)
    if kind is not None:
        raise CheckpointError(f"The files in {found.folder} {kind}")
    missing = [name for name in expected if name not in listing]
    extra = [name for name in listing if name not in expected and not HARMLESS.search(name)]
    if tied and HEAD in extra and EMBEDDING in listing:
        extra.remove(HEAD)
        if not _same_bytes(found.get(HEAD), found.get(EMBEDDING)):
            raise CheckpointError(
                f"{found.folder}: config.json ties the embeddings (tie_word_embeddings), but the "
                f"file's {HEAD} differs from {EMBEDDING}; transformers 5 would load it untied. Set "
                f"tie_word_embeddings to false, or remove {HEAD} from the file."
            )
    shapes = [
        f"{name}: {list(listing[name][0])} in the file, {list(shape)} in the model"
        for name, shape in expected.items()
        if name in listing and listing[name][0] != tuple(shape)
    ]
    if missing or extra or shapes:
        raise CheckpointError(
            f"The weights in {found.folder} do not fit the model of its config.json; use the "
            "config.json and files of one checkpoint."
            + _lines("Missing from the files", missing)
            + _lines("Not known to the model", extra)
            + _lines("Different shape", shapes)
        )


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _lines(title: str, items: list[str]) -> str:
    return f"\n{title} ({len(items)}):\n  " + "\n  ".join(items) if items else ""
