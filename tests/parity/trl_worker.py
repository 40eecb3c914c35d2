"""TRL's side of test_trl_labels.py: what SFTTrainer makes of rows, in a process without XLA.

Reads a JSON file of cases and writes a JSON file with, for each case and row, the ids and the
targets: the id each position is to predict, -100 where there is no loss. Labels come from the
trainer's own preparation and collator; the shift is that of transformers' loss for causal language
models. A case that TRL refuses has its error's text instead.

    USE_TORCH_XLA=0 python trl_worker.py CASES.json RESULTS.json
"""

from __future__ import annotations

import json
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import datasets
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

BATCH = 16

load_tokenizer = lru_cache(AutoTokenizer.from_pretrained)


def prepare(case: dict[str, Any], model: LlamaForCausalLM, scratch: Path) -> list[list[list[int]]]:
    """[ids, targets] of every row."""
    tokenizer = load_tokenizer(case["tokenizer"])
    tokenizer.chat_template = case["template"] or None
    rows = datasets.load_dataset(
        "json", data_files=case["rows"], split="train", cache_dir=str(scratch / "rows")
    )
    assert isinstance(rows, datasets.Dataset)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(scratch),
            max_length=None,  # nothing is truncated
            max_steps=1,
            report_to=[],
            use_cpu=True,
            **case["options"],
        ),
        # The same functions map a Dataset, after hashing the tokenizer for a second in each case.
        train_dataset=rows.to_iterable_dataset(),
        processing_class=tokenizer,
    )
    prepared: list[Any] = list(cast(datasets.IterableDataset, trainer.train_dataset))
    found: list[list[list[int]]] = []
    for start in range(0, len(prepared), BATCH):
        some = prepared[start : start + BATCH]
        batch = trainer.data_collator(some)
        targets = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
        for i in range(len(some)):
            n = int(batch["attention_mask"][i].sum())
            found.append([batch["input_ids"][i, :n].tolist(), targets[i, :n].tolist()])
    return found


def main() -> None:
    cases, results = map(Path, sys.argv[1:])
    datasets.disable_progress_bars()
    torch.manual_seed(0)
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size"), 8)
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=1)
    )  # nothing runs through it
    found: dict[str, Any] = {}
    for name, case in json.loads(cases.read_text()).items():
        try:
            found[name] = prepare(case, model, results.parent)
        except Exception as error:  # what TRL says of such rows is part of the comparison
            found[name] = f"{type(error).__name__}: {error}"
    results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
