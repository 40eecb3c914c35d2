"""Checkpoints whose manifest, `.metadata` or shards were made to do harm: all hashes fit."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import torch
from attack import Attack, Ground
from resigned import MANIFEST, METADATA, change_manifest, change_metadata, replace_file
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

Change = Callable[[dict[str, Any]], object]


def manifest(change: Change) -> Callable[[Ground], None]:
    return lambda ground: change_manifest(ground.checkpoint(), change)


def metadata(change: Callable[[Any], object]) -> Callable[[Ground], None]:
    return lambda ground: change_metadata(ground.checkpoint(), change)


def pickled(data: bytes) -> Callable[[Ground], None]:
    """`.metadata` that is this pickle."""
    return lambda ground: replace_file(ground.checkpoint(), METADATA, data)


def setting(path: str, value: Any) -> Change:
    """Set a field, by names with dots."""

    def change(content: dict[str, Any]) -> None:
        *above, last = path.split(".")
        for name in above:
            content = content[name]
        content[last] = value

    return change


def export(ground: Ground) -> tuple[int, str]:
    return ground.torchprime("export", ground.checkpoint(), "--out", "out")


def not_exported(ground: Ground) -> None:
    assert not (ground.here / "out").exists()
    assert not [path for path in ground.here.rglob("pwned")]


class Evil:
    """An object whose pickle calls a program when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch pwned",)


GLOBAL_SIZE = b"ctorch\nSize\n"
HUGE = struct.pack("<I", 1 << 26)
# The comment after each says what the library's own reader would do with it.
PICKLES: dict[str, tuple[bytes, str]] = {
    "calls a program": (pickle.dumps(Evil()), "which no checkpoint needs"),
    "calls eval": (b"c__builtin__\neval\n(S'1'\ntR.", "which no checkpoint needs"),
    "memo of millions": (b"\x80\x04]r" + HUGE + b".", "it: given list"),  # 1 GB for 64 million
    "bytes that are announced": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".", "operation"),
    "long number": (b"\x80\x04\x8b" + struct.pack("<i", 1 << 28) + b".", "operation"),
    "tuple as deep as the file": (b"\x80\x04)" + b"\x85" * 200_000 + b".", "it holds a tuple"),
    "deep key": (b"\x80\x04})" + b"\x85" * 99_999 + b"Ns.", "it holds a tuple"),  # crashes
    "copies of a tuple": (
        b"\x80\x04(" + b"K\x01" * 100_000 + b"t\x94" + GLOBAL_SIZE + b"h\x00\x85R.",
        "it holds a tuple",
    ),
    "object by its id": (b"\x80\x04Pname\n.", "operation"),
    "copyreg's extension": (b"\x80\x04\x82\x01.", "operation"),
    "nothing": (b"", "is damaged"),
    "another object": (pickle.dumps({"a": 1}), "it: given dict, expected Metadata"),
}


def set_of(metadata_: Any, name: str, value: Any) -> None:
    """A field of the first tensor, of its first region or of that region's place."""
    entry = next(iter(metadata_.state_dict_metadata.values()))
    where = {
        "size": entry,
        "chunks": entry,
        "properties": entry,
        "offsets": entry.chunks[0],
        "sizes": entry.chunks[0],
    }.get(name, next(iter(metadata_.storage_data.values())))
    setattr(where, name, value)


FIELDS: dict[str, tuple[str, Any, str]] = {
    "size that is a list": ("size", [1, 2], r"\.size: given list, expected Size"),
    "size beyond the file": (
        "size",
        torch.Size([1 << 40, 8]),
        "hold .* of its 8796093022208 values",
    ),
    "regions that are none": ("chunks", {}, r"\.chunks: given dict, expected list"),
    "properties that are none": ("properties", None, r"\.properties: given None, expected Tensor"),
    "offset below 0": ("offset", -1, r"\.offset: given -1, expected a whole number from 0"),
    "offset that is text": ("offset", "0", r"\.offset: given '0', expected a whole number"),
    "length that is a fraction": ("length", 0.5, "damaged: operation"),
    "length of nothing": ("length", 0, "needs .* bytes, and its place has 0"),
    "absolute place": ("relative_path", "/etc/passwd", "names a file '/etc/passwd', and it leads"),
    "place that is no text": ("relative_path", 7, "names a file '7', and it is int, not text"),
    "place the manifest lacks": ("relative_path", "more", "more is not among the manifest's files"),
    "transforms": ("transform_descriptors", ["zstd"], "written with transforms"),
}


def region_outside(metadata_: Any) -> None:
    entry = next(iter(metadata_.state_dict_metadata.values()))
    chunk = entry.chunks[0]
    moved = torch.Size(tuple(offset + 1 for offset in chunk.offsets))
    entry.chunks[0] = ChunkStorageMetadata(moved, chunk.sizes)


def key_that_is_none(metadata_: Any) -> None:
    metadata_.storage_data["model.x"] = next(iter(metadata_.storage_data.values()))


def no_place(metadata_: Any) -> None:
    name = next(iter(metadata_.state_dict_metadata))
    entry = metadata_.state_dict_metadata[name]
    del metadata_.storage_data[MetadataIndex(name, entry.chunks[0].offsets)]


def archive(make: Callable[[int], bytes]) -> Callable[[Ground], None]:
    """Put other bytes in the place of a tensor's archive."""

    def lay(ground: Ground) -> None:
        checkpoint = ground.checkpoint()
        places = pickle.loads((checkpoint / METADATA).read_bytes()).storage_data
        place = next(info for index, info in places.items() if index.fqn.startswith("model."))
        shard = checkpoint / place.relative_path
        data = make(place.length)
        where = shard.stat().st_size
        replace_file(checkpoint, place.relative_path, shard.read_bytes() + data)

        def change(metadata_: Any) -> None:
            for info in metadata_.storage_data.values():
                if info.offset == place.offset and info.relative_path == place.relative_path:
                    info.offset, info.length = where, len(data)

        change_metadata(checkpoint, change)

    return lay


def bomb(length: int) -> bytes:
    """A hundred thousand zeros for every byte."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", pickle.dumps(0))
        file.writestr("archive/data/0", bytes(64 << 20))
    return made.getvalue()


def legacy(length: int) -> bytes:
    """Not an archive, but pickles one after the other, as torch once wrote them."""
    made = io.BytesIO()
    torch.save(torch.ones(2), made, _use_new_zipfile_serialization=False)
    return made.getvalue().ljust(length, b"\0")


def evil_archive(length: int) -> bytes:
    made = io.BytesIO()
    torch.save([Evil(), torch.zeros(length)], made)
    return made.getvalue()


def other_object(length: int) -> bytes:
    made = io.BytesIO()
    torch.save([torch.zeros(length)], made)
    return made.getvalue()


def rename_step(ground: Ground) -> None:
    """The first checkpoint takes the name of a later one, to be gone on from."""
    folder = ground.checkpoint().parent
    (folder / "step_00000001").rename(folder / "step_00000009")


def to_pipe(name: str) -> Callable[[Ground], None]:
    def lay(ground: Ground) -> None:
        path = ground.checkpoint() / name
        path.unlink()
        os.mkfifo(path)

    return lay


def pointer(text: bytes) -> Callable[[Ground], None]:
    def lay(ground: Ground) -> None:
        (ground.checkpoint().parent / "latest").write_bytes(text)

    return lay


def export_latest(ground: Ground) -> tuple[int, str]:
    return ground.torchprime("export", "outputs/run/checkpoints/latest", "--out", "out")


def torn(ground: Ground) -> None:
    path = ground.checkpoint() / MANIFEST
    content = json.loads(path.read_text())
    content["config"]["seed"] = 7
    path.write_text(json.dumps(content))


MANIFESTS: dict[str, tuple[str, Any, str]] = {
    "no files at all": ("files", {}, "files: given none, so nothing in the folder could be"),
    "files that are a list": ("files", [], "files: given list, expected an object"),
    "file without a hash": ("files.x", {"bytes": 1}, r"files\['x'\] lacks sha256"),
    "file of bytes below 0": ("files.x", {"bytes": -1, "sha256": "0" * 64}, "bytes: given -1"),
    "hash that is none": ("files.x", {"bytes": 1, "sha256": "x"}, "expected 64 hexadecimal"),
    "step that is text": ("global_step", "2", "global_step: given '2', expected a whole number"),
    "step of true": ("global_step", True, "global_step: given True, expected a whole number"),
    "another step": ("global_step", 3, "data_position.next_step is 2, global_step 3"),
    "seed that is a list": ("data_position.seed", [1], "data_position.seed: given list"),
    "rate that is text": ("scheduler.peak", "1e9", "scheduler.peak: given '1e9', expected a num"),
    "random state that is none": ("rng", {"torch": 3}, "rng: given dict"),
    "versions that are numbers": ("versions", {"a": 1}, "versions: given dict"),
    "scores that are text": ("scores", {"eval_loss": "x"}, "scores: given dict"),
    "best without a step": ("best_metric", {"scores": {}}, "best_metric lacks step"),
    "config that is none": ("config", 3, "config: given 3, expected an object"),
    "more fields": ("more", 1, "unexpected keyword argument 'more'"),
}

ATTACKS = [
    *(
        Attack(
            f"manifest: {name}",
            manifest(setting(field, value)),
            export,
            f"manifest.json is not what a run writes: .*{says}",
            then=not_exported,
        )
        for name, (field, value, says) in MANIFESTS.items()
    ),
    Attack("manifest: edited", torn, export, "manifest.json has changed since it was written"),
    Attack(
        "manifest: nested 100,000 deep",
        lambda ground: (ground.checkpoint() / MANIFEST).write_text("[" * 100_000),
        export,
        "manifest.json is not a manifest",
    ),
    Attack(
        "manifest: larger than any",
        lambda ground: os.truncate(ground.checkpoint() / MANIFEST, 1 << 40),
        export,
        "manifest.json has more than 67,108,864 bytes",
    ),
    Attack(
        "manifest: of another step than its folder",
        rename_step,
        lambda ground: ground.torchprime(
            "export", "outputs/run/checkpoints/step_00000009", "--out", "out"
        ),
        "is of step 1, and its folder is named step_00000009",
        then=not_exported,
    ),
    Attack("manifest: a pipe", to_pipe(MANIFEST), export, "no whole checkpoint|not a regular"),
    Attack("metadata: a pipe", to_pipe(METADATA), export, r"\.metadata is missing"),
    *(
        Attack(f"metadata: {name}", pickled(data), export, rf"\.metadata is damaged: .*{says}")
        if says != "is damaged"
        else Attack(f"metadata: {name}", pickled(data), export, rf"\.metadata {says}")
        for name, (data, says) in PICKLES.items()
    ),
    *(
        Attack(
            f"metadata: {name}",
            metadata(lambda m, field=field, value=value: set_of(m, field, value)),
            export,
            says,
            then=not_exported,
        )
        for name, (field, value, says) in FIELDS.items()
    ),
    Attack(
        "metadata: region outside of its tensor",
        metadata(region_outside),
        export,
        r"chunks\[0\] lies outside of the tensor's",
    ),
    Attack(
        "metadata: key that is text",
        metadata(key_that_is_none),
        export,
        "a key of storage_data: given 'model.x', expected MetadataIndex",
    ),
    Attack("metadata: region without a place", metadata(no_place), export, "does not say where"),
    *(
        Attack(f"shard: {name}", archive(make), export, says, then=not_exported)
        for name, make, says in (
            ("zeros in no space", bomb, "bytes, and its place has|its archive is not as torch"),
            ("pickles without an archive", legacy, "cannot be read from .*File is not a zip"),
            ("pickle that calls a program", evil_archive, "cannot be read from"),
            ("another object", other_object, "cannot be read from .*it holds a list"),
        )
    ),
    *(
        Attack(
            f"pointer: {name}", pointer(text), export_latest, "latest is damaged: it names no check"
        )
        for name, text in (
            ("leads outside", b"../../../outside/folder\n"),
            ("no text", b"\xff\xfe\x00"),
            ("a megabyte", b"step_00000002" * 99_999),
            ("nothing", b""),
        )
    ),
]
