"""An export in the real vLLM, on the CPU: the ids that were trained on go in, and what transformers
answers comes out.

vLLM pins another torch, so it has an environment of its own (`make test-vllm` makes it) and is
reached through experimental/vllm_tpu_deployment/deploy.py alone, as users reach it. The export is
made here by the real command: the shipped model, fine-tuned for some steps on conversations. An
adapter is served by the command that its own card gives; PEFT's answers are the reference.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchprime.checkpoint.adapter.card import VLLM_RANKS
from torchprime.config.compose import assets_dir
from torchprime.data.files.source import SourceSpec
from torchprime.data.rows.read import Row, load_rows
from torchprime.data.templates.choose import resolve_template
from torchprime.data.tokenizer.load import load_tokenizer
from torchprime.data.tokens.completions import Example
from torchprime.data.tokens.conversations import ChatRules, tokenize_chat
from torchprime.generation.with_transformers import generation_samples, generation_settings
from torchprime.training.setup.datasets import question_of

REPO = Path(__file__).resolve().parents[2]
DEPLOY = REPO / "experimental" / "vllm_tpu_deployment" / "deploy.py"
PYTHON = Path(os.environ.get("TORCHPRIME_VLLM_PYTHON") or REPO / ".venv-vllm" / "bin" / "python")
BASE = assets_dir() / "quickstart" / "base"
ENGINE = DEPLOY.parent / "engine.py"
EOS, LIMIT, STEPS = 1, 64, 60
NEW_TOKENS = ["<|im_start|>", "<|im_end|>"]
NEW_IDS = (512, 513)
NAME = "word-problems"
TUNED = "run"  # what an adapter's card calls it: its run

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}: run make test-vllm"),
]


def shipped(name: str, count: int) -> list[dict[str, str]]:
    lines = (assets_dir() / "quickstart" / "data" / name).read_text().splitlines()
    return [json.loads(line) for line in lines[:count]]


def conversations() -> list[list[dict[str, str]]]:
    """Every third with two questions, every fourth with a system's message; odd ones first."""

    def turns(row: dict[str, str]) -> list[dict[str, str]]:
        asked, said = row["question"], row["answer"]
        return [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]

    rows, found = shipped("train.jsonl", 4000), []
    for number, row in enumerate(rows):
        system = [{"role": "system", "content": "Show every step."}] if number % 4 == 0 else []
        more = turns(rows[number - 1]) if number % 3 == 0 else []
        found.append([*system, *more, *turns(row)])
    found[0][-2]["content"] = "  Straße, 東京 and 🙂:\n\n\thow many?  "
    found[1][-2]["content"] = "12 + 30 = <<12+30=\n"
    return found


class Trained(NamedTuple):
    """A run's export and the rows it was trained on."""

    folder: Path
    rows: list[Row]


def train_on_conversations(work: Path, *more: str) -> Trained:
    """The real command, some steps on conversations."""
    path = work / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": m}) + "\n" for m in conversations()))
    command = [sys.executable, "torchprime/torch_xla_models/train.py", "task=sft", "mesh=single"]
    command += ["model=quickstart", "torch_dtype=float32", "task.optimizer.learning_rate=1e-3"]
    command += ["dataset=file", f"dataset.file_dataset_path={path}", "dataset.block_size=256"]
    command += [f"dataset.prepared_dir={work}/prepared", "task.global_batch_size=16"]
    command += [f"task.max_steps={STEPS}", f"output_dir={work}", "run_name=run", *more]
    ended = subprocess.run(command, cwd=REPO, capture_output=True, text=True, env=environment(REPO))
    assert ended.returncode == 0, ended.stderr[-3000:]
    return Trained(work / "run" / "export", load_rows(SourceSpec(file_dataset_path=str(path)), 40))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_on_conversations(tmp_path_factory.mktemp("served"), "dataset.chat_template=zephyr")


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """One whose template is made of tokens that the base does not have: 640 rows for its 512."""
    tokens = json.dumps(NEW_TOKENS)
    return train_on_conversations(
        tmp_path_factory.mktemp("extended"),
        "dataset.chat_template=chatml",
        f"model.add_special_tokens={tokens}",
    )


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The merged model, with the PEFT folder inside."""
    return train_on_conversations(
        tmp_path_factory.mktemp("adapted"),
        "dataset.chat_template=zephyr",
        "adapter=lora",
        "adapter.rank=8",
        "export.adapter=both",
        "task.optimizer.learning_rate=1e-2",
    )


def environment(path: Path | None = None) -> dict[str, str]:
    """Return the environment for a new process, without this process's own settings."""
    ours = ("PYTHONPATH", "XLA_FLAGS", "PJRT_DEVICE", "CPU_NUM_DEVICES", "USE_TORCH_XLA")
    kept = {key: value for key, value in os.environ.items() if key not in ours}
    kept |= {"VLLM_CPU_KVCACHE_SPACE": "1", "TORCH_COMPILE_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    return kept | ({"PYTHONPATH": str(path)} if path else {})


def transformers_answers(
    folder: Path, prompts: list[list[int]], stops: tuple[int, ...] = (EOS,)
) -> list[dict[str, Any]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        {
            "text": tokenizer.decode(ids, skip_special_tokens=True),
            "ended": "stop" if ids[-1] in stops else "length",
            "ids": ids,
            "prompt_ids": prompt,
        }
        for prompt, ids in zip(
            prompts, generation_samples(folder, prompts, stops, LIMIT), strict=True
        )
    ]


def chat_prompts(folder: Path, questions: list[str]) -> list[list[int]]:
    """Return the answers of transformers, with the folder's own template."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
        for text in questions
    ]


# Offline ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def questions() -> list[str]:
    return [row["question"] for row in shipped("test.jsonl", 6)]


def ask_offline(folder: Path, questions: list[str], work: Path, *more: str) -> list[dict[str, Any]]:
    """Run deploy.py and return what it prints."""
    path = work / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in questions))
    command = [str(PYTHON), str(DEPLOY), "--model", str(folder), "--prompts", str(path), *more]
    ended = subprocess.run(
        [*command, "--max-new-tokens", str(LIMIT), "--json"],
        capture_output=True,
        text=True,
        env={**environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "verified: " in ended.stderr and " failed" not in ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.fixture(scope="module")
def answered(trained: Trained, questions: list[str], tmp_path_factory) -> list[dict[str, Any]]:
    """Answers of base and export."""
    work = tmp_path_factory.mktemp("asked")
    return ask_offline(trained.folder, questions, work, "--base", str(BASE))


def test_greedy_text_is_transformers_with_the_chat_template(
    trained: Trained, questions: list[str], answered: list[dict[str, Any]]
) -> None:
    prompts = chat_prompts(trained.folder, questions)
    assert len(prompts) == 6
    found = [record["model"] for record in answered]
    assert found == transformers_answers(trained.folder, prompts)


def test_new_special_tokens_are_single_ids_and_end_the_answer(
    extended: Trained, questions: list[str], tmp_path: Path
) -> None:
    records = ask_offline(extended.folder, questions, tmp_path)
    found = [record["model"] for record in records]
    prompts = chat_prompts(extended.folder, questions)
    start, end = NEW_IDS
    assert all(ids.count(start) == 2 and ids.count(end) == 1 for ids in prompts)
    assert found == transformers_answers(extended.folder, prompts, (EOS, end))
    assert sum(told["ids"][-1] == end for told in found) >= 4
    assert not any(text in told["text"] for told in found for text in NEW_TOKENS)


def test_greedy_text_is_transformers_in_plain_text(
    questions: list[str], answered: list[dict[str, Any]]
) -> None:
    prompts = [AutoTokenizer.from_pretrained(BASE)(text)["input_ids"] for text in questions]
    assert [record["base"] for record in answered] == transformers_answers(BASE, prompts)


def test_the_stop_token_ends_the_answer(answered: list[dict[str, Any]]) -> None:
    stopped = [record["model"] for record in answered if record["model"]["ended"] == "stop"]
    assert len(stopped) >= 4
    for told in stopped:
        assert told["ids"].index(EOS) == len(told["ids"]) - 1 < LIMIT
        assert "</s>" not in told["text"]


# Served -------------------------------------------------------------------------------------------


class Server(NamedTuple):
    port: int
    log: Path

    def ask(self, path: str, **body: Any) -> dict[str, Any]:
        url = f"http://127.0.0.1:{self.port}{path}"
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else {}


@pytest.fixture(scope="module")
def server(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    command = [str(DEPLOY), "--model", str(trained.folder), "--serve", "--name", NAME]
    with running(command, tmp_path_factory.mktemp("server"), environment()) as served:
        yield served


@contextmanager
def running(command: list[str], cwd: Path, settings: dict[str, str]) -> Iterator[Server]:
    """Run a script of vLLM's environment as a server on a free port, until the block ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    served = Server(port, cwd / f"{port}.log")
    with served.log.open("wb") as log:
        process = subprocess.Popen(
            [str(PYTHON), *command, "--port", str(port)],
            stdout=log,
            stderr=log,
            env=settings,
            cwd=cwd,
            start_new_session=True,
        )
    try:
        _wait_for(served, process)
        yield served
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def _wait_for(served: Server, process: subprocess.Popen) -> None:
    for _ in range(300):
        try:
            served.ask("/health")
            return
        except OSError:
            assert process.poll() is None, served.log.read_text()[-3000:]
            time.sleep(1)
    raise AssertionError(served.log.read_text()[-3000:])


def test_the_api_answers_on_this_machine_alone(server: Server) -> None:
    assert [model["id"] for model in server.ask("/v1/models")["data"]] == [NAME]
    with socket.socket() as other, pytest.raises(ConnectionRefusedError):
        other.connect(("127.0.0.2", server.port))


def test_chat_prompts_have_the_ids_that_were_trained_on(server: Server, trained: Trained) -> None:
    """Up to the answer, for single questions and histories, with and without a system's message."""
    tokenizer = load_tokenizer(trained.folder)
    template = resolve_template(None, tokenizer)
    assert template is not None
    examples = tokenize_chat(trained.rows, tokenizer, template, ChatRules("last_assistant"))
    lengths = set()
    for row, example in zip(trained.rows, examples, strict=True):
        assert isinstance(example, Example)
        asked = example.ids[: example.supervised.argmax()].tolist()
        assert asked == question_of(row, tokenizer, template).ids
        messages = [message.template for message in row.messages[:-1]]
        told = server.ask(
            "/v1/chat/completions",
            model=NAME,
            messages=messages,
            max_tokens=1,
            temperature=0,
            return_token_ids=True,
        )
        assert told["prompt_token_ids"] == asked
        lengths.add(len(row.messages))
    assert lengths == {2, 3, 4, 5}


def test_served_answers_are_the_offline_ones(
    server: Server, questions: list[str], answered: list[dict[str, Any]]
) -> None:
    for text, record in zip(questions, answered, strict=True):
        told = server.ask(
            "/v1/chat/completions",
            model=NAME,
            messages=[{"role": "user", "content": text}],
            max_tokens=LIMIT,
            temperature=0,
        )
        (choice,) = told["choices"]
        assert choice["message"]["content"] == record["model"]["text"]
        assert choice["finish_reason"] == record["model"]["ended"]


# Adapters -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter_server(adapted: Trained, tmp_path_factory) -> Iterator[Server]:
    """`vllm serve` as the adapter's card has it, in a copy of the adapter's folder alone."""
    folder = tmp_path_factory.mktemp("served-adapter") / "adapter"
    shutil.copytree(adapted.folder / "adapter", folder)
    card = (folder / "README.md").read_text()
    line = card[card.index("vllm serve ") :].split("\n```")[0].replace("\\\n", " ")
    settings = environment() | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    command = [str(ENGINE), *shlex.split(line)[1:]]
    assert command[1:3] == ["serve", str(BASE)] and "--enable-lora" in command
    with running(command, folder, settings) as served:
        yield served


def ask_ids(server: Server, model: str, questions: list[str]) -> list[dict[str, Any]]:
    """Return prompts and greedy answers, as token ids."""
    found, settings = [], {"max_tokens": LIMIT, "temperature": 0, "return_token_ids": True}
    for text in questions:
        asked = [{"role": "user", "content": text}]
        told = server.ask("/v1/chat/completions", model=model, messages=asked, **settings)
        (choice,) = told["choices"]
        found.append({"prompt_ids": told["prompt_token_ids"], "ids": choice["token_ids"]})
    return found


def peft_answers(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Return the greedy tokens of PEFT's model, a prompt at a time."""
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, str(folder))
    assert model.peft_config["default"].r == 8
    model.generation_config = generation_settings([EOS], LIMIT)
    with torch.no_grad():
        outputs = [model.generate(input_ids=torch.tensor([ids])) for ids in prompts]
    return [output[0, len(ids) :].tolist() for output, ids in zip(outputs, prompts, strict=True)]


def test_an_adapter_served_as_its_card_says_gives_the_tokens_of_peft(
    adapter_server: Server, adapted: Trained, questions: list[str]
) -> None:
    """The base answers beside it, as it is without an adapter."""
    folder = adapted.folder / "adapter"
    prompts = chat_prompts(folder, questions)
    ids = peft_answers(folder, prompts)
    expected = [{"prompt_ids": p, "ids": each} for p, each in zip(prompts, ids, strict=True)]
    assert ask_ids(adapter_server, TUNED, questions) == expected
    of_base = [told["ids"] for told in ask_ids(adapter_server, str(BASE), questions)]
    assert of_base == generation_samples(BASE, prompts, (EOS,), LIMIT)
    assert all(one != other for one, other in zip(of_base, ids, strict=True))


def test_a_merged_adapter_gives_the_tokens_of_transformers(
    adapted: Trained, questions: list[str], tmp_path: Path
) -> None:
    records = ask_offline(adapted.folder, questions, tmp_path)
    prompts = chat_prompts(adapted.folder, questions)
    found = [record["model"] for record in records]
    assert found == transformers_answers(adapted.folder, prompts)
    assert [told["ids"] for told in found] == peft_answers(adapted.folder / "adapter", prompts)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"use_dora": True}, "does not yet support DoRA"),
        ({"modules_to_save": ["lm_head"]}, "only supports modules_to_save being either None"),
        ({"r": 9}, "LoRA rank 9 is greater than max_lora_rank 8"),
    ],
)
def test_an_adapter_that_the_card_says_is_not_served_is_refused(
    adapter_server: Server,
    adapted: Trained,
    tmp_path: Path,
    changed: dict[str, Any],
    expected: str,
) -> None:
    shutil.copytree(adapted.folder / "adapter", tmp_path / "other")
    path = tmp_path / "other" / "adapter_config.json"
    content = json.loads(path.read_text())
    assert set(changed) <= set(content)
    path.write_text(json.dumps(content | changed))
    with pytest.raises(urllib.error.HTTPError) as refused:
        adapter_server.ask(
            "/v1/load_lora_adapter", lora_name="other", lora_path=str(tmp_path / "other")
        )
    assert expected in refused.value.read().decode()


def test_the_ranks_of_adapters_cards_are_those_of_vllm() -> None:
    code = "from vllm.config.lora import MaxLoRARanks as R; print(*R.__args__)"
    command = [str(PYTHON), "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
    ranks = [int(rank) for rank in ended.stdout.splitlines()[-1].split()]
    assert [rank for rank in ranks if rank > 1] == list(VLLM_RANKS)
