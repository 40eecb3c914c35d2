"""The list of a run's checkpoints: existing, whole, best, and to be retained.

They are ordered by the step in their name, never by a clock, which may be set back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from torchprime.checkpoint.run.manifest import STEP, BestCheckpoint, read_manifest
from torchprime.checkpoint.run.storage import MANIFEST, Storage
from torchprime.errors import CheckpointError
from torchprime.files.hashing import FileFacts, sha256_of

CHECKERS = 4  # files that are hashed at a time
LATEST, BEST = "latest", "best"

Rank = tuple[float, ...]  # score of a checkpoint among others, lower is better
MOST_POINTER = 200  # size limit of a pointer in bytes
OURS = re.compile(r"^\.*(set_aside_\d+_)?step_\d{8,}")  # other names in the folder are ignored


def by_loss(scores: Mapping[str, float]) -> Rank | None:
    """Return the held-out loss as rank, lower is better; None if it is not known."""
    loss = scores.get("eval_loss", math.nan)
    return (loss,) if math.isfinite(loss) else None


class Catalog:
    """The folders step_NNNNNNNN of a storage, and the pointers `latest` and `best`: small files
    with a checkpoint's name.

    Args:
        rank: which of two checkpoints is better, by their scores; None for one that is no candidate
            for the best.
    """

    def __init__(
        self, storage: Storage, rank: Callable[[Mapping[str, float]], Rank | None] = by_loss
    ) -> None:
        self.storage, self.rank = storage, rank

    @staticmethod
    def name_of(step: int) -> str:
        return f"step_{step:08d}"

    def steps(self) -> list[int]:
        """Return the steps of all checkpoints that have a manifest, ascending."""
        return [
            step
            for step in self._numbered()
            if self.storage.exists(f"{self.name_of(step)}/{MANIFEST}")
        ]

    def visible(self) -> list[int]:
        """Return the steps of all checkpoints that were whole once. A local folder has its final
        name only then; at an object store one without a manifest was never whole."""
        unfinished = set(self.storage.leftovers())
        return [step for step in self._numbered() if self.name_of(step) not in unfinished]

    def _numbered(self) -> list[int]:
        """Return the steps of all folders with a checkpoint's name, ascending."""
        found = (STEP.fullmatch(name) for name in self.storage.names())
        return sorted(int(match[1]) for match in found if match)

    def check(self, name: str, deep: bool = True) -> None:
        """Check that every file of a checkpoint exists and has its size and, if `deep`, its hash.

        Raises:
            CheckpointError: naming the first file that is not as it was written.
        """
        files = read_manifest(self.storage, name).files
        with ThreadPoolExecutor(CHECKERS, thread_name_prefix="check") as pool:
            checks = [
                pool.submit(self._check_file, f"{name}/{file}", expected, deep)
                for file, expected in files.items()
            ]
        for check in checks:
            check.result()

    def _check_file(self, path: str, expected: FileFacts, deep: bool) -> None:
        where, size = self.storage.describe(path), self.storage.size(path)
        if size is None:
            raise CheckpointError(f"{where} is missing.")
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{where} is damaged: it has {size:,} bytes, not {expected['bytes']:,}."
            )
        if not deep:
            return
        with self.storage.telling(f"Reading {where}"), self.storage.open(path) as file:
            digest, _ = sha256_of(file)
        if digest != expected["sha256"]:
            raise CheckpointError(f"{where} is damaged: its sha256 is not the manifest's.")

    def newest_whole(self, say: Callable[[str], None]) -> str | None:
        """Return the newest whole checkpoint; damaged ones are skipped with a message."""
        for step in reversed(self._numbered()):
            name = self.name_of(step)
            try:
                self.check(name)
            except CheckpointError as error:
                say(f"checkpoint {name} is skipped: {error}")
                continue
            return name
        return None

    def point(self, pointer: str, name: str) -> None:
        """Write this checkpoint's name into `latest` or `best`."""
        self.storage.write_bytes(pointer, f"{name}\n".encode())

    def pointed(self, pointer: str) -> str | None:
        """Return the checkpoint that a pointer names; None if the pointer is missing or
        malformed."""
        if not self.storage.exists(pointer):
            return None
        try:
            name = self.storage.read_bytes(pointer, MOST_POINTER).decode("utf-8", "replace").strip()
        except CheckpointError:  # the file is larger than a pointer
            return None
        return name if STEP.fullmatch(name) else None

    def retain(self, keep_last: int | None, keep_best: int, keep_every: int | None) -> list[str]:
        """Remove the checkpoints that no rule retains, and return their names.

        Args:
            keep_last: number of newest checkpoints to retain; None retains all.
            keep_best: number of best checkpoints to retain, by rank.
            keep_every: checkpoints whose step is a multiple of it are retained.
        """
        if keep_last is None:
            return []
        steps = self.steps()
        ranks = {name: self._rank(name) for name in map(self.name_of, steps)}
        best = sorted((rank, name) for name, rank in ranks.items() if rank is not None)
        kept = {self.name_of(step) for step in steps[-keep_last:]}
        kept |= {name for _, name in best[:keep_best]}
        kept |= {name for name in map(self.pointed, (LATEST, BEST)) if name}
        if keep_every:
            kept |= {self.name_of(step) for step in steps if step % keep_every == 0}
        removed = [name for name in map(self.name_of, steps) if name not in kept]
        for name in removed:
            self.storage.remove(name)
        return removed

    def set_aside_after(self, step: int, say: Callable[[str], None]) -> None:
        """Rename the checkpoints after a step: a run that resumes from that step writes its own."""
        for later in self.visible():
            if later <= step:
                continue
            name, number = self.name_of(later), 1
            while f"set_aside_{number}_{name}" in self.storage.names():
                number += 1
            other = f"set_aside_{number}_{name}"
            self.storage.rename(name, other)
            say(f"checkpoint {name} is not part of the resumed run: now {other}")
        pointed = STEP.fullmatch(self.pointed(LATEST) or "")
        if pointed and int(pointed[1]) > step:
            self.point(LATEST, self.name_of(step))
        if self.pointed(BEST):
            self.point_to_best()

    def point_to_best(self) -> BestCheckpoint | None:
        """Point `best` at the best existing checkpoint, or remove it if none has a rank.

        Returns:
            Its `step` and `scores`; the earliest of equal ones.
        """
        ranked = [(rank, step) for step in self.steps() if (rank := self._rank(self.name_of(step)))]
        if not ranked:
            self.storage.remove_file(BEST)
            return None
        name = self.name_of(min(ranked)[1])
        if self.pointed(BEST) != name:
            self.point(BEST, name)
        return {"step": min(ranked)[1], "scores": read_manifest(self.storage, name).scores}

    def clean(self) -> None:
        """Remove the files that killed writers left; only the holder of the run's lock may call
        it."""
        for name in self.storage.leftovers():
            if OURS.search(name):
                self.storage.remove(name)
        self.storage.clear_temporary()

    def _rank(self, name: str) -> Rank | None:
        """Return a checkpoint's rank; None if it has none or its manifest can't be read."""
        try:
            return self.rank(read_manifest(self.storage, name).scores)
        except CheckpointError:
            return None
