"""The check that a server renders conversations with the chat template used in training.

The files of an export are read with transformers' AutoTokenizer, as vLLM does, and one conversation
without tools and one with tools are rendered. The reader chooses the template; the hashes tell
if it is the right one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from torchprime.checkpoint.hf.portable import auto_tokenizer
from torchprime.errors import CheckpointError
from torchprime.files.json_files import read_json, read_json_if_there
from torchprime.files.template_files import DEFAULT, own_templates
from torchprime.models.families import is_wrapper

PROBE = [{"role": "user", "content": "What is the tide at Skerry?"}]
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "tide_height",
        "description": "Height of the tide in metres",
        "parameters": {
            "type": "object",
            "properties": {"harbour": {"type": "string", "description": "where"}},
            "required": ["harbour"],
        },
    },
}
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class TrainedTemplate:
    """The chat template of a run.

    Attributes:
        sha256: of the source that rendered conversations without tools.
        tools_sha256: of the source that rendered those with tools.
        options: what else the template was given: enable_thinking, ...
    """

    sha256: str
    tools_sha256: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_values(cls, values: Mapping[str, Any]) -> TrainedTemplate:
        """Make it from the values in a certificate's check; older certificates have one template
        only."""
        sha256 = values["sha256"]
        return cls(sha256, values.get("tools_sha256", sha256), dict(values.get("options", {})))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def check_served_template(
    folder: Path, trained: TrainedTemplate
) -> tuple[str, Mapping[str, object]]:
    """Check the served template and return the check's words and numbers.

    Raises:
        CheckpointError: a template is missing or another one, or a reader renders by another.
    """
    _check_sources(folder, trained)
    tokenizer = auto_tokenizer(folder)
    found = tokenizer.chat_template
    texts = found if isinstance(found, dict) else {DEFAULT: found}
    tokens = {name: getattr(tokenizer, name) for name in TOKENS}
    tokens = {name: token for name, token in tokens.items() if token is not None}
    for tools, wanted in ((None, trained.sha256), ([PROBE_TOOL], trained.tools_sha256)):
        by_hash = {_sha256(text): text for text in texts.values() if isinstance(text, str)}
        if wanted not in by_hash:
            raise CheckpointError(_differs(_kind(tools), wanted, None))
        options: dict[str, Any] = {"tools": tools, **trained.options}
        served = _rendered(
            lambda options=options: tokenizer.apply_chat_template(
                PROBE, tokenize=False, add_generation_prompt=True, **options
            )
        )
        text = by_hash[wanted]
        meant = _rendered(
            lambda options=options, text=text: render_jinja_template(
                [PROBE], chat_template=text, add_generation_prompt=True, **tokens, **options
            )[0][0]
        )
        if served != meant:
            raise CheckpointError(
                f"transformers renders a conversation {_kind(tools)} otherwise than the template "
                f"that was trained with: {served!r:.200} instead of {meant!r:.200}"
            )
    apart = trained.tools_sha256 != trained.sha256
    with_tools = ", with tools by the one named tool_use" if apart else ""
    return f"the one that was trained with{with_tools}", asdict(trained)


def _check_sources(folder: Path, trained: TrainedTemplate) -> None:
    """Check that both places where a reader may look hold the template used in training."""
    settings = read_json(folder / "tokenizer_config.json")
    whole = is_wrapper(read_json_if_there(folder / "config.json"))
    inline = settings.pop("chat_template", None)
    if isinstance(inline, list):
        inline = {entry["name"]: entry["template"] for entry in inline}
    elif inline is not None:
        inline = {DEFAULT: inline}
    for where, texts in (
        ("chat_template.jinja", own_templates(folder, settings)),
        ("tokenizer_config.json", inline or {}),
    ):
        text = texts.get(DEFAULT)
        if text is None and whole:  # its files are the base's, which may have one place only
            continue
        found = None if text is None else _sha256(text)
        if found != trained.sha256:
            raise CheckpointError(_differs(f"of {where}", trained.sha256, found))


def _kind(tools: list[Any] | None) -> str:
    return "with tools" if tools else "without tools"


def _differs(which: str, wanted: str, found: str | None) -> str:
    has = f"one with sha256 {found}" if found else "none"
    return (
        f"the chat template {which} is not the one that was trained with: sha256 {wanted} was, "
        f"here is {has}"
    )


def _rendered(render: Any) -> str:
    """Return a rendering, or the template's error, which a server would return too."""
    try:
        return str(render())
    except Exception as error:  # a template is a program: it can raise any exception
        return f"refused: {type(error).__name__}: {error}"
