"""Supervised fine-tuning: starts from pretrained weights and shows answers before and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from torchprime.errors import ConfigError, UserError
from torchprime.generation.with_transformers import generation_samples
from torchprime.training.setup.datasets import question_of
from torchprime.training.setup.model_files import pretrained_tensors
from torchprime.training.trainer import Trainer

SAMPLE_TOKENS = 160


class SFTTrainer(Trainer):
    """A `Trainer` that starts from pretrained weights and shows the effect of the tuning."""

    def weights(self) -> Callable[[str], Tensor]:
        """Return the checkpoint's weights, names and shapes checked; never random ones."""
        if self.files.folder is None:
            raise ConfigError(
                "task=sft fine-tunes a checkpoint, but model.pretrained_model is null. Set it to a "
                "hub name or a local folder, or use task=train."
            )
        return pretrained_tensors(self.files, self.dtype)

    def show_export(self, out: Path) -> None:
        """Print answers of the base and the tuned model side by side."""
        count = self.config.task.sample_prompts
        whole = self.config.task.convert_to_safetensors
        if count and whole and self.backend.processes.index == 0:
            try:
                self.say(self.side_by_side(count, out))
            except UserError as error:  # the run is finished and exported; this was only a display
                self.say(f"no answers to show: {error}")

    def side_by_side(self, count: int, out: Path) -> str:
        """Return greedy answers of both models, in transformers, to the first held-out prompts."""
        assert self.files.folder is not None
        tokenizer = self.files.tokenizer
        questions = [
            question_of(row, tokenizer, self.template)
            for row in self.rows.sources.first_heldout(count)
        ]
        prompts = [question.ids for question in questions]
        limit = min(SAMPLE_TOKENS, self.config.dataset.block_size)
        new = self.files.new_rows
        base = self._answers(self.files.folder, prompts, limit, new.before if new else None)
        tuned = self._answers(out, prompts, limit)
        lines = [f"{count} held-out questions, greedy answers before and after:"]
        for question, *answers in zip(questions, base, tuned, strict=True):
            shown = {"question": question.text, "expected": question.answer}
            for name, ids in zip(("base", "tuned"), answers, strict=True):
                shown[name] = self._text_of(ids)
            lines.append("")
            lines += [f"  {name:<9}{_one_line(text)}" for name, text in shown.items()]
        return "\n".join(lines)

    def _answers(
        self, folder: Path, prompts: list[list[int]], limit: int, rows: int | None = None
    ) -> list[list[int] | None]:
        """Return greedy answers; None for a prompt that has an id beyond the model's rows."""
        asked = [rows is None or max(prompt) < rows for prompt in prompts]
        known = [prompt for prompt, is_asked in zip(prompts, asked, strict=True) if is_asked]
        found = iter(generation_samples(folder, known, self.stop_ids, limit))
        return [next(found) if is_asked else None for is_asked in asked]

    def _text_of(self, ids: list[int] | None) -> str:
        if ids is None:
            return "[not asked: it has no row for a token of this prompt]"
        stopped = bool(ids) and ids[-1] in self.stop_ids
        text = self.files.tokenizer.decode(ids[:-1] if stopped else ids)
        return text + ("" if stopped else " [no stop]")


def _one_line(text: str) -> str:
    return " / ".join(part for part in text.strip().splitlines() if part.strip())
