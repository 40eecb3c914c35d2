"""Let vLLM continue prompts with several models. Runs in vLLM's environment.

    python vllm_worker.py FOLDERS.json RESULTS.json

FOLDERS has {"prompts": lists of ids, "tokens": how many to add, "folders": {name: folder}}; RESULTS
has for each name a list of {"ids", "logprobs", "prompt_logprobs"}, or {"refused": message}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]
from vllm.distributed.parallel_state import (  # pyright: ignore[reportMissingImports]
    cleanup_dist_env_and_memory,
)

# With longrope vLLM would else stop at the original context, whose short factors it then takes.
CONTEXT = 128


def answers(folder: str, prompts: list[list[int]], tokens: int) -> list[dict[str, Any]]:
    llm = LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=CONTEXT,
        max_num_seqs=4,
        seed=0,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=tokens, logprobs=0, prompt_logprobs=0, ignore_eos=True
    )
    asked = [{"prompt_token_ids": ids} for ids in prompts]
    outputs = llm.generate(asked, sampling, use_tqdm=False)
    return [answer(output) for output in outputs]


def answer(output: Any) -> dict[str, Any]:
    made = output.outputs[0]
    prompt = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return {
        "ids": list(made.token_ids),
        "logprobs": [p[i].logprob for i, p in zip(made.token_ids, made.logprobs, strict=True)],
        "prompt_logprobs": [p[i].logprob for i, p in prompt],
    }


if __name__ == "__main__":
    request = json.loads(Path(sys.argv[1]).read_text())
    results: dict[str, Any] = {}
    for name, folder in request["folders"].items():
        try:
            results[name] = answers(folder, request["prompts"], request["tokens"])
        except Exception as error:  # whatever an engine raises for a model that it lacks
            results[name] = {"refused": f"{type(error).__name__}: {error}"}
        cleanup_dist_env_and_memory()
        Path(sys.argv[2]).write_text(json.dumps(results))
