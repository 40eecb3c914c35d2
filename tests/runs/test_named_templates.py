"""Named chat templates, their options, their date: lookup and choice are transformers' own."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from torchprime.data.templates.choose import resolve_template
from torchprime.data.templates.render import render
from torchprime.data.tokenizer.load import Tokenizer, load_tokenizer
from torchprime.errors import CheckpointError, DataError

MESSAGES = [{"role": "user", "content": "How high?"}]
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {"type": "object"}}}
DEFAULT = "{% for m in messages %}d:{{ m.content }}{% endfor %}"
TOOL_USE = (
    "{% for t in tools %}{{ t.function.name }};{% endfor %}"
    "{% for m in messages %}t:{{ m.content }}{% endfor %}"
)
RAG = "{% for m in messages %}r:{{ m.content }}{% endfor %}"

Lay = Callable[[Path], None]


def in_config(value: Any) -> Lay:
    def lay(folder: Path) -> None:
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text())
        path.write_text(json.dumps(settings | {"chat_template": value}))

    return lay


def in_files(**texts: str) -> Lay:
    def lay(folder: Path) -> None:
        for name, text in texts.items():
            path = folder / "chat_template.jinja"
            if name != "default":
                path = folder / "additional_chat_templates" / f"{name}.jinja"
                path.parent.mkdir(exist_ok=True)
            path.write_text(text)

    return lay


def both(*lays: Lay) -> Lay:
    def lay_all(folder: Path) -> None:
        for lay in lays:
            lay(folder)

    return lay_all


LISTED = [{"name": "default", "template": DEFAULT}, {"name": "tool_use", "template": TOOL_USE}]
LAYOUTS: dict[str, Lay] = {
    "one text": in_config(DEFAULT),
    "list": in_config([*LISTED, {"name": "rag", "template": RAG}]),
    "file": in_files(default=DEFAULT),
    "file hides the list": both(in_config(LISTED), in_files(default=RAG)),
    "file and folder": in_files(default=DEFAULT, tool_use=TOOL_USE, rag=RAG),
    "folder hides the list": both(
        in_config([{"name": "default", "template": RAG}]),
        in_files(default=DEFAULT, tool_use=TOOL_USE),
    ),
}


@pytest.fixture
def folder(by_hand: Any, tmp_path: Path) -> Path:
    raw = by_hand.byte_level(("<s>", "</s>"))
    return by_hand.save(raw, tmp_path / "t", {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("tools", [None, [TOOL]])
def test_the_template_is_the_one_that_transformers_takes(
    layout: str, tools: list[Any] | None, folder: Path
) -> None:
    LAYOUTS[layout](folder)
    theirs = PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(
        MESSAGES, tools=tools, tokenize=False
    )
    template = resolve_template(None, load_tokenizer(folder))
    assert template is not None
    assert render(template, MESSAGES, tools or ()) == theirs
    named = "tool_use" in dict(template.named)
    assert theirs == ("tide;t:How high?" if tools and named else theirs)


def test_chat_template_json_is_read_where_there_is_nothing_else(folder: Path) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": LISTED}))
    template = resolve_template(None, load_tokenizer(folder))
    assert template is not None and template.texts == {"default": DEFAULT, "tool_use": TOOL_USE}


def test_a_chosen_template_renders_everything(folder: Path) -> None:
    LAYOUTS["list"](folder)
    template = resolve_template("chatml", load_tokenizer(folder))
    assert template is not None and template.named == ()


@pytest.mark.parametrize("name", ["/tmp/x", "../x", "a/b", "", ".hidden", "a\n", "a" * 65, None])
def test_a_name_that_is_a_path_is_refused(name: Any, folder: Path) -> None:
    in_config([*LISTED, {"name": name, "template": "x"}])(folder)
    with pytest.raises(CheckpointError, match="a chat template is named .*expected letters"):
        resolve_template(None, load_tokenizer(folder))


def test_the_fingerprint_knows_every_template_option_and_date(folder: Path) -> None:
    def fingerprint(lay: Lay, **options: Any) -> str:
        for path in folder.rglob("*.jinja"):
            path.unlink()
        in_config(None)(folder)
        lay(folder)
        template = resolve_template(None, load_tokenizer(folder), **options)
        assert template is not None
        return template.fingerprint()

    thinking = "{{ enable_thinking }}" + DEFAULT
    dated = "{{ strftime_now('%d') }}" + DEFAULT
    found = [
        fingerprint(in_config(DEFAULT)),
        fingerprint(in_config(LISTED)),
        fingerprint(in_config([LISTED[0], {"name": "tool_use", "template": RAG}])),
        fingerprint(in_config(thinking)),
        fingerprint(in_config(thinking), options={"enable_thinking": True}),
        fingerprint(in_config(thinking), options={"enable_thinking": False}),
        fingerprint(in_config(dated), date="2024-07-26"),
        fingerprint(in_config(dated), date="2024-07-27"),
    ]
    assert len(set(found)) == len(found)
    today = fingerprint(in_config(dated))
    assert today == fingerprint(in_config(dated), date=date.today().isoformat())
    # A template without a date does not change with the day.
    assert found[0] == fingerprint(in_config(DEFAULT), date="2024-07-26")


def test_options_reach_the_template(folder: Path) -> None:
    text = "{{ enable_thinking }};{{ documents | length }};{{ messages[0].content }}"
    in_config(text)(folder)
    options = {"documents": [{"title": "a", "text": "b"}], "enable_thinking": False}
    template = resolve_template(None, load_tokenizer(folder), options=options)
    assert template is not None
    theirs = PreTrainedTokenizerFast.from_pretrained(folder).apply_chat_template(
        MESSAGES, tokenize=False, **options
    )
    assert render(template, MESSAGES) == theirs == "False;1;How high?"
    assert template.option_values == options


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"enable_thinkin": False}, "does not read enable_thinkin; it reads enable_thinking.* Did"),
        ({"messages": []}, "messages is given by the run. Leave it out"),
        ({"enable_thinking": {1, 2}}, "expected values that JSON can write"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], said: str, folder: Path) -> None:
    in_config("{{ enable_thinking }}" + DEFAULT)(folder)
    with pytest.raises(DataError, match=f"dataset.template_options.*{said}"):
        resolve_template(None, load_tokenizer(folder), options=options)


def test_the_date_is_the_runs(folder: Path) -> None:
    in_config("{{ strftime_now('%d %b %Y') }};{{ messages[0].content }}")(folder)
    tokenizer: Tokenizer = load_tokenizer(folder)
    for day, text in (("2024-07-26", "26 Jul 2024"), ("2025-01-02", "02 Jan 2025")):
        template = resolve_template(None, tokenizer, date=day)
        assert template is not None and template.date == day
        assert render(template, MESSAGES) == f"{text};How high?"
        assert any(day in warning for warning in template.warnings)
