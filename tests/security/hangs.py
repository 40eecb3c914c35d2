"""Inputs that never end or take all memory: pipes, devices, loops, one row of many megabytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from attack import Attack, Ground
from held import template, train_chats

from torchprime.data.rows import limits as row_limits

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
KINDS = ("pipe", "device")


def never_ends(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


def in_model(name: str, kind: str) -> Callable[[Ground], None]:
    return lambda ground: never_ends(ground.model() / name, kind)


def rows(kind: str) -> Callable[[Ground], None]:
    return lambda ground: never_ends(ground.here / "rows.jsonl", kind)


def endless_template(ground: Ground) -> None:
    template(ENDLESS)(ground)
    ground.monkeypatch.setattr(row_limits, "RENDER_SECONDS", 0.1)


def long_row(ground: Ground) -> None:
    row = {"prompt": "a", "completion": "b c" * 400_000}
    (ground.here / "rows.jsonl").write_text(json.dumps(row) + "\n")


def deep_row(ground: Ground) -> None:
    (ground.here / "rows.jsonl").write_text('{"prompt": ' + "[" * 100_000 + "\n")


def prepare(*overrides: str) -> Callable[[Ground], tuple[int, str]]:
    return lambda ground: ground.prepare("dataset.file_dataset_path=rows.jsonl", *overrides)


def train(ground: Ground) -> tuple[int, str]:
    return ground.train()


def chat(ground: Ground) -> tuple[int, str]:
    return ground.torchprime("chat", "--model", ground.model(), "--prompt", "a")


NOT_REGULAR = "not a regular file"
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
ATTACKS = [
    *(Attack(f"rows: {kind}", rows(kind), prepare(), NOT_REGULAR) for kind in KINDS),
    *(
        Attack(
            f"{name}: {kind}, {what}",
            in_model(name, kind),
            call,
            f"{name}.*{NOT_REGULAR}",
            slow=(name, kind, what) != ("config.json", "pipe", "train"),
        )
        for name in (*MODEL_FILES, "chat_template.jinja", "generation_config.json")
        for kind in KINDS
        for what, call in (("train", train), ("chat", chat))
    ),
    Attack(
        "rows as a template file: pipe",
        lambda ground: never_ends(ground.here / "own.jinja", "pipe"),
        prepare("dataset.chat_template=own.jinja", "dataset.file_dataset_path=chats.jsonl"),
        NOT_REGULAR,
    ),
    Attack(
        "prompts: pipe",
        lambda ground: never_ends(ground.here / "prompts.txt", "pipe"),
        lambda ground: ground.torchprime(
            "chat", "--model", ground.model(), "--prompts", "prompts.txt"
        ),
        NOT_REGULAR,
    ),
    Attack(
        "log: device",
        lambda ground: never_ends(ground.here / "train.log", "device"),
        lambda ground: ground.torchprime("compare", "train.log", "train.log"),
        NOT_REGULAR,
    ),
    *(
        Attack(
            f"metrics.jsonl: {kind}",
            lambda ground, kind=kind: never_ends(ground.here / "metrics.jsonl", kind),
            lambda ground: ground.torchprime("compare", "metrics.jsonl", "metrics.jsonl"),
            NOT_REGULAR,
        )
        for kind in KINDS
    ),
    Attack(
        "template that never ends",
        endless_template,
        train_chats,
        r"took more than 0.1 s of one row.*chats.jsonl:1|chats.jsonl:1.*took more than 0.1 s",
    ),
    Attack(
        "row of a megabyte, over the limit",
        long_row,
        prepare("dataset.max_row_characters=1000000"),
        r"rows.jsonl:1; the first: 1,200,001 characters",
    ),
    Attack("row nested without end", deep_row, prepare(), "rows.jsonl:1"),
]
