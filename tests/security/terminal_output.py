"""Text that would clear the screen, write a line of its own, or turn a name around.

`carry_out` sees for all attacks that nothing raw is printed; here each kind of text is shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import torch
from attack import Attack, Ground
from held import config, template, train_chats
from safetensors.torch import load_file, save_file

EVIL = "\x1b[2J\u202e\x9b1m\x07"
WRITTEN_OUT = r"\\x1b\[2J\\u202e(\\u00|\\x)9b1m\\x07"


def rows(row: dict[str, Any]) -> Callable[[Ground], None]:
    def lay(ground: Ground) -> None:
        (ground.here / "rows.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")

    return lay


def tensor(ground: Ground) -> None:
    path = ground.model() / "model.safetensors"
    save_file({**load_file(path), f"a{EVIL}": torch.zeros(1)}, path, metadata={"format": "pt"})


def file_name(ground: Ground) -> None:
    (ground.here / f"a{EVIL}.jsonl").write_text('{"prompt": 1\n')


def certificate(ground: Ground) -> None:
    shutil.copytree(ground.run() / "export", ground.here / "export")
    path = next((ground.here / "export").glob("*certificate*.json"))
    content = json.loads(path.read_text())
    content["checks"][0]["detail"] = f"a{EVIL}"
    content[f"b{EVIL}"] = f"c{EVIL}"
    path.write_text(json.dumps(content, ensure_ascii=False))


def prepare(ground: Ground) -> tuple[int, str]:
    return ground.prepare("dataset.file_dataset_path=rows.jsonl")


ATTACKS = [
    Attack(
        "terminal: key of a row",
        rows({"prompt": "a", "completion": "b", f"a{EVIL}": "c"}),
        prepare,
        WRITTEN_OUT,
        code=0,
    ),
    Attack(
        "terminal: role of a message",
        rows({"messages": [{"role": f"a{EVIL}", "content": "b"}]}),
        prepare,
        WRITTEN_OUT,
    ),
    Attack(
        "terminal: name of a file",
        file_name,
        lambda ground: ground.prepare(f"dataset.file_dataset_path='a{EVIL}.jsonl'"),
        WRITTEN_OUT,
    ),
    Attack("terminal: name of a tensor", tensor, lambda ground: ground.train(), WRITTEN_OUT),
    Attack(
        "terminal: kind of a model",
        config(model_type=f"a{EVIL}"),
        lambda ground: ground.train("dry_run=true"),
        WRITTEN_OUT,
    ),
    Attack(
        "terminal: template that raises",
        template(f"{{{{ raise_exception('a{EVIL}') }}}}"),
        train_chats,
        WRITTEN_OUT,
    ),
    Attack(
        "terminal: certificate",
        certificate,
        lambda ground: ground.torchprime("verify", "export"),
        WRITTEN_OUT,
    ),
]
