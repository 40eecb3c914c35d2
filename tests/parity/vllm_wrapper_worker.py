"""Let vLLM continue prompts with whole models and adapters over them. Runs in vLLM's environment.

python vllm_wrapper_worker.py REQUESTS.json ANSWERS.json
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
from vllm.lora.request import LoRARequest  # pyright: ignore[reportMissingImports]


def load(folder: str) -> Any:
    return LLM(
        model=folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
        seed=0,
        enable_prefix_caching=False,
        enable_lora=True,
        max_lora_rank=8,
        limit_mm_per_prompt={"image": 0},  # the stand-in cannot read images
    )


def answer(output: Any) -> dict[str, list[Any]]:
    made = output.outputs[0]
    prompt = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    after = zip(made.token_ids, made.logprobs, strict=True)
    chosen = [found[token].logprob for token, found in (*prompt, *after)]
    return {"ids": list(made.token_ids), "logprobs": chosen}


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    asked = [{"prompt_token_ids": ids} for ids in given["prompts"]]
    sampling = SamplingParams(
        temperature=0, max_tokens=given["tokens"], logprobs=0, prompt_logprobs=0, ignore_eos=True
    )
    answers, loaded, llm = [], None, None
    for request in given["requests"]:
        if request["model"] != loaded:
            llm = None
            cleanup_dist_env_and_memory()
            loaded, llm = request["model"], load(request["model"])
        assert llm is not None
        adapter = request["adapter"] and LoRARequest("adapter", 1, request["adapter"])
        outputs = llm.generate(asked, sampling, use_tqdm=False, lora_request=adapter)
        answers.append([answer(output) for output in outputs])
    Path(sys.argv[2]).write_text(json.dumps(answers))
