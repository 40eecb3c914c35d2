"""Kill -9 at random moments of writing, pointing, removing; look at what is there after each.

`python kill_storm.py FOLDER KILLS` prints a JSON report, or says what was lost and exits with 1.
Every child is forked from a process that has imported everything, so a kill costs milliseconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # of the modules that tests share

from load_script import load_script

from torchprime.checkpoint.run.catalog import LATEST, Catalog
from torchprime.checkpoint.run.lock import run_lock
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.reader import CheckpointReader
from torchprime.checkpoint.run.shards import write_shards

SHAPE = (512, 1024)
KEEP_LAST, KEEP_BEST = 2, 1
MOST = KEEP_LAST + KEEP_BEST + 1  # and one not yet removed


def helpers() -> ModuleType:
    path = Path(__file__).parents[1] / "unit" / "checkpoint" / "conftest.py"
    return load_script(path)


def work(folder: Path, helper: ModuleType, count: int) -> None:
    """Use checkpoints as a run does: clean, resume, then write, point, retain."""
    with run_lock(folder):
        catalog = Catalog(open_storage(folder / "checkpoints"))
        catalog.clean()
        newest = catalog.newest_whole(complain)
        start = look(catalog, newest) if newest else 0
        for step in range(start + 1, start + 1 + count):
            name = catalog.name_of(step)
            with catalog.storage.create(name) as writer:
                write_shards(writer, helper.cut("w", torch.full(SHAPE, float(step)), (1, 1)))
                score = float((step * 7) % 10)
                helper.finish(writer, global_step=step, scores={"eval_loss": score})
            catalog.point(LATEST, name)
            catalog.retain(KEEP_LAST, KEEP_BEST, None)


def complain(message: str) -> None:
    print(f"a checkpoint is not whole: {message}", flush=True)
    os._exit(1)


def look(catalog: Catalog, name: str) -> int:
    """The step of a checkpoint whose numbers are those that were written."""
    with CheckpointReader(catalog.storage, name) as reader:
        step = reader.manifest.step
        if catalog.name_of(step) != name or not bool((reader.get("w") == float(step)).all()):
            complain(f"{name} holds something else")
    return step


def inspect(catalog: Catalog, before: int, number: int) -> tuple[int, int]:
    """Everything visible is whole, the newest is not older than before, and `latest` exists.

    A kill between a checkpoint's name and its retention leaves one more than `number`, those that
    were there before it; the next retention removes all of them.
    """
    steps = catalog.steps()
    for step in steps:
        catalog.check(catalog.name_of(step))
        look(catalog, catalog.name_of(step))
    pointed = catalog.pointed(LATEST)
    if pointed is not None and pointed not in map(catalog.name_of, steps):
        complain(f"latest points to {pointed}, which is gone")
    newest = steps[-1] if steps else 0
    if newest < before:
        complain(f"step {before} was there and is lost")
    if len(steps) > max(number, MOST) + 1:
        complain(f"retention does not keep up: {steps}")
    return newest, len(steps)


def fork(folder: Path, helper: ModuleType, count: int) -> int:
    child = os.fork()
    if child == 0:
        try:
            work(folder, helper, count)
        except BaseException as error:
            complain(repr(error))
        os._exit(0)
    return child


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)  # a forked child has no other threads
    helper, chance = helpers(), random.Random(5)
    catalog = Catalog(open_storage(folder / "checkpoints"))
    begin = time.monotonic()
    _, status = os.waitpid(fork(folder, helper, 4), 0)
    assert status == 0
    span = time.monotonic() - begin
    (newest, number), halves, survived = inspect(catalog, 4, 0), 0, 0
    for _ in range(kills):
        child = fork(folder, helper, 1_000_000)
        time.sleep(chance.uniform(0, span))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            raise SystemExit("a child ended by itself, see above")
        halves += bool(catalog.storage.leftovers())
        later, number = inspect(catalog, newest, number)
        survived += later > newest
        newest = later
    _, status = os.waitpid(fork(folder, helper, 2), 0)
    if status or len(catalog.steps()) > MOST:
        complain(f"retention leaves too many: {catalog.steps()}")
    print(json.dumps({"halves": halves, "grew": survived, "newest": newest, "kills": kills}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
