"""The model card (README.md) of an export: its origin, training and use.

Names and options may come from an untrusted checkpoint: they are escaped as Markdown
(text/markdown_text.py), and quoted where a reader would copy them into a shell or a program.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from keyword import iskeyword
from typing import Any

from torchprime.checkpoint.hf.source import HUB_NAME
from torchprime.text.markdown_text import block, code, inline, table


def model_card(facts: Mapping[str, Any]) -> str:
    """Return the card's text; facts that are not given are left out.

    Args:
        facts: `name`, `base_model`, `dataset`, `command`, `steps`, `parameters`, `dtype` as text or
            numbers; `hub_model` and `hub_datasets`, the names of those that came from the hub;
            `metrics` and `versions` as mappings; `chat` true if it has a chat template;
            `template_options` that this was given while training.
    """
    name = str(facts.get("name") or "model")
    sections = [
        _front_matter(facts),
        f"# {inline(name)}\n\n{_summary(facts)}",
        _table("Training", _training_rows(facts)),
        _table("Final metrics", facts.get("metrics") or {}),
        _command(facts),
        _table("Versions", facts.get("versions") or {}),
        _usage(name, bool(facts.get("chat")), facts.get("template_options") or {}),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(facts: Mapping[str, Any]) -> str:
    """Return the YAML front matter, which hubs read. It names only models and datasets from the
    hub: a hub links each name, and a local path would be a broken link or somebody else's model."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"base_model: {name}" for name in _hub_names([facts.get("hub_model")])]
    if names := _hub_names(facts.get("hub_datasets")):
        lines += ["datasets:", *(f"- {name}" for name in names)]
    return "\n".join([*lines, "tags:", "- torchprime", "---"])


def _hub_names(given: Any) -> list[str]:
    """Return the names that have the form of a hub name, quoted for YAML."""
    given = given if isinstance(given, list) else []
    return [json.dumps(n) for n in given if isinstance(n, str) and HUB_NAME.fullmatch(n)]


def _summary(facts: Mapping[str, Any]) -> str:
    base = facts.get("base_model")
    start = f"Fine-tuned from {code(str(base))}" if base else "Trained from scratch"
    data = f" on {code(str(facts['dataset']))}" if facts.get("dataset") else ""
    return f"{start}{data} with torchprime (PyTorch/XLA)."


def _training_rows(facts: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("base_model", "dataset", "steps", "parameters", "dtype")
    return {key.replace("_", " "): facts[key] for key in keys if facts.get(key) is not None}


def _table(title: str, rows: Mapping[str, Any]) -> str:
    if not rows:
        return ""
    cells = [[str(key), _cell(value)] for key, value in rows.items()]
    return "\n".join([f"## {title}", "", *table(["", ""], cells)])


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _command(facts: Mapping[str, Any]) -> str:
    command = facts.get("command")
    return "\n".join(["## Command", "", *block(str(command), "bash")]) if command else ""


def _argument(name: str, value: Any) -> str:
    """Return the source text of one argument of a Python call, also for names that are no
    identifiers."""
    if name.isidentifier() and not iskeyword(name):
        return f"{name}={value!r}"
    return f"**{ {name: value}!r}"


def _usage(name: str, chat: bool, options: Mapping[str, Any]) -> str:
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
    python = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")
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
