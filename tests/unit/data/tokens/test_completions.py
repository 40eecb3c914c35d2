"""Ids, the boundary between prompt and completion, BOS, EOS, targets and truncation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from torchprime.config.sections.dataset import LossOn
from torchprime.data.files.record import Rejection
from torchprime.data.rows.read import QUESTION_PROMPT, Row
from torchprime.data.tokenizer.load import Tokenizer
from torchprime.data.tokens.completions import RULES, Example, averaged, fit_to_block, tokenize_rows
from torchprime.errors import DataError

MakeTokenizer = Callable[..., Tokenizer]


def pair(prompt: str, completion: str, row_id: str = "f:1") -> Row:
    return Row(row_id, "prompt_completion", prompt, completion)


def one(row: Row, tokenizer: Tokenizer, compute_loss_on: LossOn = "completion") -> Example:
    (result,) = tokenize_rows([row], tokenizer, compute_loss_on)
    assert isinstance(result, Example), result
    return result


def asked(example: Example, tokenizer: Tokenizer) -> str:
    """The text of the supervised ids."""
    return tokenizer.decode(example.ids[example.supervised].tolist(), skip_special_tokens=False)


def check(example: Example, row: Row, tokenizer: Tokenizer) -> None:
    """Check what holds for each row trained on its completion, with any tokenizer."""
    prompt, ids = tokenizer.prompt_ids(row.prompt), example.ids.tolist()
    assert ids[: len(prompt)] == prompt, "inference would give the model other ids"
    assert example.supervised.tolist() == [i >= len(prompt) for i in range(len(ids))]
    assert ids[-1] == tokenizer.eos_id
    assert ids[-2] != tokenizer.eos_id
    if tokenizer.add_bos:
        assert ids.index(tokenizer.bos_id) == 0
        assert ids.count(tokenizer.bos_id) == 1
    assert tokenizer.decode(ids) == row.prompt + row.completion


def test_ids_and_mask_by_hand(build: SimpleNamespace, make_tokenizer: MakeTokenizer) -> None:
    raw = build.begin_with_bos(build.byte_level([("c", "d")]))
    tokenizer = make_tokenizer(raw, bos_token="<s>")
    a, b, cd = (raw.token_to_id(token) for token in ("a", "b", "cd"))
    example = one(pair("ab", "cda"), tokenizer)
    assert example.ids.tolist() == [0, a, b, cd, a, 1]
    assert example.ids.dtype == np.int32
    assert example.supervised.tolist() == [False, False, False, True, True, True]
    assert example.targets().tolist() == [-100, -100, cd, a, 1, -100]
    assert example.boundary == "joint"
    everything = one(pair("ab", "cda"), tokenizer, "all")
    assert everything.targets().tolist() == [a, b, cd, a, 1, -100]


def test_text_supervises_all_but_the_first(
    build: SimpleNamespace, make_tokenizer: MakeTokenizer
) -> None:
    raw = build.byte_level()
    a, b = raw.token_to_id("a"), raw.token_to_id("b")
    example = one(Row("f:1", "text", "", "ab"), make_tokenizer(raw), "all")
    assert example.ids.tolist() == [a, b, 1]
    assert example.targets().tolist() == [b, 1, -100]
    with_bos = make_tokenizer(build.begin_with_bos(raw), bos_token="<s>")
    assert one(Row("f:1", "text", "", "ab"), with_bos, "all").targets().tolist() == [a, b, 1, -100]


def test_merge_across_the_boundary(build: SimpleNamespace, make_tokenizer: MakeTokenizer) -> None:
    raw = build.byte_level([("b", "c"), ("a", "bc")])
    tokenizer, row = make_tokenizer(raw), pair("xab", "cy")
    assert raw.encode("xabcy").tokens == ["x", "abc", "y"]
    example = one(row, tokenizer)
    assert [raw.id_to_token(i) for i in example.ids] == ["x", "a", "b", "c", "y", "</s>"]
    assert example.boundary == "separate"
    check(example, row, tokenizer)


def test_merge_that_keeps_the_prompt_as_prefix_but_crosses(
    build: SimpleNamespace, make_tokenizer: MakeTokenizer
) -> None:
    # Both texts begin with <unk>, in the joint one it stands for characters of both sides.
    from tokenizers import Tokenizer as Raw
    from tokenizers import decoders, models

    vocab = {"<unk>": 0, "</s>": 1, "a": 2}
    raw = Raw(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", fuse_unk=True))
    raw.decoder = decoders.Fuse()
    (result,) = tokenize_rows([pair("?", "!a")], make_tokenizer(raw), "completion")
    assert isinstance(result, Rejection)
    assert result.reason == "no exact token boundary between prompt and completion"


def test_sentencepiece_space_is_not_invented(
    build: SimpleNamespace, make_tokenizer: MakeTokenizer
) -> None:
    raw = build.sentencepiece_like([("▁", "R"), ("▁R", "o")])
    tokenizer = make_tokenizer(raw)
    # The prompt ends with the space that the joint text merges into the first word.
    assert raw.encode("A: Rox").tokens == ["▁", "A", ":", "▁Ro", "x"]
    assert raw.encode("Rox").tokens == ["▁Ro", "x"]
    row = pair("A: ", "Rox")
    example = one(row, tokenizer)
    assert [raw.id_to_token(i) for i in example.ids] == (
        ["▁", "A", ":", "▁", "R", "o", "x", "</s>"]
    )
    assert example.boundary == "context"
    check(example, row, tokenizer)
    assert one(pair("A:", " Rox"), tokenizer).boundary == "joint"


def test_context_that_merges_is_passed_over(
    build: SimpleNamespace, make_tokenizer: MakeTokenizer
) -> None:
    raw = build.sentencepiece_like([("▁", "R"), ("\n", "R"), (".", "R")])
    row, tokenizer = pair("A: ", "R"), make_tokenizer(raw)
    example = one(row, tokenizer)
    assert example.boundary == "context"
    check(example, row, tokenizer)


def test_no_boundary_is_a_rejection_among_good_rows(
    build: SimpleNamespace, make_tokenizer: MakeTokenizer
) -> None:
    raw = build.sentencepiece_like([("a", "b"), *[(c, "b") for c in "\n.:0"]])
    raw.decoder = None  # decoding now joins tokens with spaces, so nothing apart equals the joint
    rows = [pair("x", "y", "f:1"), pair("a", "b", "f:2"), pair("x", "z", "f:3")]
    results = tokenize_rows(rows, make_tokenizer(raw), "completion")
    assert [type(result) for result in results] == [Example, Rejection, Example]
    assert [result.row_id for result in results] == ["f:1", "f:2", "f:3"]
    assert isinstance(results[1], Rejection)
    assert results[1].reason == "no exact token boundary between prompt and completion"


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Question: who?\nAnswer:", " Roxy"),
        ("Question: who?\nAnswer: ", "Roxy"),
        ("Question: who?\nAnswer:", "Roxy"),
        ("Question: who?\nAnswer:\n", "\nRoxy\n"),
        ("Question: who?\n\n", "\n\n Roxy "),
        ("un", "believable"),
        ("def f(x):\n    ", "    return x"),
        ("1 + 1 = 1", "2"),
        ("é", "è ☃☃ 😀"),
        ("☃", "☃☃"),
        ("a ", " b"),
        ("x", "'s"),
    ],
)
def test_real_tokenizers(real_tokenizer: Tokenizer, prompt: str, completion: str) -> None:
    row = pair(prompt, completion)
    example = one(row, real_tokenizer)
    check(example, row, real_tokenizer)
    assert asked(example, real_tokenizer).strip().startswith(completion.strip())


def test_combining_mark_across_the_boundary_is_rejected_or_exact(
    real_tokenizer: Tokenizer,
) -> None:
    row = pair("cafe", "\u0301 au lait")
    (result,) = tokenize_rows([row], real_tokenizer, "completion")
    if isinstance(result, Example):
        check(result, row, real_tokenizer)
    else:
        assert result.reason.startswith("no exact token boundary")


def test_real_rows_whatever_side_the_space_is_on(
    real_tokenizer: Tokenizer, shared_dir: Path
) -> None:
    with open(shared_dir / "data/tinystories_qa.jsonl", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    rows = [pair(r["prompt"], r["completion"]) for r in records]
    rows += [pair(r["prompt"] + " ", r["completion"].lstrip()) for r in records]
    for row, example in zip(rows, tokenize_rows(rows, real_tokenizer, "completion"), strict=True):
        assert isinstance(example, Example)
        check(example, row, real_tokenizer)


def test_gsm8k_boundaries(real_tokenizer: Tokenizer, shared_dir: Path) -> None:
    with open(shared_dir / "data/gsm8k/test.jsonl", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines][:300]
    rows = [
        Row(
            f"f:{n}", "question_answer", QUESTION_PROMPT.format(question=r["question"]), r["answer"]
        )
        for n, r in enumerate(records)
    ]
    for row, example in zip(rows, tokenize_rows(rows, real_tokenizer, "completion"), strict=True):
        assert isinstance(example, Example)
        assert example.boundary == "joint"
        end = real_tokenizer.decode([real_tokenizer.eos_id], skip_special_tokens=False)
        assert asked(example, real_tokenizer) == row.completion + end


def test_eos_once(build: SimpleNamespace, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(build.byte_level())
    plain, spelled = one(pair("a", "b"), tokenizer), one(pair("a", "b</s>"), tokenizer)
    assert plain.ids.tolist() == spelled.ids.tolist()
    assert plain.supervised.tolist() == spelled.supervised.tolist() == [False, True, True]


def test_bos_once(build: SimpleNamespace, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(build.begin_with_bos(build.byte_level()))
    plain, spelled = one(pair("a", "b"), tokenizer), one(pair("<s>a", "b"), tokenizer)
    assert plain.ids.tolist() == spelled.ids.tolist()
    assert plain.supervised.tolist() == spelled.supervised.tolist()
    assert one(pair("", "b"), tokenizer).supervised.tolist() == [False, True, True]


@pytest.mark.parametrize("compute_loss_on", ["all", "completion"])
def test_masks_do_not_look_at_pad_or_eos(
    build: SimpleNamespace, make_tokenizer: MakeTokenizer, compute_loss_on: LossOn
) -> None:
    # EOS inside prompt and completion, and the same id for padding.
    row = pair("a</s>b", "c</s>d")
    same = make_tokenizer(build.byte_level(), pad_token="</s>")
    other = make_tokenizer(build.byte_level(), pad_token="<pad>")
    assert same.pad_id == same.eos_id != other.pad_id
    example = one(row, same, compute_loss_on)
    prompt_flag = compute_loss_on == "all"
    assert example.supervised.tolist() == [False, prompt_flag, prompt_flag, True, True, True, True]
    assert example.targets().tolist() == one(row, other, compute_loss_on).targets().tolist()


def test_empty_prompt_without_bos(build: SimpleNamespace, make_tokenizer: MakeTokenizer) -> None:
    (result,) = tokenize_rows([pair("", "b")], make_tokenizer(build.byte_level()), "completion")
    assert isinstance(result, Rejection)
    assert result.reason == "empty prompt without BOS: nothing predicts the first token"


def test_completion_the_tokenizer_cannot_spell(
    build: SimpleNamespace, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = make_tokenizer(build.sentencepiece_like())  # no unknown token: é has no id
    (result,) = tokenize_rows([pair("a", "é")], tokenizer, "completion")
    assert isinstance(result, Rejection)
    assert result.reason == "completion has no tokens"


def test_settings_that_cannot_be(build: SimpleNamespace, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(build.byte_level())
    with pytest.raises(DataError, match="rows are plain text. Set dataset.compute_loss_on=all"):
        tokenize_rows([Row("f:1", "text", "", "t")], tokenizer, "completion")


def example_of(prompt: int, completion: int) -> Example:
    length = prompt + completion
    weights = (np.arange(length) >= prompt).astype(np.float32)
    rules = np.where(weights > 0, RULES.index("completion"), 0).astype(np.uint8)
    return Example("f:7", np.arange(length, dtype=np.int32), weights, rules, "joint")


def test_truncation_keeps_what_fits() -> None:
    fitting = example_of(3, 5)
    for truncation in ("drop", "left", "right", "split", "error"):
        assert fit_to_block(fitting, 8, truncation) is fitting


def test_truncation_drop_and_error() -> None:
    rejected = fit_to_block(example_of(3, 6), 8, "drop")
    assert rejected == Rejection("f:7", "longer than block_size", "9 tokens")
    with pytest.raises(DataError, match="f:7: the row has 9 tokens, dataset.block_size is 8"):
        fit_to_block(example_of(3, 6), 8, "error")


def test_truncation_right_keeps_only_rows_with_a_target() -> None:
    kept = fit_to_block(example_of(7, 6), 8, "right")
    assert isinstance(kept, Example)
    assert kept.truncated
    assert kept.ids.tolist() == list(range(8))
    assert kept.targets().tolist() == [-100] * 6 + [7, -100]
    rejected = fit_to_block(example_of(8, 6), 8, "right")
    assert isinstance(rejected, Rejection)
    assert rejected.reason == "no supervised token left after truncation"


def test_truncation_left_keeps_the_end_and_bos() -> None:
    long = example_of(7, 6)
    kept = fit_to_block(long, 8, "left")
    assert isinstance(kept, Example)
    assert kept.ids.tolist() == list(range(5, 13))
    assert kept.targets().tolist() == [-100, 7, 8, 9, 10, 11, 12, -100]
    rules = long.rules.copy()
    rules[0] = RULES.index("bos")
    kept = fit_to_block(replace(long, rules=rules), 8, "left")
    assert isinstance(kept, Example)
    assert kept.ids.tolist() == [0, *range(6, 13)]
    # All that is left is the one supervised token, first, with nothing to predict it.
    only = replace(long, weights=(np.arange(13) == 5).astype(np.float32))
    rejected = fit_to_block(only, 8, "left")
    assert isinstance(rejected, Rejection)
    assert rejected.reason == "no supervised token left after truncation"


def test_truncation_split_is_for_texts() -> None:
    text = replace(example_of(1, 20), divisible=True)
    assert fit_to_block(text, 8, "split") is text
    assert fit_to_block(example_of(3, 6), 8, "split") == Rejection(
        "f:7", "longer than block_size", "9 tokens"
    )


def test_rules_name_what_set_each_label(
    build: SimpleNamespace, make_tokenizer: MakeTokenizer
) -> None:
    tokenizer = make_tokenizer(build.begin_with_bos(build.byte_level()), bos_token="<s>")

    def rules(row: Row, mode: LossOn) -> list[str]:
        return [RULES[rule] for rule in one(row, tokenizer, mode).rules]

    row = pair("ab", "cd")
    ended = ["completion", "completion", "stop"]
    assert rules(row, "completion") == ["bos", "context", "context", *ended]
    assert rules(row, "auto") == rules(row, "completion")
    assert rules(row, "all") == ["bos", "all", "all", *ended]
    assert rules(Row("f:1", "text", "", "ab"), "auto") == ["bos", "all", "all", "stop"]


def test_row_weight_scales_the_loss(build: SimpleNamespace, make_tokenizer: MakeTokenizer) -> None:
    tokenizer = make_tokenizer(build.byte_level())
    example = one(replace(pair("a", "bc"), weight=2.5), tokenizer)
    assert example.weights.tolist() == [0, 2.5, 2.5, 2.5]
    (result,) = tokenize_rows([replace(pair("a", "b"), weight=0.0)], tokenizer, "completion")
    assert result == Rejection("f:1", "no supervised token", "the row's weight is 0")


# Averages over examples ---------------------------------------------------------------------------


def weighted(weights: list[float], row_weight: float) -> Example:
    count, of = len(weights), np.float32
    ids, rules = np.arange(count, dtype=np.int32), np.zeros(count, dtype=np.uint8)
    return Example("f:1", ids, np.asarray(weights, of), rules, "joint", row_weight=row_weight)


def test_an_examples_weights_add_up_to_its_rows() -> None:
    """A turn that counts twice still does so within its example."""
    found = averaged(weighted([0, 0, 3, 3, 6], row_weight=3)).weights
    assert found.dtype == np.float32
    assert found.tolist() == [0, 0, 0.75, 0.75, 1.5]


def test_a_first_token_that_nothing_predicts_does_not_count() -> None:
    """As after truncation on the left."""
    assert averaged(weighted([1, 1, 0, 1], row_weight=1)).weights[1:].tolist() == [0.5, 0, 0.5]


def test_a_truncated_example_is_averaged_over_what_is_left(
    build: SimpleNamespace, make_tokenizer: MakeTokenizer
) -> None:
    whole = one(pair("ab", "cdab"), make_tokenizer(build.byte_level()))
    kept = fit_to_block(whole, 4, "right")
    assert isinstance(kept, Example)
    assert averaged(kept).weights.tolist() == [0, 0, 0.5, 0.5]


def test_a_weight_too_small_for_fp32_stays_zero() -> None:
    assert averaged(weighted([0, 0, 0], row_weight=1e-60)).weights.tolist() == [0, 0, 0]
