"""The quickstart's shipped files: what they promise, and that the recipe still makes them."""

from __future__ import annotations

import filecmp
import json
import re
import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPO = Path(__file__).resolve().parents[2]
ASSETS = REPO / "torchprime" / "assets" / "quickstart"
BASE = ASSETS / "base"
RECIPE = REPO / "experimental" / "quickstart_assets"

EQUATION = re.compile(r"(\d+) ([-+*]) (\d+) = <<(\d+)([-+*])(\d+)=(\d+)>>(\d+)")
CALCULATE = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
TEXTS = (
    "3 + 4 = 7",
    "Tom has 12 apples.\n\n\nAnna: <<12+5=17>>17 #### 17",
    "  spaces  and\ttabs\r\n\n \n",
    "Grüße, 日本語, emoji 🦄, null \x00, 1234567890",
    "",
)


@cache
def rows(split: str) -> list[dict[str, str]]:
    lines = (ASSETS / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(BASE / "tokenizer.json"))


def ids(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False).ids


def tokens(text: str) -> list[str]:
    return tokenizer().encode(text, add_special_tokens=False).tokens


def run_recipe(script: str, *arguments: str | Path) -> None:
    subprocess.run([sys.executable, RECIPE / script, *arguments], check=True)


@pytest.fixture(scope="module")
def remade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that needs no training, made again by the recipe."""
    folder = tmp_path_factory.mktemp("remade")
    run_recipe(
        "make_data.py", "--rows-dir", folder, "--pretrain-dir", folder,
        "--pretrain-documents", "2000",
    )  # fmt: skip
    run_recipe("make_tokenizer.py", "--out", folder)
    return folder


def test_all_is_small_enough_to_ship() -> None:
    size = sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file())
    assert size <= 8 * 1024 * 1024


# Rows


def test_the_number_of_rows_and_their_keys() -> None:
    assert (len(rows("train")), len(rows("test"))) == (4000, 400)
    assert {tuple(row) for split in ("train", "test") for row in rows(split)} == {
        ("question", "answer")
    }


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_answer_is_right_in_gsm8k_s_form_and_within_two_digits(split: str) -> None:
    for row in rows(split):
        *lines, last = row["answer"].split("\n")
        shown = None
        assert 1 <= len(lines) <= 2
        for line in lines:
            (found,) = EQUATION.findall(line)
            left, op, right, left_again, op_again, right_again, result, shown = found
            assert (left, op, right) == (left_again, op_again, right_again), row
            assert CALCULATE[op](int(left), int(right)) == int(result) == int(shown), row
            assert all(2 <= int(number) <= 99 for number in (left, right, result)), row
        assert last == f"#### {shown}", row


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_numbers_of_the_answer_come_from_the_question(split: str) -> None:
    for row in rows(split):
        given = re.findall(r"\d+", row["question"])
        first = EQUATION.search(row["answer"])
        assert first is not None
        assert {first[1], first[3]} <= set(given), row
        assert row["question"].endswith("?")


@cache
def names_and_things() -> frozenset[str]:
    recipe = runpy.run_path(str(RECIPE / "make_data.py"))
    return frozenset(recipe["NAMES"] + recipe["THINGS"])


def without_words(question: str) -> tuple[str, ...]:
    """A question with its names and things left out: its template, with its numbers in place."""
    return tuple(word for word in re.findall(r"\w+", question) if word not in names_and_things())


def test_train_and_test_share_no_question_and_no_template_with_the_same_numbers() -> None:
    train = {without_words(row["question"]) for row in rows("train")}
    test = {without_words(row["question"]) for row in rows("test")}
    assert len(test) > 200, "leaving the words out must leave the numbers in"
    assert not train & test
    for split in ("train", "test"):
        questions = [row["question"] for row in rows(split)]
        assert len(set(questions)) == len(questions)


def test_every_kind_of_story_is_in_both_splits() -> None:
    kinds = [
        {re.sub(r"\d+", "0", " ".join(without_words(row["question"]))) for row in rows(split)}
        for split in ("train", "test")
    ]
    assert kinds[0] == kinds[1]
    assert 12 <= len(kinds[0]) <= 20


# Tokenizer


def test_vocabulary_and_special_tokens() -> None:
    assert tokenizer().get_vocab_size() == 512
    assert [tokenizer().token_to_id(token) for token in ("<s>", "</s>", "<pad>")] == [0, 1, 2]


def test_every_text_round_trips() -> None:
    for text in (*TEXTS, *(row["question"] + row["answer"] for row in rows("test"))):
        assert tokenizer().decode(ids(text)) == text


def test_no_token_holds_a_digit_and_anything_else() -> None:
    digits = [token for token in tokenizer().get_vocab() if re.search(r"[0-9]", token)]
    assert sorted(digits) == list("0123456789")


def test_a_sum_is_the_same_tokens_alone_and_inside_an_answer() -> None:
    answer = tokens("Tom has 12 + 35 = <<12+35=47>>47 apples.")
    for alone in (tokens("12 + 35 ="), tokens("12+35=47")):
        starts = range(len(answer) - len(alone) + 1)
        assert any(answer[at : at + len(alone)] == alone for at in starts), (alone, answer)


def test_prompt_and_completion_tokenize_apart_as_together() -> None:
    for row in rows("test"):
        prompt = f"Question:\n{row['question']}\n\n\nAnswer:\n"
        assert ids(prompt) + ids(row["answer"]) == ids(prompt + row["answer"])


def test_a_rendered_row_fits_a_block_of_256_three_times_over() -> None:
    lengths = [
        len(ids(f"Question:\n{row['question']}\n\n\nAnswer:\n{row['answer']}")) + 2
        for row in rows("train")
    ]
    assert sum(lengths) / len(lengths) < 80
    assert max(lengths) <= 128


@pytest.mark.parametrize("loader", [AutoTokenizer, PreTrainedTokenizerFast])
def test_transformers_gives_the_same_ids_with_one_bos(loader: type) -> None:
    loaded = loader.from_pretrained(BASE)
    for text in TEXTS:
        assert loaded(text).input_ids == [0, *ids(text)]
        assert loaded.decode(ids(text)) == text
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (0, 1, 2)


# Base model


def test_the_config_is_a_small_llama_that_shards_in_two() -> None:
    config = LlamaConfig.from_pretrained(BASE)
    assert config.architectures == ["LlamaForCausalLM"]
    assert config.vocab_size == tokenizer().get_vocab_size()
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 1, 2)
    assert config.tie_word_embeddings
    sizes = [
        config.vocab_size, config.hidden_size, config.intermediate_size,
        config.num_attention_heads, config.num_key_value_heads,
    ]  # fmt: skip
    assert all(size % 2 == 0 for size in sizes)
    parameters = sum(parameter.numel() for parameter in LlamaForCausalLM(config).parameters())
    assert 1_000_000 <= parameters <= 4_000_000


def test_both_spellings_of_rope_agree() -> None:
    config = json.loads((BASE / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["dtype"] == config["torch_dtype"]


# Recipe


@pytest.mark.parametrize("name", ["train.jsonl", "test.jsonl"])
def test_the_recipe_makes_the_shipped_rows_again(remade: Path, name: str) -> None:
    assert filecmp.cmp(remade / name, ASSETS / "data" / name, shallow=False)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_the_recipe_makes_the_shipped_tokenizer_again(remade: Path, name: str) -> None:
    assert filecmp.cmp(remade / name, BASE / name, shallow=False)


def test_pretraining_text_never_shows_the_answer_form(remade: Path) -> None:
    lines = (remade / "pretrain.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2000
    text = "\n".join(json.loads(line)["text"] for line in lines)
    for never in ("<<", ">>", "##", "Question", "Answer", "?"):
        assert never not in text
    sums = re.findall(r"(\d+) ?([-+*]) ?(\d+) ?= ?(\d+)", text)
    assert len(sums) > 10_000
    for left, op, right, result in sums:
        assert CALCULATE[op](int(left), int(right)) == int(result)
