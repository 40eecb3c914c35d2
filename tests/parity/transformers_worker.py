"""Compute logits of several models. Runs in the environment of another transformers.

    python transformers_worker.py REQUEST.json RESULTS.safetensors

REQUEST has {"prompts": lists of ids, "folders": {name: folder}}; RESULTS has logits by
"NAME/number of the prompt". Of a model that this version refuses, or whose weights or
tokenizer it reads in another way, the file's metadata has the message, by its name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "Tom has 12345 apples and  two\n\n more."


def logits(folder: str, prompts: list[list[int]]) -> list[torch.Tensor]:
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, report = loaded
    if any(report.values()):
        raise ValueError(f"not every weight fits: {report}")
    own = Tokenizer.from_file(f"{folder}/tokenizer.json").encode(TEXT).ids
    if AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"] != own:
        raise ValueError("AutoTokenizer reads another tokenizer than tokenizer.json")
    with torch.no_grad():
        return [model.eval()(input_ids=torch.tensor([ids])).logits[0] for ids in prompts]


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text())
    found: dict[str, torch.Tensor] = {}
    notes = {"version": transformers.__version__}
    for name, folder in request["folders"].items():
        try:
            for number, each in enumerate(logits(folder, request["prompts"])):
                found[f"{name}/{number}"] = each.contiguous()
        except Exception as error:  # whatever the library raises for a config that it lacks
            notes[name] = f"{type(error).__name__}: {error}"
    save_file(found, sys.argv[2], notes)
