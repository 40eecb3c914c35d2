"""Exports of every family are read alike by transformers 4.57, transformers 5 and vLLM.

The models are tiny and random (tiny_exports.py). The reference is transformers 5 on the source,
before the export: its logits, and its greedy tokens with their log-probabilities.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from other_python import VLLM, VLLM_SETTINGS, run_worker
from safetensors import safe_open
from tiny_exports import EXPORTS, NEWER, PROMPTS, TOKENS, Source, load_source, make_sources

HERE = Path(__file__).parent
# A folder of packages, of make transformers4.
OLDER = Path(os.environ.get("TORCHPRIME_TRANSFORMERS4") or Path(sys.prefix) / "transformers4")

pytestmark = pytest.mark.timeout(900)


class Expected(NamedTuple):
    """Logits [tokens, V] of a source for a prompt with its continuation, and the continuation."""

    logits: torch.Tensor
    ids: list[int]  # TOKENS greedy ones after the prompt


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    return make_sources(tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="module")
def expected(sources: dict[str, Source]) -> dict[str, list[Expected]]:
    return {name: of_source(load_source(name, source)) for name, source in sources.items()}


def of_source(model: Any) -> list[Expected]:
    """Return logits of each prompt with its greedy continuation, without a cache."""
    found = []
    with torch.no_grad():
        for prompt in PROMPTS:
            ids = list(prompt)
            for _ in range(TOKENS):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            logits = model(input_ids=torch.tensor([ids])).logits[0]
            found.append(Expected(logits, ids[len(prompt) :]))
    return found


def write_request(work: Path, sources: dict[str, Source]) -> Path:
    path = work / "request.json"
    folders = {name: str(source.export) for name, source in sources.items()}
    path.write_text(json.dumps({"prompts": PROMPTS, "tokens": TOKENS, "folders": folders}))
    return path


# transformers 4.57 --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def older(sources: dict[str, Source], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Logits of every export in transformers 4.57, which has packages of its own on the path."""
    work = tmp_path_factory.mktemp("older")
    known = {name: source for name, source in sources.items() if name not in NEWER}
    request, out = write_request(work, known), work / "logits.safetensors"
    settings = {"PYTHONPATH": str(OLDER), "USE_TORCH_XLA": "0"}
    worker = HERE / "transformers_worker.py"
    run_worker(sys.executable, worker, request, out, work=work, settings=settings)
    return safe_open(out, framework="pt")


@pytest.mark.slow
@pytest.mark.skipif(not OLDER.is_dir(), reason=f"no {OLDER}: run make test-transformers4")
@pytest.mark.parametrize("name", [name for name in EXPORTS if name not in NEWER])
def test_transformers_4_57_gives_the_logits_of_the_source(
    name: str, older: Any, expected: dict[str, list[Expected]]
) -> None:
    notes = older.metadata()
    assert notes["version"].startswith("4.57.") and name not in notes, notes
    for number, truth in enumerate(expected[name]):
        found = older.get_tensor(f"{name}/{number}")
        theirs = truth.logits[: len(PROMPTS[number])]
        assert (found - theirs).abs().max() <= 1e-6 * theirs.abs().max()


# vLLM ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(
    sources: dict[str, Source], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """Greedy continuations of every export by vLLM."""
    work = tmp_path_factory.mktemp("engine")
    request, out = write_request(work, sources), work / "results.json"
    run_worker(VLLM, HERE / "vllm_worker.py", request, out, work=work, settings=VLLM_SETTINGS)
    return json.loads(out.read_text())


# By vLLM, with its message.
REFUSED = {"qwen2_window": "Sliding window for some but all layers is not supported"}


@pytest.mark.vllm
@pytest.mark.skipif(not VLLM.exists(), reason=f"no {VLLM}: run make test-vllm")
@pytest.mark.parametrize("name", EXPORTS)
def test_vllm_gives_the_tokens_and_probabilities_of_the_source(
    name: str, engine: dict[str, list[dict[str, Any]]], expected: dict[str, list[Expected]]
) -> None:
    if name in REFUSED:
        assert REFUSED[name] in str(engine[name])
        return
    assert "refused" not in engine[name], engine[name]
    for prompt, found, truth in zip(PROMPTS, engine[name], expected[name], strict=True):
        assert found["ids"] == truth.ids
        all_ids = torch.tensor([*prompt, *truth.ids])
        theirs = truth.logits.log_softmax(-1)[:-1].gather(-1, all_ids[1:, None])[:, 0]
        ours = torch.tensor([*found["prompt_logprobs"], *found["logprobs"]])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
