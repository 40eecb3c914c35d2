"""`torchprime chat --model EXPORT [--base BASE]`: answers of a model and of its base.

Prompts are typed, given with --prompt, or read from a file or a pipe. Both models get the same
prompts, each with its own chat template (or as plain text, if its folder has none) and its own
history. Notes go to stderr, answers to stdout. torchprime/generation/conversation.py generates the
answers.

One model streams its answer. With two models side by side, the base answers first; then each line
is printed as soon as the fine-tuned model has finished it.
"""

from __future__ import annotations

import argparse
import io
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from torchprime.checkpoint.adapter.load import resolve_model
from torchprime.checkpoint.proof.certificate import CERTIFICATE, read_certificate
from torchprime.cli.shared.arguments import make_parser, positive, run_command
from torchprime.cli.shared.columns import beside, column_width, wrap
from torchprime.config.paths import local_path, name_or_folder
from torchprime.errors import CheckpointError, ConfigError, DataError, RuntimeSetupError
from torchprime.generation.conversation import (
    CONTEXT_FULL,
    INTERRUPTED,
    LIMIT,
    Conversation,
    Reply,
    Sampling,
    Show,
    Speaker,
)
from torchprime.generation.prompts import as_question, read_prompts, require_unicode
from torchprime.text.terminal import print_json, print_lines, print_text, say, shown, tick

DEVICES = ("auto", "cpu", "cuda")
BASE, TUNED = "base", "model"

Done = Callable[[Reply], None]  # shows the end of an answer

HELP = """\
/reset  clear the conversation (both models)
/quit   leave (also Ctrl-D)
Ctrl-C  stops the answer"""
EPILOG = f"""\
Without --prompt or --prompts, prompts are read from the terminal or a pipe, a line each:
{HELP}
If the folder has a chat template, it renders each prompt with the history. Without one, the model
continues each prompt by itself, as plain text.
"""


def chat_main(argv: list[str]) -> int:
    """Run `chat` with the arguments after it; return the exit code."""
    parser = make_parser(
        "torchprime chat", "Send prompts to a model, and to its base for comparison.", EPILOG
    )
    add = parser.add_argument
    add("--model", metavar="EXPORT", required=True, help="folder or hub name")
    add("--base", metavar="BASE", help="a second model, which answers the same prompts")
    given = parser.add_mutually_exclusive_group()
    given.add_argument("--prompt", metavar="TEXT", help="answer this prompt and exit")
    given.add_argument(
        "--prompts",
        metavar="FILE",
        help='answer each line, or in .jsonl each "prompt" or "question", separately, and exit',
    )
    add(
        "--as-question",
        action="store_true",
        help="format each prompt like the training rows with question and answer",
    )
    add("--system", metavar="TEXT", help="the system message; needs a chat template")
    add("--max-new-tokens", type=positive, default=256, metavar="N", help="default: 256")
    add("--temperature", type=_temperature, default=0.0, metavar="T", help="default: 0, greedy")
    add("--seed", type=int, default=0, metavar="N", help="seed of sampling (default: 0)")
    add("--device", choices=DEVICES, default="auto", help="auto: cuda if there is one, else cpu")
    add("--json", action="store_true", help="print one JSON object for each prompt")
    return run_command(parser, argv, _chat)


def _temperature(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not 0 (greedy) or more")
    return value


# Models -------------------------------------------------------------------------------------------


def _chat(given: argparse.Namespace) -> int:
    prompts = None if given.prompt is None else [given.prompt]
    if given.prompts is not None:
        prompts = read_prompts(local_path("--prompts", given.prompts))
    device = choose_device(given.device)
    folders = {} if given.base is None else {BASE: name_or_folder("--base", given.base)}
    folders[TUNED] = name_or_folder("--model", given.model)
    found = {title: resolve_model(name) for title, name in folders.items()}
    _tell_certificate(found[TUNED], given.base)
    speakers = {title: Speaker(folder, device) for title, folder in found.items()}
    if given.system is not None and all(s.template is None for s in speakers.values()):
        raise ConfigError(
            f"--system: {given.model} has no chat template, so there is no place for a system's "
            "message. Leave it out, or write it into the prompt"
        )
    if given.system is not None:
        require_unicode(given.system, "--system")
    for title, speaker in speakers.items():
        say(_described(title, speaker, given.system))
    sampling = Sampling(given.max_new_tokens, given.temperature, given.seed)
    asker = _Asker(speakers, given.system, sampling, given.json, given.as_question)
    if prompts is None:
        return _interactive(asker)
    for number, prompt in enumerate(prompts, start=1):
        asker.check(prompt, f"prompt {number}: " if len(prompts) > 1 else "")
    for prompt in prompts:
        asker.reset()
        if len(prompts) > 1 and not given.json:
            print_lines([f"> {prompt}"], "replace")
        asker.ask(prompt)
        if len(prompts) > 1 and not given.json:
            print_lines([""], "replace")
    return 0


def choose_device(wanted: str) -> torch.device:
    """Return the device that --device names.

    Raises:
        RuntimeSetupError: cuda is requested but not available.
    """
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise RuntimeSetupError(
            f"--device cuda: torch {torch.__version__} sees no CUDA device here. Use --device cpu, "
            "or install a torch for CUDA on a machine with a GPU"
        )
    return torch.device("cuda" if wanted == "cuda" or (wanted == "auto" and there) else "cpu")


def _tell_certificate(folder: Path, base: str | None) -> None:
    """Print the certificate's results for an export, without checking it again."""
    if not (folder / CERTIFICATE).is_file():
        return
    try:
        certificate = read_certificate(folder)
    except CheckpointError as error:
        say(f"note: {error}")
        return
    if certificate.failed:
        told = ", ".join(check.name for check in certificate.failed)
        say(f"note: the certificate of {folder} has failed checks ({told}): torchprime verify")
    if base is None and certificate.base_model is not None:
        say(f"note: to compare with its base: --base {certificate.base_model}")


def _described(title: str, speaker: Speaker, system: str | None) -> str:
    how = f"chat template ({speaker.template.name})" if speaker.template else "plain text"
    if speaker.template is None:
        how += ", no chat template in the folder: prompts have no history"
        how += ", --system does not reach it" if system is not None else ""
    return f"{title:<5} {speaker.folder}: {how}; {speaker.device}"


# Asking -------------------------------------------------------------------------------------------


@dataclass
class _Asker:
    """An object that sends each prompt to all models and prints their answers."""

    speakers: dict[str, Speaker]
    system: str | None
    sampling: Sampling
    as_json: bool
    as_question: bool
    asked: int = 0

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.conversations = {
            title: Conversation(speaker, self.system) for title, speaker in self.speakers.items()
        }

    def _worded(self, prompt: str) -> str:
        return as_question(prompt) if self.as_question else prompt

    def check(self, prompt: str, where: str = "") -> None:
        """Raise the errors of `ask` for this prompt before anything is computed."""
        require_unicode(prompt, where.rstrip(": ") or "the prompt")
        for title, conversation in self.conversations.items():
            try:
                conversation.prepare(self._worded(prompt), self.sampling.max_new_tokens)
            except DataError as error:
                raise DataError(f"{where}{title}: {error}") from None

    def ask(self, prompt: str, interruptible: bool = False) -> None:
        """Print every model's answer.

        Raises:
            DataError: a prompt that cannot be sent; it is not added to the history.
        """
        self.check(prompt)
        # A repeated prompt may be sampled differently; --base changes no answer of the model.
        sampling = replace(self.sampling, seed=self.sampling.seed + self.asked)
        self.asked += 1
        replies: dict[str, Reply] = {}
        for title, conversation, show, done in self._places():
            reply = conversation.ask(self._worded(prompt), sampling, show, interruptible)
            done(reply)
            replies[title] = reply
        for title, reply in replies.items():
            if reply.left_out and not self.as_json:
                turns = "turn" if reply.left_out == 1 else f"{reply.left_out} turns"
                say(f"note: {title}: the oldest {turns} no longer fit the context: left out")
        if self.as_json:
            told = {title: _as_object(reply) for title, reply in replies.items()}
            print_json({"prompt": self._worded(prompt), **told})

    def _places(self) -> Iterator[tuple[str, Conversation, Show, Done]]:
        """Return each conversation with its output functions: for each piece, and at the end."""
        width = column_width(shutil.get_terminal_size().columns, len(self.conversations))
        columns = _Columns(list(self.conversations), width) if width else None
        for title, conversation in self.conversations.items():
            if self.as_json:
                yield title, conversation, lambda text: None, lambda reply: None
            elif columns is not None:
                yield title, conversation, *columns.place(title)
            else:
                if len(self.conversations) > 1:
                    print_lines([f"{title}:"], "replace")
                yield title, conversation, _stream, _end_of_stream


def _as_object(reply: Reply) -> dict[str, str | int]:
    return {
        "text": reply.text,
        "ended": reply.ended,
        "tokens": len(reply.ids),
        "prompt_tokens": len(reply.prompt_ids),
        "left_out_turns": reply.left_out,
    }


def _stream(text: str) -> None:
    print_text(text, "replace")


def _end_of_stream(reply: Reply) -> None:
    ended = _told_end(reply)
    print_lines([f" {ended}" if ended else ""], "replace")


def _told_end(reply: Reply) -> str:
    return {
        LIMIT: f"[cut off after {len(reply.ids)} tokens]",
        CONTEXT_FULL: f"[cut off after {len(reply.ids)} tokens: the context is full]",
        INTERRUPTED: "[stopped]",
    }.get(reply.ended, "")


class _Columns:
    """Two answers side by side, generated one after the other.

    The first answer is stored until it is complete. Then a line is printed as soon as the second
    answer's line is final, that is when the next line begins.
    """

    def __init__(self, titles: list[str], width: int) -> None:
        self.titles, self.width = titles, width
        self.texts = dict.fromkeys(titles, "")
        self.printed = 0

    def place(self, title: str) -> tuple[Show, Done]:
        last = title == self.titles[-1]
        if last:
            rule = ["-" * self.width] * len(self.titles)
            self._print([self.titles, rule])

        def show(text: str) -> None:
            self.texts[title] += text
            if last:
                self._advance(final=False)
            else:
                tick(f"{title} is answering: {len(self.texts[title]):,} characters")

        def done(reply: Reply) -> None:
            ended = _told_end(reply)
            self.texts[title] = f"{reply.text} {ended}" if ended else reply.text
            if last:
                self._advance(final=True)
            else:
                tick("")

        return show, done

    def _advance(self, final: bool) -> None:
        columns = [wrap(shown(text), self.width) for text in self.texts.values()]
        ready = max(map(len, columns)) if final else len(columns[-1]) - 1
        rows = [
            [column[place] if place < len(column) else "" for column in columns]
            for place in range(self.printed, ready)
        ]
        self.printed = max(self.printed, ready)
        self._print(rows)

    def _print(self, rows: list[list[str]]) -> None:
        if rows:
            print_lines([beside(row, self.width) for row in rows], "replace")


# Typing -------------------------------------------------------------------------------------------


def _interactive(asker: _Asker) -> int:
    terminal = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # reported as a prompt's error
    if terminal:
        say(HELP)
        with suppress(ImportError):
            # late: only a terminal has lines to edit, and not every Python has it
            import readline  # noqa: F401
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            if terminal:
                print_lines([""])
            return 0
        except KeyboardInterrupt:
            if not terminal:
                raise
            say("\n(Ctrl-D or /quit leaves)")
            continue
        if line == "/quit":
            return 0
        if line == "/reset":
            asker.reset()
            say("forgotten")
        elif line.startswith("/"):
            say(HELP if line == "/help" else f"there is no {line.split()[0]}:\n{HELP}")
        elif line:
            _answer(asker, line)


def _answer(asker: _Asker, line: str) -> None:
    try:
        asker.ask(line, interruptible=True)
    except DataError as error:
        say(f"error: {error}")
    except KeyboardInterrupt:  # between two answers
        print_lines([""], "replace")
