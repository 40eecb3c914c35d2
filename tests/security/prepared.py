"""Prepared data that was changed, or rotted: it is found, said, and prepared again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from attack import SPLIT, Attack, Ground

from torchprime.data.shared import cache
from torchprime.data.tokenizer.new_tokens import add_special_tokens

AGAIN = "it is now .*damaged, and is prepared again"


def examples(ground: Ground) -> list[Path]:
    """The files of both sides."""
    return sorted(ground.prepared().glob("*/examples.arrow"))


def flip(path: Path) -> None:
    """Other bytes, the same size and time."""
    facts, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def changed_ids(ground: Ground) -> None:
    """The ids of both sides: every file of examples, whatever else it holds."""
    ground.kept["bytes"] = [path.read_bytes() for path in examples(ground)]
    for path in examples(ground):
        flip(path)


def as_before(ground: Ground) -> None:
    now = [path.read_bytes() for path in sorted(ground.here.glob("prepared/*/examples.arrow"))]
    assert [data for data in now if data in ground.kept["bytes"]] == ground.kept["bytes"]
    aside = list(ground.here.glob(f"prepared/*{cache.DAMAGED}"))
    assert aside and not [path for path in aside if not path.is_dir()]


def damaged(kind: str, damage: Callable[[Path, Ground], object]) -> Callable[[Ground], None]:
    """Do something to a file of the folder that has it."""

    def lay(ground: Ground) -> None:
        damage(next(ground.prepared().glob(f"*/{kind}")), ground)

    return lay


def to_link(path: Path, ground: Ground) -> None:
    path.unlink()
    path.symlink_to(ground.outside / "file")


def to_pipe(path: Path, ground: Ground) -> None:
    path.unlink()
    os.mkfifo(path)


def other_key(path: Path, ground: Ground) -> None:
    """Two folders exchange their names: each holds what the other's key promises."""
    one, two, *_ = (p.parent for p in examples(ground))
    two.rename(two.with_name("aside"))
    one.rename(two)


def nonsense(path: Path, ground: Ground) -> None:
    (path.parent / cache.MANIFEST).write_text('{"key": 1, "files": {"a": 3}}')


def more_templates(ground: Ground) -> None:
    """A template put beside a tokenizer that was made before."""
    root = ground.here / "prepared" / "tokenizers"
    folder = add_special_tokens(ground.samples.model, ["<a>"], root).folder
    (folder / "chat_template.jinja").write_text("pwned")
    ground.kept["folder"] = folder


def add_again(ground: Ground) -> tuple[int, str]:
    root = ground.here / "prepared" / "tokenizers"
    return ground.calls(lambda: add_special_tokens(ground.samples.model, ["<a>"], root))


def without_it(ground: Ground) -> None:
    folder = ground.kept["folder"]
    assert (folder / "tokenizer.json").is_file() and not (folder / "chat_template.jinja").exists()
    assert json.loads((folder / cache.MANIFEST).read_text())["files"]["tokenizer.json"]["sha256"]


def again(ground: Ground) -> tuple[int, str]:
    return ground.prepare(*SPLIT)


ATTACKS = [
    Attack(
        "changed ids of the same size and time",
        changed_ids,
        again,
        f"examples.arrow is not as it was written .its sha256 differs.; {AGAIN}",
        code=0,
        then=as_before,
    ),
    *(
        Attack(
            name,
            damaged(kind, damage),
            again,
            f"{says}.*{AGAIN}",
            code=0,
            slow=name not in ("changed leaks", "link in place of a file"),
        )
        for name, kind, damage, says in (
            ("changed plan", "plan_starts.npy", lambda p, _: flip(p), "plan_starts.npy is not as"),
            ("changed report", "report.json", lambda p, _: flip(p), "report.json is not as it was"),
            ("changed leaks", "leaks.json", lambda p, _: flip(p), "leaks.json is not as it was"),
            ("missing plan", "plan_begins.npy", lambda p, _: p.unlink(), "plan_begins.npy is miss"),
            (
                "file that was not there",
                "report.json",
                lambda p, _: p.with_name("more").write_text(""),
                "more was not there when it was written",
            ),
            ("link in place of a file", "report.json", to_link, "report.json is a link"),
            ("pipe in place of a file", "examples.arrow", to_pipe, "a file cannot be read"),
            ("another key's folder", "examples.arrow", other_key, "its manifest.json is that of"),
            ("nonsense for a manifest", "report.json", nonsense, "its manifest.json is that of"),
        )
    ),
    Attack(
        "template beside a tokenizer with new tokens",
        more_templates,
        add_again,
        f"chat_template.jinja was not there when it was written; {AGAIN}",
        code=0,
        then=without_it,
    ),
]
