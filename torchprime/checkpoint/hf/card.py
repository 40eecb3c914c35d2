"""The model card (README.md) of an export: its origin, training and use.

Names and options may come from an untrusted checkpoint: they are escaped as Markdown
(text/markdown_text.py), and quoted where a reader would copy them into a shell or a program.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from keyword import iskeyword
from typing import Any

from torchprime.checkpoint.field_kinds import (
    TEXT,
    Kind,
    Table,
    check_fields,
    count,
    list_of,
    or_null,
    texts_to,
)
from torchprime.checkpoint.hf.source import HUB_NAME
from torchprime.text.markdown_text import block, code, inline, table

CARD_FIELDS: Table = {
    **dict.fromkeys(("name", "base_model", "wrapper", "dataset", "hub_model"), or_null(TEXT)),
    "hub_datasets": list_of(TEXT, "a list of names"),
    "command": or_null(TEXT),
    "parameters": or_null(count()),
    "versions": texts_to(TEXT),
    "chat": Kind("true or false", lambda v: isinstance(v, bool)),
}


@dataclass(frozen=True)
class CardFacts:
    """The facts of a run that its model card shows. The card leaves out unknown ones.

    Attributes:
        base_model: as the config names it; None when training began from random weights.
        wrapper: the base's model_type, if only its text model was trained.
        hub_model: the base model's name on the hub, if it came from there.
        hub_datasets: the names of the data sets that came from the hub.
        command: the run's command line, quoted for a shell.
        chat: true if the model has a chat template.
    """

    name: str | None = None
    base_model: str | None = None
    wrapper: str | None = None
    dataset: str | None = None
    hub_model: str | None = None
    hub_datasets: tuple[str, ...] = ()
    command: str | None = None
    parameters: int | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    chat: bool = False

    @classmethod
    def from_json(cls, content: Mapping[str, Any], where: str) -> CardFacts:
        """Return the facts that a JSON object holds; fields that are not known are ignored.

        Args:
            where: the field that holds the object, for messages.

        Raises:
            ValueError: a field has another type.
        """
        found = {**asdict(cls()), "hub_datasets": []}
        found |= {name: value for name, value in content.items() if name in found}
        check_fields(found, CARD_FIELDS, where)
        return cls(**{**found, "hub_datasets": tuple(found["hub_datasets"])})


def model_card(
    facts: CardFacts,
    *,
    steps: int | None = None,
    dtype: str | None = None,
    metrics: Mapping[str, Any] | None = None,
    template_options: Mapping[str, Any] | None = None,
    whole: bool = False,
) -> str:
    """Return the card's text; facts that are not known are left out.

    Args:
        steps: updates made.
        dtype: of the weights.
        metrics: the last values.
        template_options: what else the chat template was given in training.
        whole: the folder holds all parts of a wrapper.
    """
    name = facts.name or "model"
    rows = {
        "base model": facts.base_model,
        "dataset": facts.dataset,
        "steps": steps,
        "parameters": facts.parameters,
        "dtype": dtype,
    }
    sections = [
        _front_matter(facts, whole),
        f"# {inline(name)}\n\n{_summary(facts, whole)}",
        table_section("Training", {key: value for key, value in rows.items() if value is not None}),
        table_section("Final metrics", metrics or {}),
        command_section(facts.command),
        table_section("Versions", facts.versions),
        _usage(name, facts.chat, template_options or {}, whole),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(facts: CardFacts, whole: bool) -> str:
    """Return the YAML front matter, which hubs read. It names only models and datasets from the
    hub: a hub links each name, and a local path would be a broken link or somebody else's model."""
    task = "image-text-to-text" if whole else "text-generation"
    lines = ["---", "library_name: transformers", f"pipeline_tag: {task}"]
    lines += [f"base_model: {name}" for name in hub_names([facts.hub_model or ""])]
    if names := hub_names(facts.hub_datasets):
        lines += ["datasets:", *(f"- {name}" for name in names)]
    return "\n".join([*lines, "tags:", "- torchprime", "---"])


def auto_class(*, whole_wrapper: bool) -> str:
    """Return the class of transformers that loads a text model, or a whole wrapper."""
    return "AutoModelForImageTextToText" if whole_wrapper else "AutoModelForCausalLM"


def hub_names(given: Iterable[str]) -> list[str]:
    """Return the names that have the form of a hub name, quoted for YAML."""
    return [json.dumps(name) for name in given if HUB_NAME.fullmatch(name)]


def _summary(facts: CardFacts, whole: bool) -> str:
    base = facts.base_model
    start = f"Fine-tuned from {code(base)}" if base else "Trained from scratch"
    data = f" on {code(facts.dataset)}" if facts.dataset else ""
    said = f"{start}{data} with torchprime (PyTorch/XLA)."
    if facts.wrapper is None:
        return said
    if whole:
        return (
            f"{said} This is the whole model, whose `model_type` is {code(facts.wrapper)}. Only "
            "the weights of its text model were trained, on text alone; its other parts, such as "
            "those for images, are the base's, unchanged. Answers about images were not measured."
        )
    return (
        f"{said} This is the text model of the base, whose `model_type` is {code(facts.wrapper)}; "
        "its other parts, such as those for images, are not in this folder."
    )


def table_section(title: str, rows: Mapping[str, Any]) -> str:
    """Return a section with a table of names and values; empty without rows."""
    if not rows:
        return ""
    cells = [[str(key), _cell(value)] for key, value in rows.items()]
    return "\n".join([f"## {title}", "", *table(["", ""], cells)])


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def command_section(command: str | None) -> str:
    """Return the section with the run's command line; empty without one."""
    return "\n".join(["## Command", "", *block(command, "bash")]) if command else ""


def _argument(name: str, value: Any) -> str:
    """Return the source text of one argument of a Python call, also for names that are no
    identifiers."""
    if name.isidentifier() and not iskeyword(name):
        return f"{name}={value!r}"
    return f"**{ {name: value}!r}"


def _usage(name: str, chat: bool, options: Mapping[str, Any], whole: bool) -> str:
    given = "".join(f",\n    {_argument(key, value)}" for key, value in options.items())
    make_inputs = (
        'inputs = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}],\n'
        f'    add_generation_prompt=True, return_dict=True, return_tensors="pt"{given})'
        if chat
        else 'inputs = tokenizer("Your prompt", return_tensors="pt")'
    )
    route = "chat/completions" if chat else "completions"
    asked = (
        {"messages": [{"role": "user", "content": "Hello"}]} if chat else {"prompt": "Your prompt"}
    )
    request = shlex.quote(json.dumps({"model": name, **asked, "max_tokens": 128}))
    served = f"--default-chat-template-kwargs {shlex.quote(json.dumps(dict(options)))}"
    flags = f" \\\n  {served}" if options else ""
    auto = auto_class(whole_wrapper=whole)
    python = f"""\
from transformers import {auto}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = {auto}.from_pretrained(".", dtype="auto")
{make_inputs}
output = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
    shell = f"""\
vllm serve . --host 127.0.0.1 --served-model-name {shlex.quote(name)}{flags}
curl http://127.0.0.1:8000/v1/{route} -H "Content-Type: application/json" \\
  -d {request}"""
    return "\n".join(
        [
            "## Use\n\nWith transformers, in this folder:\n",
            *block(python, "python"),
            "\nWith vLLM:\n",
            *block(shell, "bash"),
        ]
    )
