"""Chat with the model of a Hugging Face folder, by transformers, on the CPU or a GPU.

    message -> conversation -> chat template -> text -> ids -> generate -> ids -> text

The ids are the same as in training and in a server: the folder's chat template and tokenizer
make them with the code that makes training rows. A folder without a template continues plain text,
and then each prompt is independent: training never showed two in a row.

If a conversation exceeds the model's context, its oldest turns are left out and counted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.generation.streamers import BaseStreamer

from torchprime.checkpoint.adapter.load import load_model
from torchprime.checkpoint.proof.certificate import trained_options
from torchprime.data.templates.choose import resolve_template
from torchprime.data.templates.render import ChatTemplate, TemplateRefusal, render
from torchprime.data.tokenizer.load import REPLACEMENT, load_tokenizer
from torchprime.errors import DataError, RuntimeSetupError
from torchprime.generation.with_transformers import generation_settings

# Reasons for the end of an answer.
STOPPED, LIMIT, CONTEXT_FULL, INTERRUPTED = "stop", "limit", "context", "interrupted"

Show = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """Sampling options of answers; greedy with temperature 0."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    seed: int = 0


class Reply(NamedTuple):
    """An answer.

    Attributes:
        ids: without the stop token.
        ended: STOPPED, LIMIT, CONTEXT_FULL or INTERRUPTED.
        prompt_ids: what the model was given.
        left_out: turns that no longer fitted into the context, of this prompt's history.
    """

    text: str
    ids: list[int]
    ended: str
    prompt_ids: list[int]
    left_out: int


class Speaker:
    """A folder's model, ready to answer.

    Attributes:
        template: the folder's chat template, None if it has none.
        context: tokens of prompt and answer together, at most.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.tokenizer = load_tokenizer(folder)
        self.template: ChatTemplate | None = resolve_template(
            None, self.tokenizer, options=trained_options(folder)
        )
        self.stops = tuple(
            dict.fromkeys([self.tokenizer.eos_id, *self.tokenizer.generation_eos_ids])
        )
        model = load_model(folder)
        try:
            self.model: Any = model.to(device)
        except torch.OutOfMemoryError as error:
            raise RuntimeSetupError(
                f"--device: the model in {folder} does not fit on {device} ({error}). Use "
                "--device cpu, or leave out --base"
            ) from error
        self.context: int = getattr(model.config, "max_position_embeddings", None) or sys.maxsize

    def ids_of(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the token ids of the prompt for the last of these messages.

        Raises:
            DataError: the template refuses them.
        """
        if self.template is None:
            return self.tokenizer.prompt_ids(messages[-1]["content"])
        try:
            text = render(self.template, messages, add_generation_prompt=True)
        except TemplateRefusal as refusal:
            raise DataError(f"the chat template in {self.folder} refuses this: {refusal}") from None
        return self.tokenizer.encode_ids([text])[0]

    def answer(
        self, prompt_ids: list[int], sampling: Sampling, show: Show, interruptible: bool
    ) -> tuple[list[int], str]:
        """Generate one answer; return its ids, without the stop token, and the reason for its end.

        Args:
            show: is given the text bit by bit while it is made.
            interruptible: Ctrl-C ends the answer, not the program.
        """
        room = self.context - len(prompt_ids)
        # As an argument, its open settings would be filled from the folder's own settings.
        self.model.generation_config = generation_settings(
            self.stops, min(sampling.max_new_tokens, room), sampling.temperature
        )
        rows = torch.tensor([prompt_ids], device=self.device)
        stream = _Stream(self.tokenizer.decode, self.stops, show)
        torch.manual_seed(sampling.seed)
        try:
            with torch.no_grad():
                self.model.generate(
                    input_ids=rows, attention_mask=torch.ones_like(rows), streamer=stream
                )
        except KeyboardInterrupt:
            if not interruptible:
                raise
            stream.finish()
            return stream.ids, INTERRUPTED
        stream.finish()
        if stream.stopped:
            return stream.ids, STOPPED
        return stream.ids, LIMIT if sampling.max_new_tokens <= room else CONTEXT_FULL


class _Stream(BaseStreamer):
    """Receiver of single tokens that passes on the text as soon as it can no longer change."""

    def __init__(self, decode: Callable[[list[int]], str], stops: tuple[int, ...], show: Show):
        self.ids: list[int] = []
        self.stopped = False
        self._decode, self._stops, self._show = decode, stops, show
        self._prompt_seen, self._shown = False, ""

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:  # the first call contains the prompt
            self._prompt_seen = True
            return
        token = int(value.reshape(-1)[-1])
        self.stopped = self.stopped or token in self._stops
        if self.stopped:
            return
        self.ids.append(token)
        text = self._decode(self.ids)
        if not text.endswith(REPLACEMENT):  # else a character whose bytes are incomplete
            self._advance(text)

    def end(self) -> None:
        """Do nothing: generate calls this, and `finish` does its work, also after an
        interruption."""

    def finish(self) -> None:
        self._advance(self._decode(self.ids))

    def _advance(self, text: str) -> None:
        # A decoder may still change the end of a text; text that was shown is not changed.
        if len(text) > len(self._shown):
            self._show(text[len(self._shown) :])
            self._shown = text


@dataclass
class Conversation:
    """A conversation with one speaker, whose own answers are in its history."""

    speaker: Speaker
    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)  # question, answer

    def prepare(self, prompt: str, max_new_tokens: int) -> tuple[list[int], int]:
        """Return the prompt for the speaker, and the number of oldest turns that are left out.

        As many turns are kept as leave room for a whole answer.

        Raises:
            DataError: the prompt alone is longer than the context, or is empty.
        """
        speaker = self.speaker
        turns = self.turns if speaker.template is not None else []
        left_out, ids = 0, speaker.ids_of(self._messages(turns, prompt))
        while len(ids) + max_new_tokens > speaker.context and left_out < len(turns):
            left_out += 1
            ids = speaker.ids_of(self._messages(turns[left_out:], prompt))
        if not ids:
            raise DataError("the prompt is empty: give at least a character")
        if len(ids) >= speaker.context:
            raise DataError(
                f"the prompt has {len(ids):,} tokens; {speaker.folder} has a context of "
                f"{speaker.context:,}, of which the answer needs some. Shorten the prompt"
            )
        return ids, left_out

    def _messages(self, turns: list[tuple[str, str]], prompt: str) -> list[dict[str, str]]:
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for question, answer in turns:
            messages += [{"role": "user", "content": question}]
            messages += [{"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": prompt}]

    def ask(
        self, prompt: str, sampling: Sampling, show: Show, interruptible: bool = False
    ) -> Reply:
        """Generate an answer, and add question and answer to the history."""
        prompt_ids, left_out = self.prepare(prompt, sampling.max_new_tokens)
        ids, ended = self.speaker.answer(prompt_ids, sampling, show, interruptible)
        text = self.speaker.tokenizer.decode(ids)
        self.turns.append((prompt, text))
        return Reply(text, ids, ended, prompt_ids, left_out)
