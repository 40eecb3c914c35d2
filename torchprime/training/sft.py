"""Supervised fine-tuning: starts from pretrained weights and shows answers before and after."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from torchprime.errors import ConfigError, UserError
from torchprime.generation.with_transformers import generation_samples
from torchprime.training.prepare import Prepared
from torchprime.training.setup.datasets import question_of
from torchprime.training.setup.inputs import RunInputs
from torchprime.training.setup.model_files import ModelFiles
from torchprime.training.trainer import Trainer

SAMPLE_TOKENS = 160


class SFTTrainer(Trainer):
    """A `Trainer` that starts from pretrained weights and shows the effect of the tuning."""

    def weights(self, files: ModelFiles) -> Callable[[str], Tensor]:
        """Open the checkpoint's weights, names and shapes checked; never random ones."""
        if files.folder is None:
            raise ConfigError(
                "task=sft fine-tunes a checkpoint, but model.pretrained_model is null. Set it to a "
                "hub name or a local folder, or use task=train."
            )
        return super().weights(files)

    def show_export(self, prepared: Prepared, out: Path) -> None:
        """Print answers of the base and the tuned model side by side."""
        count, base = self.config.task.sample_prompts, prepared.inputs.files.folder
        whole = self.config.task.convert_to_safetensors
        if count and whole and base is not None and prepared.backend.processes.index == 0:
            try:
                prepared.say(side_by_side(prepared.inputs, base, out, count))
            except UserError as error:  # the run is finished and exported; this was only a display
                prepared.say(f"no answers to show: {error}")


def side_by_side(inputs: RunInputs, base: Path, tuned: Path, count: int) -> str:
    """Return greedy answers of both models, in transformers, to the first held-out prompts."""
    questions = [
        question_of(row, inputs.files.tokenizer, inputs.template)
        for row in inputs.rows.sources.first_heldout(count)
    ]
    prompts = [question.ids for question in questions]
    new = inputs.files.new_rows
    before = _answers(inputs, base, prompts, new.before if new else None)
    after = _answers(inputs, tuned, prompts)
    lines = [f"{count} held-out questions, greedy answers before and after:"]
    for question, *answers in zip(questions, before, after, strict=True):
        shown = {"question": question.text, "expected": question.answer}
        for name, ids in zip(("base", "tuned"), answers, strict=True):
            shown[name] = _text_of(inputs, ids)
        lines.append("")
        lines += [f"  {name:<9}{_one_line(text)}" for name, text in shown.items()]
    return "\n".join(lines)


def _answers(
    inputs: RunInputs, folder: Path, prompts: list[list[int]], rows: int | None = None
) -> list[list[int] | None]:
    """Return greedy answers; None for a prompt that has an id beyond the model's rows."""
    asked = [rows is None or max(prompt) < rows for prompt in prompts]
    known = [prompt for prompt, is_asked in zip(prompts, asked, strict=True) if is_asked]
    limit = min(SAMPLE_TOKENS, inputs.config.dataset.block_size)
    found = iter(generation_samples(folder, known, inputs.stop_ids, limit))
    return [next(found) if is_asked else None for is_asked in asked]


def _text_of(inputs: RunInputs, ids: list[int] | None) -> str:
    if ids is None:
        return "[not asked: it has no row for a token of this prompt]"
    stopped = bool(ids) and ids[-1] in inputs.stop_ids
    text = inputs.files.tokenizer.decode(ids[:-1] if stopped else ids)
    return text + ("" if stopped else " [no stop]")


def _one_line(text: str) -> str:
    return " / ".join(part for part in text.strip().splitlines() if part.strip())
