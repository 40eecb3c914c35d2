"""The choice of a run's chat template, and warnings about it.

A template is jinja source that renders messages as one text. It comes from the tokenizer's own
folder, from a family shipped in assets/templates, or from a user's file; the template used for
training is exported. render.py renders it, turns.py finds the assistant's spans in the text,
reasoning.py handles reasoning.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from torchprime.data.files.record import Rejection
from torchprime.data.messages.read import Message
from torchprime.data.rows.read import Row
from torchprime.data.templates.render import (
    ChatTemplate,
)
from torchprime.data.templates.source import check_syntax, checked_options, tells_date
from torchprime.data.templates.stop_tokens import reserved_texts
from torchprime.data.templates.turns import turn_spans
from torchprime.data.tokenizer.load import Tokenizer, read_settings, token_named
from torchprime.errors import CheckpointError, DataError
from torchprime.files.template_files import DEFAULT, own_templates, read_text

FOLDER = Path(__file__).resolve().parents[2] / "assets" / "templates"
OWN = "tokenizer's own"
FILE_ENDINGS = (".jinja", ".jinja2")

# A family and the control tokens of its format, each of which is one token in a tokenizer made for
# it. Families without any are written in plain words.
FAMILIES: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama2": (),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("[INST]", "[/INST]"),
    "qwen2.5": ("<|im_start|>", "<|im_end|>"),
    "qwen3": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "gemma3": ("<start_of_turn>", "<end_of_turn>"),
    "olmo": (),
    "phi4": ("<|im_start|>", "<|im_sep|>", "<|im_end|>"),
    "mistral-small": (
        *("[SYSTEM_PROMPT]", "[INST]", "[/INST]"),
        *("[AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[TOOL_CONTENT]"),
    ),
    "smollm3": ("<|im_start|>", "<|im_end|>"),
    "gpt-oss": ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>"),
    "granite": ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
    "glm4": ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    "zephyr": (),
    "alpaca": (),
    "vicuna": (),
}

BOS_USED = re.compile(r"\bbos_token\b")


# Choosing the template ----------------------------------------------------------------------------


def resolve_template(
    chosen: str | None,
    tokenizer: Tokenizer,
    *,
    options: Mapping[str, Any] | None = None,
    date: str | None = None,
) -> ChatTemplate | None:
    """Return the template that dataset.chat_template names, or the tokenizer's own.

    Return None if nothing is chosen and the tokenizer has no template.

    Args:
        options: dataset.template_options, the template's variables besides messages and tools.
        date: ISO date that `strftime_now` returns; None is today.

    Raises:
        DataError: a name that is neither a family nor a file, a file that cannot be read, a
            template that is not jinja, an option that no template reads.
    """
    settings = read_settings(tokenizer.folder)
    if chosen in (None, "auto", "default"):
        template = _own(tokenizer, settings)
        if template is None:
            return None
    elif chosen.endswith(FILE_ENDINGS):
        template = ChatTemplate(Path(chosen).name, _file_text(Path(chosen)))
    elif chosen in FAMILIES:
        template = ChatTemplate(chosen, _family_text(chosen, tokenizer), markers=FAMILIES[chosen])
    else:
        raise DataError(_unknown_template(chosen))
    for text in template.texts.values():
        check_syntax(text, template.name)
    bos, warnings = _bos_text(tokenizer, settings)
    template = replace(
        template,
        bos_token=bos,
        eos_token=tokenizer.token_text(tokenizer.eos_id) or "",
        options=checked_options(options or {}, template),
        date=(date or today()) if _reads_date(template) else "",
    )
    return replace(template, warnings=(*warnings, *_warnings(template, tokenizer)))


def _bos_text(tokenizer: Tokenizer, settings: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the template's bos_token text, and a warning if a server has none."""
    bos = token_named(settings, "bos_token") or ""
    if bos or not tokenizer.add_bos or tokenizer.bos_id is None:
        return bos, []
    bos = tokenizer.token_text(tokenizer.bos_id) or ""
    return bos, [
        f"tokenizer.json begins texts with {bos!r} but tokenizer_config.json names no "
        "bos_token: add it, or a server renders conversations without it"
    ]


def _reads_date(template: ChatTemplate) -> bool:
    return any(tells_date(text) for text in template.texts.values())


def today() -> str:
    """Return the local date, which transformers' `strftime_now` uses."""
    return datetime.now().date().isoformat()


def _own(tokenizer: Tokenizer, settings: Mapping[str, Any]) -> ChatTemplate | None:
    """Return the tokenizer's own templates, under one name for all of them."""
    texts = own_templates(tokenizer.folder, settings)
    if not texts:
        return None
    if DEFAULT not in texts:
        raise DataError(
            f"the tokenizer in {tokenizer.folder} has no template named {DEFAULT}, as its other "
            f"readers expect (found {', '.join(sorted(texts))}). Save the one to train "
            "with as a file and set dataset.chat_template to its path"
        )
    others = tuple((name, text) for name, text in texts.items() if name != DEFAULT)
    return ChatTemplate(OWN, texts[DEFAULT], named=others)


def _file_text(path: Path) -> str:
    if path.exists() and not path.is_dir():
        try:
            return read_text(path)
        except CheckpointError as error:
            raise DataError(f"dataset.chat_template={path}: {error}") from error
    folder = path.parent
    others = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, others, n=3) or [
        name for name in sorted(others) if name.endswith(FILE_ENDINGS)
    ]
    hint = f"; the folder has {', '.join(near[:5])}" if near else ""
    raise DataError(f"dataset.chat_template={path}: there is no such file{hint}")


def _family_text(family: str, tokenizer: Tokenizer) -> str:
    """Return the shipped source; if the tokenizer uses BOS, the template itself writes it.

    Servers encode a rendered template without adding anything to it.
    """
    text = (FOLDER / f"{family}.jinja").read_text(encoding="utf-8")
    if tokenizer.add_bos and not BOS_USED.search(text):
        return "{{- bos_token }}\n" + text
    return text


def _unknown_template(chosen: str) -> str:
    near = difflib.get_close_matches(chosen.lower(), FAMILIES, n=1)
    return (
        f"dataset.chat_template={chosen} is not known"
        f"{f'; did you mean {near[0]}?' if near else ''}. Expected {', '.join(FAMILIES)}, a path "
        f"that ends in {' or '.join(FILE_ENDINGS)}, or null for the tokenizer's own"
    )


def _warnings(template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
    found: list[str] = []
    special = tokenizer.special_tokens
    plain = [marker for marker in template.markers if marker not in special]
    if plain:
        found.append(
            f"{', '.join(plain)} of the {template.name} template are not special tokens of this "
            "tokenizer: they are learned as plain text of several tokens each"
        )
    if tokenizer.encode_ids([template.eos_token])[0] != [tokenizer.eos_id]:
        found.append(
            f"the text of eos_token, {template.eos_token!r}, is not one token for this tokenizer: "
            "a template that writes it does not write EOS"
        )
    found += _warnings_of_rendering(template, tokenizer)
    if template.date:
        found.append(
            f"the template writes the date, here {template.date}: dataset.template_date keeps one"
        )
    return found


def _warnings_of_rendering(template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
    """Return warnings about the beginning and end of a short conversation, if it renders."""
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    row = Row("", "messages", messages=tuple(map(Message, messages)))
    probe = turn_spans(template, row, reserved_texts(template, tokenizer))
    if isinstance(probe, Rejection):
        return []
    found: list[str] = []
    if tokenizer.add_bos and not probe.text.startswith(template.bos_token):
        found.append(
            f"the tokenizer begins texts with {template.bos_token!r}, the template does not: "
            "conversations have no BOS, in training as when served"
        )
    stop = probe.text[probe.spans[-1].stop : probe.spans[-1].end]
    ends = {template.eos_token, *map(tokenizer.token_text, tokenizer.generation_eos_ids)}
    if stop and stop not in ends:
        found.append(
            f"turns end with {stop!r}, which is neither eos_token ({template.eos_token!r}) nor in "
            "generation_config.json: a server stops there only if told to"
        )
    return found
