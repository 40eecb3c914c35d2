"""Attacks that were refused from the start; they stay refused."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from typing import Any

from attack import Attack, Ground
from checkpoints import Evil

CODE = "import os\nos.system('touch pwned')\n"


def config(**changes: Any) -> Callable[[Ground], None]:
    def lay(ground: Ground) -> None:
        path = ground.model() / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        for name in ("modeling_evil.py", "configuration_evil.py", "tokenization_evil.py"):
            (path.parent / name).write_text(CODE)

    return lay


def remote_tokenizer(ground: Ground) -> None:
    config(auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})(ground)
    path = ground.model() / "tokenizer_config.json"
    named = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    settings = {**json.loads(path.read_text()), "auto_map": named, "tokenizer_class": "Evil"}
    path.write_text(json.dumps(settings))


def pickled_weights(ground: Ground) -> None:
    (ground.model() / "model.safetensors").unlink()
    (ground.model() / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def template(text: str) -> Callable[[Ground], None]:
    def lay(ground: Ground) -> None:
        path = ground.model() / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": text}))
        said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        (ground.here / "chats.jsonl").write_text(json.dumps({"messages": said}) + "\n")

    return lay


def train_chats(ground: Ground) -> tuple[int, str]:
    return ground.train("dataset.file_dataset_path=chats.jsonl", "dry_run=true")


def evil_row(ground: Ground) -> None:
    said = {"prompt": "<script>alert(1)</script>\x1b[2J\u202e", "completion": '"><img src=x>'}
    (ground.here / "rows.jsonl").write_text(json.dumps(said) + "\n")


def inspect(ground: Ground) -> tuple[int, str]:
    return ground.inspect("dataset.file_dataset_path=rows.jsonl", "run_name=a")


def page_is_harmless(ground: Ground) -> None:
    page = (ground.here / "outputs" / "a-inspect.html").read_text()
    assert "<script>alert" not in page and "<img" not in page and "\x1b" not in page
    assert "\u202e" not in page and "&lt;" in page


def nothing_ran(ground: Ground) -> None:
    assert not list(ground.here.rglob("pwned"))


def cut(ground: Ground) -> None:
    shard = next(ground.checkpoint().glob("*.distcp"))
    os.truncate(shard, shard.stat().st_size // 2)


SANDBOX = "the chat template refuses the conversation.*(is unsafe|no loader)"
ATTACKS = [
    Attack(
        "pickled weights",
        pickled_weights,
        lambda ground: ground.train(),
        "only pytorch_model.bin and no .*only safetensors are read",
        then=nothing_ran,
    ),
    Attack(
        "code beside config.json",
        config(auto_map={"AutoConfig": "configuration_evil.Evil"}, model_type="evil"),
        lambda ground: ground.train("dry_run=true"),
        "model_type",
        then=nothing_ran,
    ),
    Attack(
        "code beside the tokenizer, asked by chat",
        remote_tokenizer,
        lambda ground: ground.torchprime(
            "chat", "--model", ground.model(), "--prompt", "a", "--max-new-tokens", 1
        ),
        "",
        code=0,
        then=nothing_ran,
    ),
    Attack(
        "code beside the tokenizer, exported",
        remote_tokenizer,
        lambda ground: ground.train("dry_run=true", "task.export_checkpoint_path=export"),
        "everything above is ready",
        code=0,
        then=nothing_ran,
    ),
    *(
        Attack(
            f"template: {name}",
            template(text),
            train_chats,
            SANDBOX,
            then=nothing_ran,
            slow=name not in ("globals", "file"),
        )
        for name, text in (
            ("classes", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
            ("globals", "{{ cycler.__init__.__globals__.os.system('touch pwned') }}"),
            ("format", "{{ '{0.__class__.__init__.__globals__}'.format(messages[0]) }}"),
            ("change", "{% set x = messages.append(1) %}{{ messages[0].content }}"),
            ("file", "{% include '/etc/passwd' %}"),
        )
    ),
    Attack("row with markup", evil_row, inspect, "a-inspect.html", code=0, then=page_is_harmless),
    Attack(
        "checkpoint cut in half",
        cut,
        lambda ground: ground.torchprime("export", ground.checkpoint(), "--out", "out"),
        "distcp is damaged: it has",
    ),
]
