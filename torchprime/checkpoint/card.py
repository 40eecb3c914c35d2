"""The model card (README.md) of an export: what it is, how it was made, how it is used."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

from torchprime.checkpoint.source import HUB_NAME


def model_card(facts: Mapping[str, Any]) -> str:
    """Write the card from plain facts; what is not given is left out.

    Args:
        facts: `name`, `base_model`, `dataset`, `command`, `steps`, `parameters`, `dtype` as text or
            numbers; `hub_model` and `hub_datasets`, the names of those that came from the hub;
            `metrics` and `versions` as mappings; `chat` true if it has a chat template;
            `template_options` that this was given while training.
    """
    name = str(facts.get("name") or "model")
    sections = [
        _front_matter(facts),
        f"# {name}\n\n{_summary(facts)}",
        _table("Training", _training_rows(facts)),
        _table("Final metrics", facts.get("metrics") or {}),
        _command(facts),
        _table("Versions", facts.get("versions") or {}),
        _usage(name, bool(facts.get("chat")), facts.get("template_options") or {}),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(facts: Mapping[str, Any]) -> str:
    """The part that hubs read. It names only what came from the hub: a hub makes a link of each
    name, and a local path is none, or the name of somebody else's model."""
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"base_model: {name}" for name in _hub_names([facts.get("hub_model")])]
    if names := _hub_names(facts.get("hub_datasets")):
        lines += ["datasets:", *(f"- {name}" for name in names)]
    return "\n".join([*lines, "tags:", "- torchprime", "---"])


def _hub_names(given: Any) -> list[str]:
    """The names of hub form, quoted for YAML."""
    given = given if isinstance(given, list) else []
    return [json.dumps(n) for n in given if isinstance(n, str) and HUB_NAME.fullmatch(n)]


def _summary(facts: Mapping[str, Any]) -> str:
    base = facts.get("base_model")
    start = f"Fine-tuned from `{base}`" if base else "Trained from scratch"
    data = f" on `{facts['dataset']}`" if facts.get("dataset") else ""
    return f"{start}{data} with torchprime (PyTorch/XLA)."


def _training_rows(facts: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("base_model", "dataset", "steps", "parameters", "dtype")
    return {key.replace("_", " "): facts[key] for key in keys if facts.get(key) is not None}


def _table(title: str, rows: Mapping[str, Any]) -> str:
    if not rows:
        return ""
    lines = [f"| {key} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).replace("|", "\\|").replace("\n", " ")
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"


def _command(facts: Mapping[str, Any]) -> str:
    command = facts.get("command")
    return f"## Command\n\n```bash\n{command}\n```" if command else ""


def _usage(name: str, chat: bool, options: Mapping[str, Any]) -> str:
    given = "".join(f",\n    {key}={value!r}" for key, value in options.items())
    make_inputs = (
        'inputs = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}],\n'
        f'    add_generation_prompt=True, return_dict=True, return_tensors="pt"{given})'
        if chat
        else 'inputs = tokenizer("Your prompt", return_tensors="pt")'
    )
    route = "chat/completions" if chat else "completions"
    body = (
        '"messages": [{"role": "user", "content": "Hello"}]' if chat else '"prompt": "Your prompt"'
    )
    served = f"--default-chat-template-kwargs {shlex.quote(json.dumps(dict(options)))}"
    flags = f" \\\n  {served}" if options else ""
    return f"""## Use

With transformers, in this folder:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")
{make_inputs}
output = model.generate(**inputs, max_new_tokens=128)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

With vLLM:

```bash
vllm serve . --host 127.0.0.1 --served-model-name {json.dumps(name)}{flags}
curl http://127.0.0.1:8000/v1/{route} -H "Content-Type: application/json" \\
  -d '{{"model": {json.dumps(name)}, {body}, "max_tokens": 128}}'
```"""
