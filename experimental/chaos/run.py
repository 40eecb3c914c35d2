"""Kill -9 at random moments of whole runs: after each, the same command must go on as if nothing
had happened.

    make chaos    # or: python experimental/chaos/run.py [--backend xla] [--kills 100] [--cold]
                  # [--adapter lora]

A small run of the real entry point writes a checkpoint after every step, keeps one, and exports at
the end. It is killed and started again by the same command, over and over, until it is complete.
Then its records (train and eval, without times), every tensor of its last checkpoint and every
weight of its export must be, bit for bit, those of a run that nothing interrupted; and the next
such run begins. After each kill the folder says which phase was hit, that all checkpoints in it are
whole, and that no step that was safe is lost.

Half of the kills come after a random delay, wherever that is. The others wait until a file shows
that a short phase has begun (writing, removing, exporting) and come a random moment later.

Importing takes longer than such a run. So each attempt is forked from a process that has imported
all the run needs and computed nothing. With --cold each is a new process started by the command.

With --adapter the run trains an adapter with dropout on a base in int8, and exports both the
adapter and the merged model.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

# One thread: a forked child has no other, and sums do not depend on how many there are.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
# The config's mesh decides, not a count for other programs (the tests set one).
os.environ.pop("CPU_NUM_DEVICES", None)

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

from torchprime.adapters.peft_format import WEIGHTS_NAME  # noqa: E402
from torchprime.checkpoint.hf.read import SafetensorsReader  # noqa: E402
from torchprime.checkpoint.run.catalog import BEST, Catalog  # noqa: E402
from torchprime.checkpoint.run.open_storage import open_storage  # noqa: E402
from torchprime.checkpoint.run.reader import CheckpointReader  # noqa: E402
from torchprime.config.entry import run_main  # noqa: E402
from torchprime.errors import CheckpointError  # noqa: E402
from torchprime.training.run.adapter_export import INSIDE  # noqa: E402
from torchprime.training.run.folder import versions  # noqa: E402

ENTRIES = {"native": "torchprime.torch_native.train", "xla": "torchprime.torch_xla_models.train"}
PACKAGES = ("python", "torch", "torch_xla", "transformers")
STEPS, EVAL_EVERY = 8, 3
# Keys in which any two runs differ.
TIMES = (
    "step_seconds", "supervised_tokens_per_s", "slot_tokens_per_s", "mfu", "seconds",
    "generate_seconds", "share_of_run",
)  # fmt: skip
HOST = ("host_memory_bytes", "device_memory_bytes", "compiles")

BEFORE, TRAINING = "before the first step", "training"
SAVING, RETENTION, EXPORT = "during a save", "during retention", "during the export"
PHASES = (BEFORE, TRAINING, SAVING, RETENTION, EXPORT)
# The names that show a phase while it lasts, and where.
SIGNS = {
    SAVING: ("checkpoints", re.compile(r"\.step_\d+\.partial")),
    RETENTION: ("checkpoints", re.compile(r"\.step_\d+\.removed")),
    EXPORT: (".", re.compile(r"\.export\.partial")),
}
AIMS = (None, None, None, *SIGNS)
LATER = 0.03  # seconds after a sign, at most, that an aimed kill comes
PATIENCE = 300.0  # seconds for one attempt


# The run ------------------------------------------------------------------------------------------


def write_rows(work: Path) -> None:
    """Rows of different lengths, so few that an epoch ends within the run."""
    for name, numbers in (("train", range(34)), ("heldout", range(100, 109))):
        words = ["abcdefghijklm"[n % 7 : n % 7 + 3 + n % 5] for n in numbers]
        rows = [{"prompt": f"say {w} twice: ", "completion": f"{w} {w}"} for w in words]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (work / f"{name}.jsonl").write_text(text, encoding="utf-8")


def adapter_overrides(name: str | None) -> list[str]:
    """Return the overrides of a run that trains an adapter; none without a name."""
    if name is None:
        return []
    return [
        f"adapter={name}",
        "adapter.dropout=0.1",
        "adapter.base_dtype=int8",
        "export.adapter=both",
    ]


def command_line(folder: Path) -> list[str]:
    """Return the arguments that a person would type for this run."""
    return [
        *("model=quickstart", "task=sft", "mesh=single", "dataset=file", "eval=file"),
        f"dataset.file_dataset_path={folder.parent}/train.jsonl",
        f"eval.file_dataset_path={folder.parent}/heldout.jsonl",
        f"output_dir={folder.parent}",
        f"run_name={folder.name}",
        "torch_dtype=float32",
        "dataset.block_size=64",
        "task.global_batch_size=4",
        f"task.max_steps={STEPS}",
        "task.optimizer.learning_rate=1e-3",
        "task.export_checkpoint_path=export",
        "logging_steps=1",
        f"eval.every_steps={EVAL_EVERY}",
        "checkpoint.every_steps=1",
        "checkpoint.keep_last=1",
    ]


class Starter:
    """Starts processes that run a command line; all that they print goes into one file.

    Args:
        overrides: that follow each command line.
    """

    def __init__(self, entry: str, cold: bool, work: Path, overrides: Sequence[str] = ()) -> None:
        self.entry, self.cold, self.overrides = entry, cold, list(overrides)
        self.log, self.listing = work / "log.txt", work / "modules.txt"

    def start(self, argv: Sequence[str]) -> int:
        """Return the id of the new process."""
        argv = [*argv, *self.overrides]
        with self.log.open("ab") as log:
            if self.cold:
                given = [sys.executable, "-m", self.entry, *argv]
                return subprocess.Popen(given, stdout=log, stderr=log).pid
            child = os.fork()
            if child:
                return child
            code = 99
            try:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
                code = run_main(importlib.import_module(self.entry).main, argv)
                if not self.listing.exists():
                    self.listing.write_text("\n".join(sys.modules))
            finally:  # never back into the parent's code, whatever happened
                sys.stderr.flush()
                os._exit(code)

    def warm_up(self) -> None:
        """Import what the first child had imported by its end."""
        if self.cold:
            return
        for name in self.listing.read_text().split("\n"):
            with suppress(Exception):  # not all that a module calls itself can be imported
                importlib.import_module(name)
        assert threading.active_count() == 1, "a fork would lose the other threads"


def run_whole(starter: Starter, folder: Path) -> float:
    """Run without interruption; return the seconds."""
    begin = time.monotonic()
    _, status = os.waitpid(starter.start(command_line(folder)), 0)
    if status:
        sys.exit(f"the run fails without being killed, see {starter.log}")
    return time.monotonic() - begin


# Reading a run's folder ---------------------------------------------------------------------------


def signs(folder: Path, phase: str) -> set[tuple[str, int]]:
    """Names that show the phase, with inodes: what an earlier kill left is told by them."""
    place, pattern = SIGNS[phase]
    found = set()
    with suppress(FileNotFoundError), os.scandir(folder / place) as entries:
        for entry in entries:
            if pattern.fullmatch(entry.name):
                found.add((entry.name, entry.inode()))
    return found


class Look(NamedTuple):
    """A run's folder at rest."""

    steps: list[int]
    starts: int  # so many have got as far as the folder
    begun_at: int  # step at which the last of them began
    trained: int  # last step on record
    signs: dict[str, set[tuple[str, int]]]
    superfluous: set[int]  # checkpoints that retention should remove


def look(folder: Path) -> Look:
    """See also that every checkpoint that can be seen is whole."""
    catalog = Catalog(open_storage(folder / "checkpoints"))
    steps = catalog.steps()
    for step in steps:
        catalog.check(catalog.name_of(step))
    best = catalog.pointed(BEST)
    superfluous = {step for step in steps[:-1] if catalog.name_of(step) != best}
    facts, metrics = folder / "run.json", folder / "metrics.jsonl"
    starts = json.loads(facts.read_text())["starts"] if facts.is_file() else []
    lines = metrics.read_text().split("\n")[:-1] if metrics.is_file() else []
    trained = max((json.loads(line)["step"] for line in lines), default=0)
    shown = {phase: signs(folder, phase) for phase in SIGNS}
    begun_at = starts[-1]["step"] if starts else 0
    return Look(steps, len(starts), begun_at, trained, shown, superfluous)


def phase_hit(before: Look, after: Look) -> str:
    """Return the phase in which the process was killed."""
    for phase in (EXPORT, RETENTION, SAVING):
        if after.signs[phase] - before.signs[phase]:
            return phase
    if after.superfluous - before.superfluous:  # the new one has its name, the old one is not gone
        return RETENTION
    if after.starts == before.starts:
        return BEFORE
    if after.steps and after.steps[-1] == STEPS:
        return EXPORT
    return TRAINING if after.trained > after.begun_at else BEFORE


def records(folder: Path) -> list[dict[str, Any]]:
    """Without what a machine's mood decides."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in line.items() if key not in (*TIMES, *HOST)}
        for line in lines
        if line["kind"] in ("train", "eval")
    ]


def check_same(folder: Path, whole: Path) -> None:
    """Compare records, the last checkpoint and the export, bit for bit."""
    if records(folder) != records(whole):
        sys.exit(f"{folder}: the records differ from those of {whole}")
    name = Catalog.name_of(STEPS)
    ours, theirs = (
        CheckpointReader(open_storage(f / "checkpoints"), name) for f in (folder, whole)
    )
    with ours, theirs:
        if (ours.manifest.rng, ours.manifest.best_metric) != (
            theirs.manifest.rng,
            theirs.manifest.best_metric,
        ):
            sys.exit(f"{folder}: random state or best metric differ from those of {whole}")
        check_tensors(
            {name: ours.get(name) for name in ours.tensor_names()},
            {name: theirs.get(name) for name in theirs.tensor_names()},
            folder,
        )
    mine, other = (SafetensorsReader(f / "export") for f in (folder, whole))
    check_tensors(dict(mine.weights(mine.names())), dict(other.weights(other.names())), folder)
    inside = Path("export") / INSIDE / WEIGHTS_NAME
    if (whole / inside).exists():
        check_tensors(load_file(folder / inside), load_file(whole / inside), folder)


def check_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor], folder: Path) -> None:
    same = [n for n in theirs if n in ours and torch.equal(ours[n], theirs[n])]
    if not theirs or set(ours) != set(same):
        sys.exit(f"{folder}: {sorted(set(ours) ^ set(same))} differ from the uninterrupted run")


def message_fault(said: str, rank: int) -> str | None:
    """Return the fault in the output of a rank of two that has lost its partner, or None if the
    output ends with the message, in one line."""
    start = f"error: rank {rank} of 2: the processes cannot talk to each other"
    if "Traceback" in said:
        return "ended with a traceback"
    lines = said.rstrip().splitlines()
    if not lines or start not in lines[-1] or not lines[-1].endswith(")"):
        return "did not end with a line that says what it met"
    return None


# Kills --------------------------------------------------------------------------------------------


def kill_at_random(process: int, folder: Path, span: float, chance: random.Random) -> int | None:
    """Kill the process at a random moment; its status, None if it was killed."""
    aim = chance.choice(AIMS)
    until = time.monotonic() + (chance.uniform(0, span) if aim is None else PATIENCE)
    old = set() if aim is None else signs(folder, aim)
    while time.monotonic() < until:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return status
        if aim is not None and signs(folder, aim) - old:
            late = span / 4 if aim == EXPORT else LATER  # an export takes longer than a save
            until, aim = time.monotonic() + chance.uniform(0, late), None
        time.sleep(0.0005)
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    return None if os.WIFSIGNALED(status) else status


def storm(starter: Starter, work: Path, kills: int, seed: int) -> dict[str, Any]:
    """Start and kill runs until the number of kills is reached and the last run is complete."""
    begin, chance = time.monotonic(), random.Random(seed)
    whole, again = work / "whole", work / "again"
    run_whole(starter, whole)
    starter.warm_up()
    span = run_whole(starter, again)
    check_same(again, whole)
    shutil.rmtree(again)
    hit: Counter[str] = Counter()
    runs, folder = 0, work / "run_1"
    while sum(hit.values()) < kills or folder.exists():
        before = look(folder)
        process = starter.start(command_line(folder))
        # Enough kills: the last run may end.
        status = (
            kill_at_random(process, folder, span, chance)
            if sum(hit.values()) < kills
            else os.waitpid(process, 0)[1]
        )
        if status:
            sys.exit(f"{folder}: an attempt ended by itself with status {status}, see its log")
        after = look(folder)
        if before.steps and (not after.steps or after.steps[-1] < before.steps[-1]):
            sys.exit(f"{folder}: step {before.steps[-1]} was safe and is lost")
        if status is None:
            phase = phase_hit(before, after)
            hit[phase] += 1
            print(f"kill {sum(hit.values())}, run {runs + 1}: {phase}", file=sys.stderr, flush=True)
            continue
        check_same(folder, whole)
        shutil.rmtree(folder)
        runs += 1
        folder = work / f"run_{runs + 1}"
    skipped = starter.log.read_text(errors="replace").count("is skipped")
    if skipped:
        sys.exit(f"{skipped} times a checkpoint that could be seen was damaged, see {starter.log}")
    return {
        "entry": starter.entry,
        "overrides": starter.overrides,
        "attempts": "new processes" if starter.cold else "forked after the imports",
        "kills": sum(hit.values()),
        "phases": {phase: hit[phase] for phase in PHASES},
        "runs": runs,
        "seed": seed,
        "seconds": round(time.monotonic() - begin),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {name: text for name, text in versions().items() if name in PACKAGES},
    }


def main() -> None:
    """Make the rows, let the storm pass, print the report as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", choices=list(ENTRIES), default="native")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--cold", action="store_true", help="a new process for every attempt")
    parser.add_argument("--adapter", help="an option of the config group adapter")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="kept; a temporary one if not given")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["USE_TORCH_XLA"] = "0" if args.backend == "native" else "1"
    with tempfile.TemporaryDirectory(prefix="torchprime-chaos-") as temporary:
        work = Path(temporary) if args.folder is None else args.folder.absolute()
        work.mkdir(parents=True, exist_ok=True)
        os.environ["XDG_CACHE_HOME"] = str(work / "cache")
        write_rows(work)
        try:
            overrides = adapter_overrides(args.adapter)
            starter = Starter(ENTRIES[args.backend], args.cold, work, overrides)
            report = storm(starter, work, args.kills, args.seed)
        except CheckpointError as error:
            sys.exit(f"a checkpoint that can be seen is not whole: {error}")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
