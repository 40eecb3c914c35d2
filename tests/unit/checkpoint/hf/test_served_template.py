"""The certificate's template check: AutoTokenizer has to choose what was trained with, for
conversations with tools, too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from torchprime.checkpoint.hf.portable import write_tokenizer
from torchprime.checkpoint.hf.served_template import TrainedTemplate, check_served_template
from torchprime.data.templates.render import text_hash
from torchprime.errors import CheckpointError

DEFAULT = "{% for m in messages %}d:{{ m.content }}{% endfor %}"
TOOL_USE = (
    "{{ enable_thinking }}{% for t in tools %}{{ t.function.name }}{% endfor %}"
    "{% for m in messages %}t:{{ m.content }}{% endfor %}"
)
BOTH = {"default": DEFAULT, "tool_use": TOOL_USE}


def trained_with(default: str, with_tools: str, **options: Any) -> TrainedTemplate:
    """The record of a run with templates of these texts."""
    return TrainedTemplate(text_hash(default), text_hash(with_tools), options)


@pytest.fixture
def exported(by_hand: Any, tmp_path: Path) -> Any:
    """Write a tokenizer as an export has it, with these templates."""
    raw = by_hand.byte_level(("<s>", "</s>"))
    source = by_hand.save(raw, tmp_path / "source", {"bos_token": "<s>", "eos_token": "</s>"})

    def write(templates: Mapping[str, str]) -> Path:
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        out.mkdir()
        write_tokenizer(out, source, eos=raw.token_to_id("</s>"), chat_templates=templates)
        return out

    return write


def test_one_template_renders_both(exported: Any) -> None:
    trained = trained_with(DEFAULT, DEFAULT)
    detail, values = check_served_template(exported({"default": DEFAULT}), trained)
    assert detail == "the one that was trained with"
    assert values["sha256"] == values["tools_sha256"]
    assert TrainedTemplate.from_values(values) == trained
    # Certificates from before know one hash.
    assert TrainedTemplate.from_values({"sha256": trained.sha256}) == trained


def test_tools_are_rendered_by_tool_use(exported: Any) -> None:
    trained = trained_with(DEFAULT, TOOL_USE, enable_thinking=False)
    detail, values = check_served_template(exported(BOTH), trained)
    assert detail.endswith("with tools by the one named tool_use")
    assert values["options"] == {"enable_thinking": False}


@pytest.mark.parametrize(
    ("templates", "trained", "said"),
    [
        # Rows with tools were rendered by the default although a server takes the other one.
        (BOTH, (DEFAULT, DEFAULT), "renders a conversation with tools otherwise"),
        ({"default": DEFAULT}, (DEFAULT, TOOL_USE), "with tools is not the one .* here is none"),
        (BOTH, (TOOL_USE, TOOL_USE), "chat_template.jinja is not the one"),
        ({}, (DEFAULT, DEFAULT), "chat_template.jinja is not the one .* here is none"),
    ],
)
def test_another_choice_fails(
    exported: Any, templates: dict[str, str], trained: tuple[str, str], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        check_served_template(exported(templates), trained_with(*trained))


def test_both_places_are_looked_at(exported: Any) -> None:
    folder = exported({"default": DEFAULT})
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "x"}))
    with pytest.raises(CheckpointError, match="tokenizer_config.json is not the one"):
        check_served_template(folder, trained_with(DEFAULT, DEFAULT))


def test_a_template_that_refuses_the_probe_is_served_so(exported: Any) -> None:
    refuses = "{{ raise_exception('never') }}"
    trained = trained_with(refuses, refuses)
    _, values = check_served_template(exported({"default": refuses}), trained)
    assert TrainedTemplate.from_values(values) == trained


@pytest.mark.parametrize("name", ["/abs", "../up", "a/b"])
def test_a_name_that_is_a_path_is_never_written(exported: Any, name: str, tmp_path: Path) -> None:
    before = sorted(tmp_path.parent.rglob("*.jinja"))
    with pytest.raises(CheckpointError, match="a chat template is named"):
        exported({"default": DEFAULT, name: "x"})
    assert [p for p in sorted(tmp_path.parent.rglob("*.jinja")) if p not in before] in (
        [],
        [tmp_path / "out1" / "chat_template.jinja"],
    )
