"""`torchprime lm-eval`: its numbers are those worked out by hand from the model's own logits."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from torchprime.checkpoint.hf.export_facts import ExportFacts
from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.checkpoint.hf.write import tensor_hash
from torchprime.checkpoint.proof.certificate import certify
from torchprime.checkpoint.proof.recheck import recheck
from torchprime.cli.main import main
from torchprime.config.compose import assets_dir
from torchprime.data.tokenizer.load import load_tokenizer
from torchprime.generation.with_transformers import generation_samples

Run = Callable[..., subprocess.CompletedProcess]
REPO = Path(__file__).resolve().parents[3]
BASE = assets_dir() / "quickstart" / "base"
# A Python that has the harness: this one, or one that is named.
PYTHON = os.environ.get("TORCHPRIME_LM_EVAL_PYTHON")
HERE = importlib.util.find_spec("lm_eval") is not None
LIMIT, NEW = 24, 8
# Sums, of which the base gets some right.
SUMS = [(17 * n % 90, 23 * n % 80 + 7) for n in range(1, 31)]

TASK = {
    "dataset_path": "json",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "metadata": {"version": 3},
}
FIRST_NUMBER = [
    {"function": "regex", "regex_pattern": "([0-9]+)"},
    {"function": "take_first"},
]
GENERATED = {
    "output_type": "generate_until",
    "generation_kwargs": {"until": ["."], "max_gen_toks": NEW, "do_sample": False},
    "filter_list": [{"name": "number", "filter": FIRST_NUMBER}],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
LIKELIHOOD = {
    "output_type": "loglikelihood",
    "doc_to_target": " {{answer}}",
    "metric_list": [
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}
    ],
}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_TORCH_XLA", "1")  # put back on leaving, whatever main makes of it


@pytest.mark.skipif(HERE, reason="lm-eval is installed")
def test_without_the_harness_the_message_says_what_to_install(capsys) -> None:
    assert main(["lm-eval", str(BASE), "--tasks", "gsm8k"]) == 2
    assert "pip install 'torchprime[lm-eval]'" in capsys.readouterr().err


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The command, in the Python that has the harness, with two tasks over sums."""
    if PYTHON is None and not HERE:
        pytest.skip("no lm-eval here; TORCHPRIME_LM_EVAL_PYTHON may name a python that has it")
    folder = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps({"question": question(p), "answer": str(sum(p))}) + "\n" for p in SUMS]
    (folder / "rows.jsonl").write_text("".join(lines))
    data = {"dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    for name, more in (("sums_generated", GENERATED), ("sums_likelihood", LIKELIHOOD)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **TASK, **data, **more}))

    def run(*argv: object) -> subprocess.CompletedProcess:
        python = PYTHON or sys.executable
        command = [python, "-m", "torchprime.cli.main", "lm-eval", *map(str, argv)]
        return subprocess.run(
            [*command, "--include-path", str(folder)],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"},
        )

    return run


def question(pair: tuple[int, int]) -> str:
    return f"Ben has some. {pair[0]} + {pair[1]} ="


@pytest.mark.slow
def test_the_numbers_are_those_worked_out_by_hand(harness: Run, tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    tasks = "sums_generated,sums_likelihood"
    ended = harness(BASE, "--tasks", tasks, "--limit", LIMIT, "--out", out)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    results = found["results"]
    right = share_of_right_sums()
    assert 0.1 < right < 0.95
    assert results["sums_generated"]["exact_match,number"] == pytest.approx(right, 1e-6)
    assert results["sums_likelihood"]["perplexity,none"] == pytest.approx(perplexity(), 1e-4)
    assert found["certificate"] is None
    assert found["settings"]["apply_chat_template"] is False
    assert found["num_samples"]["sums_generated"] == {"original": len(SUMS), "effective": LIMIT}
    assert found["task_versions"] == {"sums_generated": 3, "sums_likelihood": 3}
    assert {"torchprime", "torch", "transformers", "lm_eval", "datasets"} <= set(found["versions"])
    assert re.search(rf"sums_generated +exact_match \(number\) +{right:.4f} ± ", ended.stdout)
    assert f"wrote {out}" in ended.stdout and f"the first {LIMIT} rows only" in ended.stdout


def share_of_right_sums() -> float:
    tokenizer = load_tokenizer(BASE)
    pairs = SUMS[:LIMIT]
    prompts = [tokenizer.prompt_ids(question(pair)) for pair in pairs]
    answers = generation_samples(BASE, prompts, [tokenizer.eos_id], NEW)
    said = [re.search("[0-9]+", tokenizer.decode(ids).partition(".")[0]) for ids in answers]
    right = [s is not None and int(s[0]) == a + b for s, (a, b) in zip(said, pairs, strict=True)]
    return sum(right) / len(right)


def perplexity() -> float:
    """exp of the mean over rows of minus the answer's log likelihood, from the logits."""
    tokenizer = load_tokenizer(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    total = 0.0
    for pair in SUMS[:LIMIT]:
        prompt = tokenizer.prompt_ids(question(pair))
        ids = tokenizer.prompt_ids(f"{question(pair)} {sum(pair)}")
        assert ids[: len(prompt)] == prompt
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]])).logits[0].double()
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
        total += chosen[len(prompt) - 1 :].sum().item()
    return math.exp(-total / LIMIT)


@pytest.mark.slow
def test_an_export_is_asked_in_its_template_and_named_by_its_certificate(
    harness: Run, tmp_path: Path
) -> None:
    """The result lies beside it, where it does not make the certificate wrong."""
    folder = Path(shutil.copytree(BASE, tmp_path / "run" / "export"))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    facts = ExportFacts(
        spec={}, dtype=torch.float32, max_shard_bytes=1, stop_ids=(1,), base_model="b", step=5
    )
    reader = SafetensorsReader(folder)
    hashes = {name: tensor_hash(reader.get(name)) for name in reader.names()}
    certify(folder, hashes, facts=facts, origin="a test", trained="not compared", base="not here")
    ended = harness(folder, "--tasks", "sums_generated", "--limit", 2)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads((tmp_path / "run" / "lm_eval.json").read_text())
    assert found["settings"]["apply_chat_template"] is True
    sha256 = hashlib.sha256((folder / "certificate.json").read_bytes()).hexdigest()
    assert found["certificate"] == {"sha256": sha256, "passed": True, "base_model": "b", "step": 5}
    assert not [check for check in recheck(folder)[1] if check.passed is False]
    again = harness(folder, "--tasks", "sums_generated")
    assert again.returncode == 2 and "lm_eval.json exists already" in again.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--tasks", "gsm8kk"], "lm-eval knows no task gsm8kk; did you mean .*gsm8k"),
        (["--tasks", "sums_generated", "--chat-template", "yes"], "--chat-template yes: .* none"),
        (["--tasks", "gsm8k", "--limit", "1"], "could not evaluate gsm8k .*HF_HUB_OFFLINE"),
    ],
)
def test_a_mistake_is_one_message(harness: Run, tmp_path: Path, argv: list, said: str) -> None:
    ended = harness(BASE, *argv, "--out", tmp_path / "out.json")
    assert ended.returncode == 2, ended.stderr[-3000:]
    assert re.search(said, ended.stderr, re.DOTALL), ended.stderr[-3000:]
    assert "Traceback" not in ended.stderr and not (tmp_path / "out.json").exists()
