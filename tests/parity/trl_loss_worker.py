"""TRL's side of test_trl_losses.py: loss and gradients by SFTTrainer, in a process without XLA.

Reads a JSON file {"model": FOLDER, "rows": [{"input_ids", "labels"}], "cases": {NAME: OPTIONS}} and
writes for each case NAME.safetensors with the gradients by name, and the loss as `loss`.

    USE_TORCH_XLA=0 python trl_loss_worker.py CASES.json RESULTS_FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer


def gradients(model: Any, tokenizer: Any, rows: list[dict], options: dict, folder: Path) -> dict:
    """Return the loss of all rows in one batch, and its gradients."""
    arguments = SFTConfig(
        output_dir=str(folder),
        max_length=None,
        max_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **options,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = trainer.data_collator(rows)
    supervised = (batch["labels"][:, 1:] != -100).sum()
    model.zero_grad()
    loss = trainer.compute_loss(model, batch, num_items_in_batch=supervised)
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def main() -> None:
    given, folder = Path(sys.argv[1]), Path(sys.argv[2])
    datasets.disable_progress_bars()
    case = json.loads(given.read_text())
    model = AutoModelForCausalLM.from_pretrained(case["model"], dtype=torch.float32).train()
    tokenizer = AutoTokenizer.from_pretrained(case["model"])
    for name, options in case["cases"].items():
        found = gradients(model, tokenizer, case["rows"], options, folder)
        save_file(found, folder / f"{name}.safetensors")


if __name__ == "__main__":
    main()
