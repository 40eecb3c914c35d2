"""Score folders on the quickstart's held-out rows: greedy answers, their form and their result.

python experimental/quickstart_assets/score.py FOLDER [FOLDER...] [--skip 100]

Form: the answer stops by itself and its last line is `#### N`. Right: that N is the row's. Both are
the graders of an evaluation during training. The first 100 rows chose the recipe's settings, so
they are left out by default.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from torchprime.config.compose import assets_dir
from torchprime.data.files.source import SourceSpec
from torchprime.data.rows.read import load_rows
from torchprime.data.tokenizer.load import load_tokenizer
from torchprime.evaluation.graders.make import Sample, make_grader
from torchprime.generation.with_transformers import generation_samples

LONGEST_ANSWER = 64


def main() -> None:
    """Print one line per folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--skip", type=int, default=100)
    args = parser.parse_args()
    test = assets_dir() / "quickstart" / "data" / "test.jsonl"
    rows = load_rows(SourceSpec(file_dataset_path=str(test)), 10_000)[args.skip :]
    has_form, has_answer = make_grader("gsm8k_format"), make_grader("gsm8k_answer")
    for folder in args.folders:
        tokenizer = load_tokenizer(folder)
        prompts = [tokenizer.prompt_ids(row.prompt) for row in rows]
        answers = generation_samples(folder, prompts, [tokenizer.eos_id], LONGEST_ANSWER)
        formed = right = 0
        for ids, row in zip(answers, rows, strict=True):
            stopped = bool(ids) and ids[-1] == tokenizer.eos_id
            ids = ids[:-1] if stopped else ids
            output = tokenizer.decode(ids)
            sample = Sample(row.row_id, row.prompt, output, row.completion, stopped, len(ids))
            formed += bool(has_form(sample))
            right += bool(has_form(sample) and has_answer(sample))
        total = len(rows)
        print(f"{folder}: {total} rows, form {formed / total:.1%}, right {right / total:.1%}")


if __name__ == "__main__":
    main()
