"""Links planted under names that a run writes next, and folders that others may write."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from attack import Attack, Ground

from torchprime.checkpoint.run.lock import run_lock
from torchprime.files.atomic import atomic_folder, open_new, write_text
from torchprime.files.private_folders import own_folder
from torchprime.metrics.trackers.tensorboard import TensorBoard
from torchprime.metrics.trackers.tracker import TrackedRun
from torchprime.metrics.writers import JsonlWriter

ANA, TEAM = 12345, 54321  # another user and a group, as numbers without names

# Targets of a planted link.
TARGETS: dict[str, Callable[[Ground], Path]] = {
    "a file": lambda ground: ground.outside / "file",
    "a file that is not there": lambda ground: ground.outside / "new",
    "a pipe": lambda ground: ground.outside / "pipe",
    "a folder": lambda ground: ground.outside / "folder",
    "a device": lambda ground: Path("/dev/zero"),
}


def plant(path: Path, target: Path) -> None:
    """Put a link there, in place of what is there."""
    if path.is_dir() and not path.is_symlink():
        path.rename(path.with_name(f"was_{path.name}"))
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def in_run(*names: str, target: str = "a file") -> Callable[[Ground], None]:
    def lay(ground: Ground) -> None:
        run = ground.run()
        for name in names:
            plant(run / name, TARGETS[target](ground))

    return lay


def all_that_are_replaced(ground: Ground) -> None:
    """In a run that goes on for a third step, everything whose name can be guessed and which is
    written anew. Kinds of targets take turns."""
    run = ground.run()
    names = (
        "config.yaml", "run.json", "data_report.json", "report.md", "report.html",
        ".config.yaml.tmp", ".run.json.tmp", ".report.md.tmp", "checkpoint.now", ".export2.partial",
        ".export2.removed", "checkpoints/latest", "checkpoints/.latest.tmp",
        "checkpoints/step_00000003", "checkpoints/.step_00000003.partial",
        "checkpoints/.step_00000003.removed",
    )  # fmt: skip
    # These are read, too, by a run that goes on: a link there is refused (see below).
    read = ("config.yaml", "run.json")
    targets = list(TARGETS.values())
    for place, name in enumerate(name for name in names if name not in read):
        plant(run / name, targets[place % len(targets)](ground))


def go_on(ground: Ground, *more: str) -> tuple[int, str]:
    """The run's own command, for one step more."""
    return ground.train(
        "task.max_steps=3",
        "resume.allow_changes=[task.max_steps,eval,task.lr_scheduler]",
        "task.export_checkpoint_path=export2",
        *more,
    )


def whole_and_plain(ground: Ground) -> None:
    run = ground.here / "outputs" / "run"
    for name in ("report.md", "checkpoints/latest", "export2/config.json", "data_report.json"):
        assert (run / name).is_file() and not (run / name).is_symlink(), name
    assert not (run / "checkpoints" / "step_00000003").is_symlink()
    assert not os.path.lexists(run / "checkpoint.now")


def owned(name: str, uid: int, gid: int, mode: int) -> Callable[[Ground], None]:
    """A folder of somebody else's, or one that somebody else may write."""

    def lay(ground: Ground) -> None:
        folder = ground.run() if name == "outputs/run" else ground.here / name
        folder.mkdir(parents=True, exist_ok=True)
        os.chown(folder, uid, gid)
        folder.chmod(mode)

    return lay


def shared_link(ground: Ground) -> None:
    """ana made a link in a folder that all may write, where a run will be."""
    place = ground.here / "outputs"
    place.mkdir(mode=0o777)
    (place / "run").symlink_to(ground.outside / "folder")
    os.lchown(place / "run", ANA, TEAM)


def write_here(write: Callable[[Path], object]) -> Callable[[Ground], Any]:
    return lambda ground: ground.calls(lambda: write(ground.here))


def to(target: str, name: str) -> Callable[[Ground], None]:
    return lambda ground: plant(ground.here / name, TARGETS[target](ground))


def folder_with_a_file(out: Path) -> None:
    with atomic_folder(out, replace=True) as partial, open_new(partial / "a") as file:
        file.write(b"mine")


def into_a_planted_file(here: Path) -> None:
    """In a folder being written, too, somebody may put a link."""
    with atomic_folder(here / "out") as partial:
        (partial / "a").symlink_to("/dev/null")


def exchanged_folder(ground: Ground) -> Any:
    def write() -> None:
        with atomic_folder(ground.here / "out") as partial:
            partial.rename(ground.here / "aside")
            partial.symlink_to(ground.outside / "folder")

    return ground.calls(write)


def is_file_with(name: str, text: str) -> Callable[[Ground], None]:
    def then(ground: Ground) -> None:
        path = ground.here / name
        assert path.read_text() == text and not path.is_symlink()
        assert [p for p in ground.here.rglob("*") if p.name.startswith(".")] == []

    return then


FUNCTIONS = [
    attack
    for kind in TARGETS
    for attack in (
        Attack(
            f"write_text over a link to {kind}",
            to(kind, "a.txt"),
            write_here(lambda here: write_text(here / "a.txt", "mine")),
            "",
            code=0,
            then=is_file_with("a.txt", "mine"),
        ),
        Attack(
            f"a folder over links to {kind}",
            lambda ground, kind=kind: [
                to(kind, name)(ground) for name in ("out", ".out.partial", ".out.removed")
            ],
            write_here(lambda here: folder_with_a_file(here / "out")),
            "",
            code=0,
            then=is_file_with("out/a", "mine"),
        ),
        Attack(
            f"lock that is a link to {kind}",
            to(kind, ".lock"),
            write_here(lambda here: run_lock(here).__enter__()),
            r"output_dir: .*\.lock is not a file of this run .*Remove it",
        ),
        Attack(
            f"records that are a link to {kind}",
            to(kind, "metrics.jsonl"),
            write_here(lambda here: JsonlWriter(here / "metrics.jsonl")),
            "metrics.jsonl cannot be written: it is a link",
        ),
        Attack(
            f"TensorBoard's folder that is a link to {kind}",
            to(kind, "tensorboard"),
            write_here(lambda here: TensorBoard(TrackedRun("run", here, {}))),
            "tensorboard is a link, and nothing is written through one",
        ),
        Attack(
            f"samples' folder that is a link to {kind}",
            to(kind, "evaluations"),
            write_here(lambda here: own_folder(here, "evaluations", "output_dir")),
            "evaluations is a link, and nothing is written through one",
        ),
    )
]

ATTACKS = [
    *FUNCTIONS,
    Attack(
        "lock that is another name of a file",
        lambda ground: os.link(ground.outside / "file", ground.here / ".lock"),
        write_here(lambda here: run_lock(here).__enter__()),
        r"\.lock is not a file of this run .*a plain file with one name",
        then=lambda ground: (ground.here / ".lock").unlink(),
    ),
    Attack(
        "lock that is a pipe",
        lambda ground: os.mkfifo(ground.here / ".lock"),
        write_here(lambda here: run_lock(here).__enter__()),
        r"\.lock is not a file of this run",
    ),
    Attack(
        "records that are a pipe",
        lambda ground: os.mkfifo(ground.here / "metrics.jsonl"),
        write_here(lambda here: JsonlWriter(here / "metrics.jsonl")),
        "metrics.jsonl cannot be written: it is not a plain file",
    ),
    Attack(
        "link in a folder that is being written",
        lambda ground: None,
        write_here(into_a_planted_file),
        "a was replaced while .* was written",
    ),
    Attack(
        "folder exchanged while it is written",
        lambda ground: None,
        exchanged_folder,
        "was replaced while .* was written",
    ),
    # Whole commands.
    Attack(
        "checkpoints that are a link",
        in_run("checkpoints", target="a folder"),
        go_on,
        "checkpoints is a link, and nothing is written through one",
    ),
    Attack(
        "lock that is a link, at a resume", in_run(".lock"), go_on, r"\.lock is not a file of this"
    ),
    Attack(
        "everything that is written anew is a link",
        all_that_are_replaced,
        go_on,
        "exported to .*export2",
        code=0,
        then=whole_and_plain,
    ),
    *(
        Attack(
            f"{name} is a link, at a resume",
            in_run(name, target=target),
            go_on,
            says,
            slow=True,
        )
        for name, target, says in (
            ("metrics.jsonl", "a file", "metrics.jsonl cannot be read: it is a link"),
            ("run.json", "a file", "run.json cannot be read: it is a link"),
            ("tensorboard", "a folder", "tensorboard is a link"),
        )
    ),
    Attack(
        "evaluations is a link, at a resume",
        in_run("evaluations", target="a folder"),
        go_on,
        "evaluations is a link",
        slow=True,
    ),
    # Folders of others.
    Attack(
        "run's folder of another user",
        owned("outputs/run", ANA, TEAM, 0o755),
        go_on,
        f"output_dir/run_name: .*belongs to user {ANA}.*chown -R 0 ",
        needs_root=True,
    ),
    Attack(
        "run's folder that a group may write",
        owned("outputs/run", 0, TEAM, 0o2775),
        go_on,
        f"can be written by the group {TEAM} .mode 2775.*chmod g-w .*chmod [+]t ",
        needs_root=True,
    ),
    Attack(
        "new run in a folder that everybody may write",
        owned("outputs/run2", 0, 0, 0o777),
        lambda ground: ground.train("run_name=run2"),
        "can be written by every user .mode 0777.*chmod go-w ",
        needs_root=True,
    ),
    Attack(
        "run's folder that is another user's link",
        shared_link,
        lambda ground: ground.train(),
        f"run is a link that belongs to user {ANA}",
        needs_root=True,
    ),
    Attack(
        "checkpoints of another user",
        owned("elsewhere/run", ANA, TEAM, 0o755),
        lambda ground: ground.train("checkpoint.folder=elsewhere"),
        f"checkpoint.folder: .*belongs to user {ANA}",
        needs_root=True,
    ),
    Attack(
        "report into another user's folder",
        owned("theirs", ANA, TEAM, 0o755),
        lambda ground: ground.torchprime("report", ground.samples.run, "--out", "theirs"),
        f"--out: .*belongs to user {ANA}",
        needs_root=True,
    ),
    Attack(
        "prepared data that everybody may write",
        owned("prepared", 0, 0, 0o777),
        lambda ground: ground.prepare(),
        "dataset.prepared_dir: .*can be written by every user",
        needs_root=True,
    ),
    Attack(
        "prepared data of another user in a sticky folder",
        lambda ground: [
            ground.prepare(),
            (ground.here / "prepared").chmod(0o1777),
            [os.chown(path, ANA, TEAM) for path in (ground.here / "prepared").iterdir()],
        ],
        lambda ground: ground.prepare(),
        f"dataset.prepared_dir: .*belongs to user {ANA}",
        needs_root=True,
    ),
]
