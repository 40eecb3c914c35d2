"""Generate the quickstart's rows, small word problems, and the plain text its base model reads.

A *template* is a story with two or three numbers, a question and one or two sums. One problem drawn
from it is written in two ways:

- as a question/answer row in GSM8K's answer form (`train.jsonl`, `test.jsonl`, shipped):
  `Tom has 3 + 4 = <<3+4=7>>7 apples now.` and, on the last line, `#### 7`;
- as plain text for pretraining (`pretrain.jsonl`, not shipped): the story and its outcome,
  `3+4=7. Tom has 7 apples now.` Around it stand lists of equations in both spellings, `3 + 4 = 7`
  and `3+4=7`, which are token for token what an answer holds. No question, no `<<`, no `####`: the
  base model can read a story and calculate, but has never seen the answer form.

Which problems may be tested is decided by a hash of the template's name and the numbers, so the
two files share neither a question nor a template with the same numbers, however many rows are
drawn. Everything follows from the seed through `random.Random`; a rerun writes the same bytes.

    python experimental/quickstart_assets/make_data.py \
        --rows-dir torchprime/assets/quickstart/data --pretrain-dir outputs/quickstart-data
"""

from __future__ import annotations

import argparse
import hashlib
import json
import operator
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SEED = 20261121
TRAIN_ROWS = 4000
TEST_ROWS = 400
PRETRAIN_DOCUMENTS = 40_000
LARGEST = 99  # every number, drawn or calculated, has at most two digits
TEST_SHARE = 8  # one (template, numbers) in so many belongs to the test split

# fmt: off
NAMES = (
    "Tom", "Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack",
    "Kate", "Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Uma", "Vera", "Will",
    "Zoe",
)
THINGS = (
    "apples", "pears", "plums", "eggs", "books", "cards", "coins", "stamps", "shells", "stones",
    "balls", "toys", "cups", "pens", "stickers", "cookies", "flowers", "buttons", "pencils",
    "ribbons",
)
# fmt: on
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True)
class Sum:
    """One line of a solution: `result = left op right`, and the sentence that says it."""

    result: str
    left: str
    op: str
    right: str
    sentence: str  # `{sum}` is where the equation goes


@dataclass(frozen=True)
class Template:
    """A kind of story. `x`, `y`, `z` are drawn from `ranges`, the sums name their results."""

    name: str
    ranges: dict[str, tuple[int, int]]
    story: str
    question: str
    sums: tuple[Sum, ...]


UP_TO_50 = {"x": (2, 50), "y": (2, 50)}
THREE_SMALL = {"x": (2, 40), "y": (2, 30), "z": (2, 30)}

TEMPLATES = (
    Template(
        "together",
        UP_TO_50,
        "{A} has {x} {things}. {B} has {y} {things}.",
        "How many {things} do {A} and {B} have together?",
        (Sum("s", "x", "+", "y", "{A} and {B} have {sum} {things} together."),),
    ),
    Template(
        "gets",
        UP_TO_50,
        "{A} has {x} {things}. {B} gives {A} {y} more {things}.",
        "How many {things} does {A} have now?",
        (Sum("s", "x", "+", "y", "{A} has {sum} {things} now."),),
    ),
    Template(
        "finds",
        UP_TO_50,
        "{A} finds {x} {things} in the morning. {A} finds {y} {things} in the evening.",
        "How many {things} does {A} find in all?",
        (Sum("s", "x", "+", "y", "{A} finds {sum} {things} in all."),),
    ),
    Template(
        "containers",
        UP_TO_50,
        "There are {x} {things} in a box. There are {y} {things} in a bag.",
        "How many {things} are there in all?",
        (Sum("s", "x", "+", "y", "There are {sum} {things} in all."),),
    ),
    Template(
        "more than",
        UP_TO_50,
        "{A} has {x} {things}. {B} has {y} more {things} than {A}.",
        "How many {things} does {B} have?",
        (Sum("s", "x", "+", "y", "{B} has {sum} {things}."),),
    ),
    Template(
        "colours",
        UP_TO_50,
        "{A} buys {x} red {things} and {y} green {things}.",
        "How many {things} does {A} buy?",
        (Sum("s", "x", "+", "y", "{A} buys {sum} {things}."),),
    ),
    Template(
        "gives",
        UP_TO_50,
        "{A} has {x} {things}. {A} gives {y} {things} to {B}.",
        "How many {things} does {A} have left?",
        (Sum("s", "x", "-", "y", "{A} has {sum} {things} left."),),
    ),
    Template(
        "takes",
        UP_TO_50,
        "There are {x} {things} on the table. {A} takes {y} {things}.",
        "How many {things} are left on the table?",
        (Sum("s", "x", "-", "y", "There are {sum} {things} left."),),
    ),
    Template(
        "difference",
        UP_TO_50,
        "{A} has {x} {things}. {B} has {y} {things}.",
        "How many more {things} does {A} have than {B}?",
        (Sum("s", "x", "-", "y", "{A} has {sum} more {things}."),),
    ),
    Template(
        "needs",
        UP_TO_50,
        "{A} needs {x} {things}. {A} has {y} {things}.",
        "How many more {things} does {A} need?",
        (Sum("s", "x", "-", "y", "{A} needs {sum} more {things}."),),
    ),
    Template(
        "bags",
        {"x": (2, 9), "y": (2, 9)},
        "{A} has {x} bags. There are {y} {things} in each bag.",
        "How many {things} does {A} have?",
        (Sum("s", "x", "*", "y", "{A} has {sum} {things}."),),
    ),
    Template(
        "gets and gives",
        THREE_SMALL,
        "{A} has {x} {things}. {B} gives {A} {y} more {things}. {A} gives {z} {things} to {C}.",
        "How many {things} does {A} have left?",
        (
            Sum("s", "x", "+", "y", "{A} has {sum} {things}."),
            Sum("t", "s", "-", "z", "Then {A} has {sum} {things} left."),
        ),
    ),
    Template(
        "three together",
        THREE_SMALL,
        "{A} has {x} {things}. {B} has {y} {things}. {C} has {z} {things}.",
        "How many {things} do they have in all?",
        (
            Sum("s", "x", "+", "y", "{A} and {B} have {sum} {things}."),
            Sum("t", "s", "+", "z", "They have {sum} {things} in all."),
        ),
    ),
    Template(
        "both",
        {"x": (2, 30), "y": (2, 30)},
        "{A} has {x} {things}. {B} has {y} more {things} than {A}.",
        "How many {things} do {A} and {B} have together?",
        (
            Sum("s", "x", "+", "y", "{B} has {sum} {things}."),
            Sum("t", "x", "+", "s", "{A} and {B} have {sum} {things} together."),
        ),
    ),
    Template(
        "loses and sells",
        {"x": (10, 50), "y": (2, 25), "z": (2, 25)},
        "{A} has {x} {things}. {A} loses {y} {things}. {A} sells {z} {things}.",
        "How many {things} does {A} have left?",
        (
            Sum("s", "x", "-", "y", "{A} has {sum} {things}."),
            Sum("t", "s", "-", "z", "Then {A} has {sum} {things} left."),
        ),
    ),
)


@dataclass(frozen=True)
class Problem:
    """One drawn template: its words and all its numbers, results included."""

    template: Template
    words: dict[str, str]
    numbers: dict[str, int]

    @property
    def story(self) -> str:
        return self.template.story.format(**self.words, **self.numbers)

    @property
    def question(self) -> str:
        return f"{self.story} {self.template.question.format(**self.words)}"

    @property
    def answer(self) -> str:
        lines = []
        for line in self.template.sums:
            left, right = self.numbers[line.left], self.numbers[line.right]
            result = self.numbers[line.result]
            worked = f"{left} {line.op} {right} = <<{left}{line.op}{right}={result}>>{result}"
            lines.append(line.sentence.format(**self.words, sum=worked))
        last = self.numbers[self.template.sums[-1].result]
        return "\n".join([*lines, f"#### {last}"])

    @property
    def for_test(self) -> bool:
        drawn = [self.numbers[name] for name in self.template.ranges]
        digest = hashlib.sha256(f"{self.template.name} {drawn}".encode()).digest()
        return int.from_bytes(digest[:8], "big") % TEST_SHARE == 0

    def told(self, spelling: str) -> str:
        """Return the story and its outcome as plain text."""
        parts = [self.story]
        for line in self.template.sums:
            left, right = self.numbers[line.left], self.numbers[line.right]
            plain = equation(left, line.op, right, spaced=spelling != "compact")
            if spelling == "inline":
                parts.append(line.sentence.format(**self.words, sum=plain))
            else:
                result = self.numbers[line.result]
                parts += [f"{plain}.", line.sentence.format(**self.words, sum=result)]
        return " ".join(parts)


def equation(left: int, op: str, right: int, spaced: bool) -> str:
    space = " " if spaced else ""
    return space.join([str(left), op, str(right), "=", str(OPERATIONS[op](left, right))])


def draw_problem(rng: random.Random, template: Template) -> Problem:
    """Numbers are redrawn until every result lies in 2..99: no negatives, no `1 apples`."""
    people = rng.sample(NAMES, 3)
    words = dict(zip("ABC", people, strict=True)) | {"things": rng.choice(THINGS)}
    while True:
        numbers = {name: rng.randint(low, high) for name, (low, high) in template.ranges.items()}
        for line in template.sums:
            left, right = numbers[line.left], numbers[line.right]
            numbers[line.result] = OPERATIONS[line.op](left, right)
        if all(2 <= number <= LARGEST for number in numbers.values()):
            return Problem(template, words, numbers)


def draw_rows(rng: random.Random, count: int, for_test: bool) -> list[dict[str, str]]:
    """`count` different questions of one split, the templates in turn so that none is rare."""
    rows: dict[str, dict[str, str]] = {}
    while len(rows) < count:
        problem = draw_problem(rng, TEMPLATES[len(rows) % len(TEMPLATES)])
        if problem.for_test == for_test:
            question = problem.question
            rows.setdefault(question, {"question": question, "answer": problem.answer})
    shuffled = list(rows.values())
    rng.shuffle(shuffled)
    return shuffled


def draw_equations(rng: random.Random, spaced: bool) -> list[str]:
    """Return a sum and its inverse, or a product; every number has at most two digits."""
    if rng.random() < 0.1:
        return [equation(rng.randint(0, 9), "*", rng.randint(0, 9), spaced)]
    left = rng.randint(0, 50)
    right = rng.randint(0, min(50, LARGEST - left))
    family = [
        equation(left, "+", right, spaced),
        equation(right, "+", left, spaced),
        equation(left + right, "-", right, spaced),
        equation(left + right, "-", left, spaced),
    ]
    return rng.sample(family, rng.randint(1, 3))


def draw_document(rng: random.Random) -> str:
    """Return a list of equations, or a few stories told to their end."""
    if rng.random() < 0.4:
        spaced = rng.random() < 0.3
        return "\n".join(
            text for _ in range(rng.randint(4, 8)) for text in draw_equations(rng, spaced)
        )
    problems = [draw_problem(rng, rng.choice(TEMPLATES)) for _ in range(rng.randint(1, 3))]
    return "\n".join(
        problem.told(rng.choice(("compact", "spaced", "inline"))) for problem in problems
    )


def draw_documents(seed: int, count: int) -> Iterator[dict[str, str]]:
    rng = random.Random(f"{seed} pretrain")
    return ({"text": draw_document(rng)} for _ in range(count))


def write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Write the quickstart's rows and pretraining text."
    )
    parser.add_argument("--rows-dir", type=Path, help="writes train.jsonl and test.jsonl here")
    parser.add_argument("--pretrain-dir", type=Path, help="writes pretrain.jsonl here")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--train-rows", type=int, default=TRAIN_ROWS)
    parser.add_argument("--test-rows", type=int, default=TEST_ROWS)
    parser.add_argument("--pretrain-documents", type=int, default=PRETRAIN_DOCUMENTS)
    options = parser.parse_args(arguments)
    if options.rows_dir is None and options.pretrain_dir is None:
        parser.error("nothing to write: give --rows-dir, --pretrain-dir or both")
    if options.rows_dir is not None:
        for name, count in (("train", options.train_rows), ("test", options.test_rows)):
            rng = random.Random(f"{options.seed} {name}")
            write_jsonl(options.rows_dir / f"{name}.jsonl", draw_rows(rng, count, name == "test"))
    if options.pretrain_dir is not None:
        documents = draw_documents(options.seed, options.pretrain_documents)
        write_jsonl(options.pretrain_dir / "pretrain.jsonl", documents)


if __name__ == "__main__":
    main()
