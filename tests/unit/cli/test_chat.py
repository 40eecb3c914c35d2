"""`torchprime chat`: what it prints of two models, how it is talked to, and how it ends."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from torchprime.cli.main import main
from torchprime.config.compose import assets_dir
from torchprime.data.tokenizer.load import load_tokenizer
from torchprime.generation.prompts import as_question
from torchprime.generation.with_transformers import generation_samples

BASE = assets_dir() / "quickstart" / "base"
PROMPTS = ["Ben has 8 stamps. Kate has 34 more.", "There are 3 books in a box."]
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
LIMIT = 24
Chat = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_TORCH_XLA", "1")  # put back on leaving, whatever main makes of it
    monkeypatch.setenv("COLUMNS", "60")


@pytest.fixture
def chat(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Chat:
    """Run the command, with stdin from a pipe; its exit code, what it answered, what it noted."""

    def run(*argv: object, typed: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        capsys.readouterr()
        code = main(["chat", *(str(each) for each in argv), "--max-new-tokens", str(LIMIT)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return code, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with other weights and a chat template."""
    folder = Path(shutil.copytree(BASE, tmp_path_factory.mktemp("tuned") / "export"))
    torch.manual_seed(0)
    weights = load_file(BASE / "model.safetensors")
    noisy = {name: tensor + 0.02 * torch.randn(tensor.shape) for name, tensor in weights.items()}
    save_file(noisy, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


def greedy(folder: Path, text: str) -> str:
    """transformers' answer; BOS goes in front of a prompt, and not of what a template made."""
    tokenizer = load_tokenizer(folder)
    made = text.endswith("assistant: ")
    prompt = tokenizer.encode_ids([text])[0] if made else tokenizer.prompt_ids(text)
    (ids,) = generation_samples(folder, [prompt], [tokenizer.eos_id], LIMIT)
    return tokenizer.decode(ids)


@pytest.fixture(scope="module")
def adapter(tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A PEFT folder of `tuned`, and a copy of `tuned` that has it merged."""
    merged = Path(shutil.copytree(tuned, tmp_path_factory.mktemp("merged") / "merged"))
    folder = Path(shutil.copytree(tuned, tmp_path_factory.mktemp("adapter") / "adapter"))
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    weights = load_file(tuned / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    outputs, inputs = weights[f"{name}.weight"].shape
    generator = torch.Generator().manual_seed(2)
    b = torch.randn(outputs, 2, generator=generator)
    a = torch.randn(2, inputs, generator=generator)
    weights[f"{name}.weight"] += b @ a
    save_file(weights, merged / "model.safetensors", metadata={"format": "pt"})
    module = f"base_model.model.{name}"
    stored = {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    save_file(stored, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [name]}
    config["base_model_name_or_path"] = str(tuned)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder, merged


def test_an_adapter_answers_with_its_base(
    chat: Chat, adapter: tuple[Path, Path], tuned: Path
) -> None:
    folder, merged = adapter
    code, answered, _ = chat("--model", folder, "--prompt", PROMPTS[0], "--json")
    wanted = greedy(merged, rendered(PROMPTS[0]))
    assert code == 0 and json.loads(answered)["model"]["text"] == wanted
    assert wanted != greedy(tuned, rendered(PROMPTS[0]))


def rendered(*turns: str) -> str:
    """CHAT written out for user and assistant in turns."""
    roles = ("user", "assistant")
    said = [f"{roles[place % 2]}: {text}</s>\n" for place, text in enumerate(turns)]
    return "".join(said) + "assistant: "


def squeezed(text: str) -> str:
    return re.sub(r"\s+", "", text)


# Prompts that are given ---------------------------------------------------------------------------


def test_one_prompt_to_one_model(chat: Chat) -> None:
    code, answered, noted = chat("--model", BASE, "--prompt", PROMPTS[0])
    assert code == 0
    assert answered == f"{greedy(BASE, PROMPTS[0])} [cut off after {LIMIT} tokens]\n"
    assert "plain text, no chat template" in noted


def test_a_file_to_two_models_as_json(chat: Chat, tuned: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    code, answered, noted = chat("--model", tuned, "--base", BASE, "--prompts", path, "--json")
    assert code == 0
    records = [json.loads(line) for line in answered.splitlines()]
    assert [record["prompt"] for record in records] == PROMPTS
    for record in records:  # each on its own: no history of the one before
        assert record["base"]["text"] == greedy(BASE, record["prompt"])
        assert record["model"]["text"] == greedy(tuned, rendered(record["prompt"]))
        assert record["model"]["tokens"] <= LIMIT and record["model"]["ended"] == "limit"
    assert "chat template (tokenizer's own)" in noted and "plain text" in noted


def test_side_by_side_where_the_terminal_is_wide(chat: Chat, tuned: Path, monkeypatch) -> None:
    asked = ["--model", tuned, "--base", BASE, "--prompt", PROMPTS[0]]
    left, right = greedy(BASE, PROMPTS[0]), greedy(tuned, rendered(PROMPTS[0]))
    code, below, _ = chat(*asked)
    assert code == 0
    assert below.index("base:\n") < below.index(left) < below.index("model:\n") < below.index(right)
    monkeypatch.setenv("COLUMNS", "90")
    code, wide, _ = chat(*asked)
    rows = [line.ljust(90) for line in wide.splitlines()]
    assert max(map(len, rows)) == 90
    assert rows[0].split() == ["base", "|", "model"]
    columns = ["".join(row[part] for row in rows[2:]) for part in (slice(43), slice(46, None))]
    mark = f"[cut off after {LIMIT} tokens]"
    assert [squeezed(column) for column in columns] == [
        squeezed(left + mark),
        squeezed(right + mark),
    ]


def test_questions_are_worded_as_in_training(chat: Chat) -> None:
    _, answered, _ = chat("--model", BASE, "--prompt", "How many?", "--as-question", "--json")
    record = json.loads(answered)
    assert record["prompt"] == as_question("How many?")
    assert record["model"]["text"] == greedy(BASE, as_question("How many?"))


# Typed prompts ------------------------------------------------------------------------------------


def test_typed_prompts_have_a_history_until_it_is_reset(chat: Chat, tuned: Path) -> None:
    typed = f"{PROMPTS[0]}\n\n{PROMPTS[1]}\n/reset\n{PROMPTS[1]}\n/what\n/quit\nnever asked\n"
    code, answered, noted = chat("--model", tuned, "--json", typed=typed)
    assert code == 0
    first, second, third = [json.loads(line)["model"]["text"] for line in answered.splitlines()]
    assert first == greedy(tuned, rendered(PROMPTS[0]))
    assert second == greedy(tuned, rendered(PROMPTS[0], first, PROMPTS[1]))
    assert third == greedy(tuned, rendered(PROMPTS[1]))
    assert "forgotten" in noted and "there is no /what" in noted


def test_a_prompt_that_is_too_long_does_not_end_the_session(chat: Chat, tuned: Path) -> None:
    typed = f"{PROMPTS[0] * 60}\n{PROMPTS[1]}\n"
    code, answered, noted = chat("--model", tuned, "--base", BASE, "--json", typed=typed)
    assert code == 0
    (record,) = [json.loads(line) for line in answered.splitlines()]
    assert record["model"]["text"] == greedy(tuned, rendered(PROMPTS[1]))
    assert re.search(r"error: base: the prompt has [\d,]+ tokens; .*context of 512", noted)


def test_old_turns_are_left_out_with_a_word_on_it(chat: Chat, tuned: Path) -> None:
    code, _, noted = chat("--model", tuned, typed=f"{PROMPTS[0] * 20}\n{PROMPTS[1] * 20}\n")
    assert code == 0
    assert "note: model: the oldest turn no longer fit" in noted


# Mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model", "no/such/folder/x"], "There is no local folder no/such/folder/x"),
        (["--model", assets_dir()], "There is no config.json in"),
        (["--model", BASE, "--prompts", "nowhere.txt"], "there is no file nowhere.txt"),
        (["--model", BASE, "--system", "Be brief."], "--system: .* has no chat template"),
        (["--model", BASE, "--prompt", "a", "--prompts", "b"], "not allowed with argument"),
        (["--model", BASE, "--temperature", "-1"], "-1 is not 0"),
        (["--model", BASE, "--max-new", "3"], "unrecognized arguments"),
        (["--model", BASE, "--prompt", PROMPTS[0] * 60], "error: model: the prompt has"),
    ],
)
def test_a_mistake_is_one_message(chat: Chat, argv: list[object], said: str) -> None:
    code, answered, noted = chat(*argv)
    assert (code, answered) == (2, "")
    assert re.search(said, noted), noted


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_message(chat: Chat) -> None:
    code, _, noted = chat("--model", BASE, "--prompt", "a", "--device", "cuda")
    assert code == 2 and "sees no CUDA device here. Use --device cpu" in noted


# A terminal ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that talks on for minutes."""
    folder = tmp_path_factory.mktemp("endless")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_hidden_layers=1,
        max_position_embeddings=10**6,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, folder)
    return folder


class Terminal:
    """The command as a person has it: keys go in, a screen comes out."""

    def __init__(self, *argv: str) -> None:
        self.screen, self.ours = "", 0
        theirs: int
        self.ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "torchprime.cli.main", "chat", *argv]

        def take() -> None:
            os.close(os.open(os.ttyname(theirs), os.O_RDWR))  # ours now
            # A shell that starts tests in the background has Ctrl-C ignored, and that is inherited.
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=take,
            env={**os.environ, "TERM": "dumb"},
        )
        os.close(theirs)

    def keys(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def until(self, pattern: str, patience: float = 120.0) -> str:
        """Return the screen's text through the match of `pattern`, and remove it there."""
        end = time.monotonic() + patience
        while not (found := re.search(pattern, self.screen)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.screen[-2000:]!r}"
            if select.select([self.ours], [], [], 1.0)[0]:
                self.screen += os.read(self.ours, 65536).decode(errors="replace")
        shown, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return shown

    def interrupt_until(self, pattern: str) -> None:
        """Python's readline overlooks a Ctrl-C that comes just before it begins to wait for keys:
        as a person would, press it again."""
        for _ in range(60):
            self.keys("\x03")
            with suppress(AssertionError):
                self.until(pattern, patience=2.0)
                return
        raise AssertionError(self.screen)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self.ours)


@pytest.fixture
def terminal(endless: Path) -> Iterator[Terminal]:
    opened = Terminal("--model", str(endless), "--max-new-tokens", "900000")
    yield opened
    opened.close()


def test_ctrl_c_stops_the_answer_and_ctrl_d_leaves(terminal: Terminal) -> None:
    terminal.until("> ")
    for _ in range(2):
        terminal.keys("Ben has\n")
        terminal.until("Ben has\r\n..........")
        terminal.keys("\x03")
        terminal.until(r"\[stopped\]\r\n> ")
    terminal.interrupt_until(r"Ctrl-D or /quit leaves\)\r\n> ")  # while nothing is being made
    terminal.keys("/reset\n")
    terminal.until("forgotten\r\n> ")
    terminal.keys("\x04")
    assert terminal.process.wait(30) == 0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a\udcff", "character 2 is the byte 0xff"),
        ("\ud83d!", r"character 1 is U\+D83D, half of a character"),
    ],
)
def test_text_that_is_no_unicode_is_one_line(
    chat: Chat, tuned: Path, tmp_path: Path, text: str, found: str
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": text}) + "\n")
    for arguments in (["--prompt", text], ["--prompts", str(prompts)]):
        code, answered, noted = chat("--model", str(tuned), *arguments)
        assert code == 2 and not answered
        assert re.search(f"^error: .*no Unicode text: {found}", noted, re.MULTILINE), noted
        assert noted.count("error") == 1


def test_bytes_that_are_no_unicode_in_a_pipe_are_one_line(tuned: Path) -> None:
    command = [sys.executable, "-m", "torchprime.cli.main", "chat", "--model", str(tuned)]
    done = subprocess.run(
        [*command, "--max-new-tokens", "1"], input=b"a\xff\n", capture_output=True
    )
    told = done.stderr.decode()
    assert "error: the prompt is no Unicode text: character 2 is the byte 0xff" in told
    assert "Traceback" not in told and not done.stdout
