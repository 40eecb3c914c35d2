"""transformers' Trainer for test_trainer_logs.py: one small training, in a process without XLA.

USE_TORCH_XLA=0 python trainer_worker.py OUT LOGGING_STEPS [RESUME_FROM]
"""

from __future__ import annotations

import sys
import time

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

STEPS, SAVE_STEPS = 24, 10


class Rows(Dataset):
    """Rows of random tokens, the same every time."""

    def __len__(self) -> int:
        return 4 * STEPS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        time.sleep(0.03)  # a step takes longer than progress bars wait to be drawn again
        ids = torch.randint(0, 32, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def main(out: str, logging_steps: str, resume: str | None = None) -> None:
    """Train; Trainer writes trainer_state.json and prints its dicts."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    arguments = TrainingArguments(
        out, max_steps=STEPS, per_device_train_batch_size=4, logging_steps=int(logging_steps),
        save_steps=SAVE_STEPS, learning_rate=1e-3, use_cpu=True, report_to=[], seed=1,
    )  # fmt: skip
    trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=Rows())
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_state()


if __name__ == "__main__":
    main(*sys.argv[1:])
