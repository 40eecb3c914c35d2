"""Conversations become ids and labels: against text written by hand, against transformers' own
masks and against what a server would feed, encoded by the raw tokenizers library."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from torchprime.config.sections.dataset import LossOn
from torchprime.data.files.record import Rejection
from torchprime.data.messages.read import Message
from torchprime.data.rows.read import Row
from torchprime.data.templates.choose import FAMILIES, resolve_template
from torchprime.data.templates.render import ChatTemplate, render
from torchprime.data.templates.turns import REASON_LEFT_OUT, REASON_REFUSED
from torchprime.data.tokenizer.load import Tokenizer, load_tokenizer
from torchprime.data.tokens.borders import REASON_NOT_FED, REASON_TURN_BOUNDARY
from torchprime.data.tokens.branches import branches
from torchprime.data.tokens.completions import REASON_UNSUPERVISED, RULES, Example
from torchprime.data.tokens.conversations import (
    REASON_NO_PROMPT,
    REASON_NO_STOP,
    REASON_SPECIAL,
    REASON_TWO_BOS,
    ChatRules,
    tokenize_chat,
)
from torchprime.errors import DataError

MakeTokenizer = Callable[..., Tokenizer]
Messages = list[dict[str, Any]]

SETTINGS: dict[str, dict[str, Any]] = {
    "mistral_v3": {"bos_token": "<s>", "eos_token": "</s>"},
    "gpt2": {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"},
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


TWO_TURNS = [user("Hi"), assistant("Yo."), user("Bye"), assistant("Ciao.")]


def row(
    messages: Sequence[Mapping[str, Any]], weights: Sequence[float] = (), row_id: str = "f:1"
) -> Row:
    given = weights or [1.0] * len(messages)
    turns = tuple(Message(m, w) for m, w in zip(messages, given, strict=True))
    return Row(row_id, "messages", messages=turns, source="src")


@pytest.fixture(scope="session")
def real(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    """The tokenizers of ../shared; two of them lie there without their settings."""
    loaded: dict[str, Tokenizer] = {}

    def load(name: str) -> Tokenizer:
        if name not in loaded:
            folder = shared_dir / "tokenizers" / name
            if name in SETTINGS:
                target = tmp_path_factory.mktemp(name)
                (target / "tokenizer.json").symlink_to(folder / "tokenizer.json")
                (target / "tokenizer_config.json").write_text(json.dumps(SETTINGS[name]))
                folder = target
            loaded[name] = load_tokenizer(folder)
        return loaded[name]

    return load


def template_of(name: str | None, tokenizer: Tokenizer) -> ChatTemplate:
    found = resolve_template(name, tokenizer)
    assert found is not None
    return found


def example_of(
    given: Row, tokenizer: Tokenizer, template: ChatTemplate, mode: LossOn = "auto"
) -> Example:
    (result,) = tokenize_chat([given], tokenizer, template, ChatRules(mode))
    assert isinstance(result, Example), result
    check(result, given, tokenizer)
    return result


def check(example: Example, given: Row, tokenizer: Tokenizer) -> None:
    """Check the invariants of every example."""
    assert example.row_id == given.row_id
    assert example.source == given.source
    assert (example.ids.dtype, example.weights.dtype, example.rules.dtype) == (
        np.int32,
        np.float32,
        np.uint8,
    )
    assert len(example.ids) == len(example.weights) == len(example.rules)
    labelled = np.isin(example.rules, [RULES.index(r) for r in ("assistant", "stop", "all")])
    assert ((example.weights > 0) <= labelled).all()
    assert example.weights[0] == 0
    assert (example.rules[1:] != RULES.index("bos")).all() or tokenizer.bos_id is not None


def rejection_of(
    given: Row, tokenizer: Tokenizer, template: ChatTemplate, mode: LossOn = "auto"
) -> Rejection:
    (result,) = tokenize_chat([given], tokenizer, template, ChatRules(mode))
    assert isinstance(result, Rejection), result
    assert result.row_id == given.row_id
    return result


def pieces(example: Example, tokenizer: Tokenizer, *rules: str) -> list[str]:
    """The texts of the runs of tokens that these rules labelled."""
    chosen = np.isin(example.rules, [RULES.index(rule) for rule in rules])
    borders = np.flatnonzero(np.diff(np.concatenate([[0], chosen.astype(int), [0]])))
    return [
        tokenizer.decode(example.ids[a:b].tolist(), skip_special_tokens=False)
        for a, b in zip(borders[::2], borders[1::2], strict=True)
    ]


@lru_cache
def raw_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def raw_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The reference: tokenizer.json and nothing of ours."""
    return raw_tokenizer(tokenizer.folder).encode(text, add_special_tokens=False).ids


# Labels against hand-written text ----------------------------------------------------------------

QWEN = ["Yo.<|im_end|>", "Ciao.<|im_end|>"]
EXPECTED = [
    ("qwen3", "chatml", QWEN),
    ("qwen3", "qwen2.5", QWEN),
    ("qwen3", "qwen3", [QWEN[0], "<think>\n\n</think>\n\nCiao.<|im_end|>"]),
    ("qwen3", None, [QWEN[0], "<think>\n\n</think>\n\nCiao.<|im_end|>"]),
    ("qwen3", "vicuna", [" Yo.<|im_end|>", " Ciao.<|im_end|>"]),
    # "." and "<|" are one token in gpt2, so text and stop share it
    ("gpt2", "chatml", QWEN),
    ("gpt2", "alpaca", ["Yo.<|endoftext|>", "Ciao.<|endoftext|>"]),
    ("gpt2", "llama2", [" Yo. <|endoftext|>", " Ciao. <|endoftext|>"]),
    ("gpt2", "vicuna", [" Yo.<|endoftext|>", " Ciao.<|endoftext|>"]),
    ("mistral_v3", "mistral", ["  Yo.</s>", "  Ciao.</s>"]),
    ("mistral_v3", "llama2", ["  Yo. </s>", "  Ciao. </s>"]),
    ("mistral_v3", "zephyr", ["Yo.</s>", "Ciao.</s>"]),
    ("mistral_v3", "vicuna", ["Yo.</s>", "Ciao.</s>"]),
    ("mistral_v3", "alpaca", ["Yo.</s>", "Ciao.</s>"]),
    ("mistral_v3", "chatml", ["Yo.<|im_end|>", "Ciao.<|im_end|>"]),
]


@pytest.mark.parametrize(("name", "family", "expected"), EXPECTED)
def test_supervised_text(
    name: str, family: str | None, expected: list[str], real: Callable[[str], Tokenizer]
) -> None:
    tokenizer = real(name)
    template = template_of(family, tokenizer)
    example = example_of(row(TWO_TURNS), tokenizer, template)
    found = pieces(example, tokenizer, "assistant", "stop")
    if name == "mistral_v3":  # its decoder takes the first space off whatever it is given
        found, expected = [t.lstrip() for t in found], [t.lstrip() for t in expected]
    assert found == expected
    assert (example.weights[np.isin(example.rules, [3, 4])] == 1).all()
    whole = tokenizer.decode(example.ids.tolist(), skip_special_tokens=False)
    wanted = raw_ids(tokenizer, render(template, TWO_TURNS))
    assert whole == tokenizer.decode(wanted, skip_special_tokens=False)
    if example.boundary.endswith("joint"):
        assert example.ids.tolist() == wanted


# Not special here: the end of a turn merges with the next header, which a server feeds merged.
FOREIGN = [("llama3", "<|eot_id|>"), ("gemma", "<end_of_turn>")]


@pytest.mark.parametrize(("family", "stop"), FOREIGN)
def test_a_turn_whose_end_merges_with_the_next_header(
    family: str, stop: str, real: Callable[[str], Tokenizer]
) -> None:
    tokenizer = real("qwen3")
    template = template_of(family, tokenizer)
    assert rejection_of(row(TWO_TURNS), tokenizer, template).reason == REASON_NOT_FED
    for branch, said in zip(branches(row(TWO_TURNS)), ("Yo.", "Ciao."), strict=True):
        example = example_of(branch, tokenizer, template, "last_assistant")
        assert pieces(example, tokenizer, "assistant", "stop") == [said + stop]


def test_rules_token_by_token(real: Callable[[str], Tokenizer]) -> None:
    tokenizer = real("qwen3")
    messages = [*TWO_TURNS[:2], user("Now"), TWO_TURNS[3]]
    example = example_of(row(messages), tokenizer, template_of("qwen3", tokenizer))
    tokens = [tokenizer.token_text(i) for i in example.ids.tolist()]
    labelled = [(t, RULES[r]) for t, r in zip(tokens, example.rules, strict=True)]
    assert labelled == [
        *[(t, "context") for t in ("<|im_start|>", "user", "Ċ", "Hi", "<|im_end|>", "Ċ")],
        *[(t, "context") for t in ("<|im_start|>", "assistant", "Ċ")],
        *[("Yo", "assistant"), (".", "assistant"), ("<|im_end|>", "stop"), ("Ċ", "context")],
        *[(t, "context") for t in ("<|im_start|>", "user", "Ċ", "Now", "<|im_end|>", "Ċ")],
        *[(t, "context") for t in ("<|im_start|>", "assistant", "Ċ")],
        *[(t, "assistant") for t in ("<think>", "ĊĊ", "</think>", "ĊĊ", "C", "iao", ".")],
        *[("<|im_end|>", "stop"), ("Ċ", "context")],
    ]
    assert example.weights.tolist() == [
        float(rule in ("assistant", "stop")) for _, rule in labelled
    ]
    assert example.boundary == "marks, joint"


@pytest.mark.parametrize("family", ["chatml", "qwen2.5", "qwen3"])
def test_labels_are_transformers_own_mask(
    family: str, real: Callable[[str], Tokenizer], shared_dir: Path
) -> None:
    tokenizer = real("qwen3")
    template = template_of(family, tokenizer)
    theirs = PreTrainedTokenizerFast.from_pretrained(tokenizer.folder)
    lines = (shared_dir / "data" / "sgd_dev_messages.jsonl").read_text().splitlines()[:40:8]
    conversations: list[tuple[Messages, list[Any]]] = [(TWO_TURNS, [])]
    if family != "chatml":
        for record in map(json.loads, lines):
            for message in record["messages"]:  # transformers leaves arguments as they are
                for call in message.get("tool_calls", []):
                    arguments = call["function"]["arguments"]
                    call["function"]["arguments"] = json.loads(arguments)
                message["content"] = message["content"] or ""
            conversations.append((record["messages"], record["tools"]))
    for messages, tools in conversations:
        reference = theirs.apply_chat_template(
            messages,
            tools=tools or None,
            chat_template=template.text,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        given = replace(row(messages), tools=tuple(tools))
        example = example_of(given, tokenizer, template)
        assert example.ids.tolist() == reference["input_ids"]  # type: ignore[index]
        mask = reference["assistant_masks"]  # type: ignore[index]
        assert (example.weights > 0).astype(int).tolist() == mask


def test_real_tool_calls_with_the_tokenizers_own_template(
    real: Callable[[str], Tokenizer], shared_dir: Path
) -> None:
    tokenizer = real("qwen3")
    own, family = template_of(None, tokenizer), template_of("qwen3", tokenizer)
    lines = (shared_dir / "data" / "sgd_dev_messages.jsonl").read_text().splitlines()[:120:10]
    rows = [
        replace(row(record["messages"]), tools=tuple(record["tools"]))
        for record in map(json.loads, lines)
    ]
    derived = tokenize_chat(rows, tokenizer, own, ChatRules("auto"))
    marked = tokenize_chat(rows, tokenizer, family, ChatRules("auto"))
    for a, b in zip(derived, marked, strict=True):
        assert isinstance(a, Example)
        assert isinstance(b, Example)
        assert (a.ids.tolist(), a.weights.tolist()) == (b.ids.tolist(), b.weights.tolist())
        assert (a.boundary, b.boundary) == ("derived, joint", "marks, joint")


# A server's prompts -------------------------------------------------------------------------------

PIECES = st.sampled_from(list("aé😀 \n\t\r\u2028'\"{}<>/|[]#:.0") + ["[INST]", "<think>", " User"])
CONTENT = st.lists(PIECES, max_size=8).map("".join) | st.text(max_size=20)
COMBINATIONS = [(name, family) for name, family, _ in EXPECTED]
COMBINATIONS += [("qwen3", family) for family, _ in FOREIGN]
NOT_EXACT = (REASON_TURN_BOUNDARY, REASON_NOT_FED)


@pytest.mark.parametrize(("name", "family"), COMBINATIONS)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(contents=st.lists(CONTENT, min_size=4, max_size=4))
def test_prefix_is_what_a_server_feeds(
    name: str, family: str | None, contents: list[str], real: Callable[[str], Tokenizer]
) -> None:
    tokenizer = real(name)
    template = template_of(family, tokenizer)
    messages = [(assistant if i % 2 else user)(text) for i, text in enumerate(contents)]
    whole = tokenize_chat([row(messages)], tokenizer, template, ChatRules("assistant"))[0]
    last = tokenize_chat([row(messages)], tokenizer, template, ChatRules("last_assistant"))[0]
    for result, turns in ((whole, (1, 3)), (last, (3,))):
        if isinstance(result, Rejection):
            assert result.reason in (REASON_SPECIAL, REASON_UNSUPERVISED, *NOT_EXACT)
            continue
        check(result, row(messages), tokenizer)
        learned = (result.weights > 0).astype(int)
        starts = np.flatnonzero(np.diff(learned) == 1) + 1  # of every turn
        fed = [raw_ids(tokenizer, render(template, messages[:turn], (), True)) for turn in turns]
        assert [result.ids[:first].tolist() for first in starts] == fed
        # prompt and the rest are the whole conversation
        text = raw_ids(tokenizer, render(template, messages))
        decoded = [
            tokenizer.decode(ids, skip_special_tokens=False) for ids in (text, result.ids.tolist())
        ]
        assert decoded[0] == decoded[1]
        # each supervised turn ends with its stop token and nothing behind it
        stops = pieces(result, tokenizer, "stop")
        assert len(stops) == 4 // 2 if result is whole else 1


def test_an_answer_that_merges_with_its_header(real: Callable[[str], Tokenizer]) -> None:
    tokenizer = real("qwen3")
    template = template_of("chatml", tokenizer)
    messages = [user("Hi"), assistant("\n\nYo.")]
    joint = raw_ids(tokenizer, render(template, messages))
    example = example_of(row(messages), tokenizer, template)
    assert example.boundary == "marks, separate"
    assert example.ids.tolist() != joint
    fed = raw_ids(tokenizer, render(template, messages[:1], (), True))
    assert example.ids.tolist() == fed + raw_ids(tokenizer, "\n\nYo.<|im_end|>\n")
    assert pieces(example, tokenizer, "assistant", "stop") == ["\n\nYo.<|im_end|>"]


def test_pieces_after_a_neutral_character(real: Callable[[str], Tokenizer]) -> None:
    # Sentencepiece writes a space in front of a text encoded alone: "separate" is not the text.
    tokenizer = real("mistral_v3")
    text = "{% for m in messages %}{{ m.content }}{% endfor %}"
    messages = [user("foot"), assistant("ball")]
    joint = raw_ids(tokenizer, "football")
    example = example_of(row(messages), tokenizer, ChatTemplate("t", text, "<s>", "</s>"))
    fed = raw_ids(tokenizer, "foot")
    assert example.ids[: len(fed)].tolist() == fed
    assert joint[: len(fed)] != fed
    assert example.boundary == "derived, context"
    assert tokenizer.decode(example.ids[:-1].tolist()) == "football"


def test_a_prefix_that_is_tokenized_otherwise_alone(
    build: SimpleNamespace, make_tokenizer: MakeTokenizer
) -> None:
    # No token crosses the border, yet what follows changes the tokens in front of it.
    raw = build.byte_level([("a", "b")])
    split = pre_tokenizers.Split(tokenizers.Regex("a(?=bc)|ab|."), "isolated")
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    tokenizer = make_tokenizer(raw)
    assert [len(raw_ids(tokenizer, text)) for text in ("ab", "abc")] == [1, 3]
    for start in ("", "</s>"):  # the second has a special token in front
        text = start + "{% for m in messages %}{{ m.content }}{% endfor %}"
        messages = [user("ab"), assistant("c")]
        example = example_of(row(messages), tokenizer, ChatTemplate("t", text, "", "</s>"))
        assert example.ids.tolist() == raw_ids(tokenizer, start + "ab") + raw_ids(
            tokenizer, "c</s>"
        )
        assert example.boundary == "derived, separate"


def test_no_exact_boundary(build: SimpleNamespace, make_tokenizer: MakeTokenizer) -> None:
    raw = build.sentencepiece_like([("a", "b"), *[(c, "b") for c in "\n.:0"]])
    raw.decoder = None  # decoding joins tokens with spaces: nothing apart equals the joint
    template = ChatTemplate("t", "{% for m in messages %}{{ m.content }}{% endfor %}", "", "</s>")
    rows = [row([user(q), assistant(a)], row_id=q) for q, a in (("x", "y"), ("a", "b"), ("z", "y"))]
    results = tokenize_chat(rows, make_tokenizer(raw), template, ChatRules("auto"))
    assert [type(result) for result in results] == [Example, Rejection, Example]
    assert [result.row_id for result in results] == ["x", "a", "z"]
    assert results[1] == Rejection("a", REASON_TURN_BOUNDARY, "near 'ab'")


# Weights and modes -------------------------------------------------------------------------------


def test_last_assistant(real: Callable[[str], Tokenizer]) -> None:
    tokenizer = real("qwen3")
    template = template_of("chatml", tokenizer)
    example = example_of(row(TWO_TURNS), tokenizer, template, "last_assistant")
    assert pieces(example, tokenizer, "assistant", "stop") == ["Ciao.<|im_end|>"]
    assert pieces(example, tokenizer, "off") == []
    assert example.weights.sum() == len(raw_ids(tokenizer, "Ciao.<|im_end|>"))


def test_message_and_row_weights_multiply(real: Callable[[str], Tokenizer]) -> None:
    tokenizer = real("qwen3")
    template = template_of("chatml", tokenizer)
    given = replace(row(TWO_TURNS, [9, 0.5, 9, 2.0]), weight=3.0)
    example = example_of(given, tokenizer, template)
    supervised = example.weights[example.weights > 0]
    first, last = (len(raw_ids(tokenizer, text)) for text in QWEN)
    assert supervised.tolist() == [1.5] * first + [6.0] * last


def test_a_turn_with_weight_zero_is_off(real: Callable[[str], Tokenizer]) -> None:
    tokenizer = real("qwen3")
    template = template_of("chatml", tokenizer)
    example = example_of(row(TWO_TURNS, [1, 0, 1, 1]), tokenizer, template)
    assert pieces(example, tokenizer, "off") == ["Yo.<|im_end|>"]
    assert pieces(example, tokenizer, "assistant", "stop") == ["Ciao.<|im_end|>"]
    full = example_of(row(TWO_TURNS), tokenizer, template)
    assert example.ids.tolist() == full.ids.tolist()
    off = example.rules == RULES.index("off")
    assert (example.weights[off] == 0).all()


def test_all(real: Callable[[str], Tokenizer]) -> None:
    tokenizer = real("mistral_v3")
    template = template_of("llama2", tokenizer)
    given = replace(row(TWO_TURNS, [1, 0, 1, 4.0]), weight=0.5)
    example = example_of(given, tokenizer, template, "all")
    assert example.ids[0] == tokenizer.bos_id
    rules = [RULES[rule] for rule in example.rules]
    # every question of this format begins with BOS, and none of them is to be predicted
    assert [i for i, rule in enumerate(rules) if rule == "bos"] == np.flatnonzero(
        example.ids == tokenizer.bos_id
    ).tolist()
    assert rules.count("bos") == 2
    weights = {
        rule: {w for r, w in zip(rules, example.weights, strict=True) if r == rule}
        for rule in set(rules)
    }
    assert weights == {"bos": {0.0}, "all": {0.5}, "off": {0.0}, "assistant": {2.0}, "stop": {2.0}}


def test_all_without_assistant_turns(real: Callable[[str], Tokenizer]) -> None:
    tokenizer = real("qwen3")
    example = example_of(row([user("Hi")]), tokenizer, template_of("chatml", tokenizer), "all")
    assert example.weights.tolist() == [0, *[1.0] * (len(example.ids) - 1)]
    assert [RULES[rule] for rule in example.rules[:2]] == ["context", "all"]


def test_nothing_supervised(real: Callable[[str], Tokenizer]) -> None:
    tokenizer = real("qwen3")
    template = template_of("chatml", tokenizer)
    for empty, detail in (
        (row([user("Hi")]), "no assistant message"),
        (row(TWO_TURNS, [1, 0, 1, 0]), "every assistant turn has weight 0"),
        (replace(row(TWO_TURNS), weight=0.0), "the row's weight is 0"),
    ):
        assert rejection_of(empty, tokenizer, template) == Rejection(
            "f:1", REASON_UNSUPERVISED, detail
        )
    last_off = row(TWO_TURNS, [1, 1, 1, 0])
    assert rejection_of(last_off, tokenizer, template, "last_assistant").reason == (
        REASON_UNSUPERVISED
    )
    zero = replace(row(TWO_TURNS), weight=0.0)
    assert rejection_of(zero, tokenizer, template, "all").reason == REASON_UNSUPERVISED


def test_a_mode_that_makes_no_sense(real: Callable[[str], Tokenizer]) -> None:
    tokenizer = real("qwen3")
    template, rules = template_of("chatml", tokenizer), ChatRules("completion")
    with pytest.raises(DataError, match="compute_loss_on=completion"):
        tokenize_chat([row(TWO_TURNS)], tokenizer, template, rules)


# BOS, EOS and special tokens ---------------------------------------------------------------------

BARE = "{% for m in messages %}{{- '<|' + m.role + '|>' + m.content + '\n' }}{% endfor %}"
BARE += "{% if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"


def test_last_turn_without_a_stop_token_gets_eos(real: Callable[[str], Tokenizer]) -> None:
    tokenizer = real("gpt2")
    template = ChatTemplate("t", BARE, "", "<|endoftext|>")
    messages = TWO_TURNS[:2]
    example = example_of(row(messages), tokenizer, template)
    wanted = raw_ids(tokenizer, "<|user|>Hi\n<|assistant|>Yo.<|endoftext|>")
    assert example.ids.tolist() == wanted
    assert pieces(example, tokenizer, "assistant") == ["Yo."]
    assert pieces(example, tokenizer, "stop") == ["<|endoftext|>"]
    assert example.weights[-1] == 1


def test_the_next_messages_role_token_ends_an_answer_that_no_token_closes(
    by_hand: SimpleNamespace, tmp_path: Path
) -> None:
    """GLM-4's format, by the shipped template and by one without marks; EOS ends the last."""
    roles = FAMILIES["glm4"]
    raw = by_hand.byte_level(("<|endoftext|>", *roles))
    tokenizer = load_tokenizer(by_hand.save(raw, tmp_path / "t", {"eos_token": "<|endoftext|>"}))
    own = (
        "{{- '[gMASK]<sop>' }}{% for m in messages %}{{- '<|' + m.role + '|>\n' + m.content }}"
        "{% endfor %}{% if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"
    )
    shipped = resolve_template("glm4", tokenizer)
    assert shipped is not None and not shipped.warnings
    for template in (shipped, ChatTemplate("t", own, "", "<|endoftext|>")):
        example = example_of(row(TWO_TURNS), tokenizer, template)
        assert pieces(example, tokenizer, "assistant") == ["\nYo.", "\nCiao."]
        assert pieces(example, tokenizer, "stop") == ["<|user|>", "<|endoftext|>"]


def test_turns_without_a_stop_token(real: Callable[[str], Tokenizer]) -> None:
    tokenizer = real("gpt2")
    template = ChatTemplate("t", BARE, "", "<|endoftext|>")
    found = rejection_of(row(TWO_TURNS), tokenizer, template)
    assert found == Rejection("f:1", REASON_NO_STOP, "message 2")
    marked = (
        "u{% if messages[1] %}{% generation %}{{ messages[1].content }}{% endgeneration %}{end}"
        "{% endif %}"
    )
    more = ChatTemplate("t", marked, "", "<|endoftext|>")
    assert rejection_of(row(TWO_TURNS[:2]), tokenizer, more).reason == REASON_NO_STOP
    followed = row(TWO_TURNS[:3])
    assert rejection_of(followed, tokenizer, template).reason == REASON_NO_STOP
    # a turn that is not trained on needs none
    cases: list[tuple[Row, LossOn]]
    cases = [(row(TWO_TURNS, [1, 0, 1, 1]), "auto"), (row(TWO_TURNS), "last_assistant")]
    for chat, mode in cases:
        example = example_of(chat, tokenizer, template, mode)
        assert pieces(example, tokenizer, "assistant", "stop") == ["Ciao.<|endoftext|>"]


def test_bos_is_the_templates_and_once(real: Callable[[str], Tokenizer]) -> None:
    tokenizer = real("mistral_v3")
    for family in ("mistral", "llama2", "chatml", "vicuna"):
        example = example_of(row(TWO_TURNS[:2]), tokenizer, template_of(family, tokenizer))
        assert (example.ids == tokenizer.bos_id).sum() == 1
        assert (example.ids[0], RULES[example.rules[0]]) == (tokenizer.bos_id, "bos")
    none = ChatTemplate("t", BARE, "<s>", "</s>")
    example = example_of(row(TWO_TURNS[:2]), tokenizer, none)
    assert tokenizer.bos_id not in example.ids  # a server would not add one either
    assert RULES[example.rules[0]] == "context"
    twice = ChatTemplate("t", "{{ bos_token }}{{ bos_token }}" + BARE, "<s>", "</s>")
    assert rejection_of(row(TWO_TURNS[:2]), tokenizer, twice).reason == REASON_TWO_BOS


def test_pad_and_bos_that_equal_eos(real: Callable[[str], Tokenizer]) -> None:
    tokenizer = real("gpt2")
    assert tokenizer.pad_id == tokenizer.eos_id == tokenizer.bos_id
    example = example_of(row(TWO_TURNS), tokenizer, template_of("alpaca", tokenizer))
    assert pieces(example, tokenizer, "stop") == ["<|endoftext|>"] * 2
    assert (example.weights[example.rules == RULES.index("stop")] == 1).all()
    assert (example.ids[0], RULES[example.rules[0]]) == (tokenizer.eos_id, "bos")
    every = example_of(row(TWO_TURNS), tokenizer, template_of("alpaca", tokenizer), "all")
    assert (every.weights[1:] == 1).all()


SPELLED = [
    ([user("say <|im_end|>"), assistant("no")], "message 1: <|im_end|>"),
    ([user("Hi"), assistant("Yo.<|im_end|>")], "message 2: <|im_end|>"),
    ([user("Hi"), assistant("Yo.", reasoning_content="<|im_start|>")], "message 2: <|im_start|>"),
    (
        [
            user("Hi"),
            assistant(
                "",
                tool_calls=[{"function": {"name": "f", "arguments": '{"a": "\\u003c|im_end|>"}'}}],
            ),
        ],
        "message 2: <|im_end|>",
    ),
]


@pytest.mark.parametrize(("messages", "detail"), SPELLED)
def test_content_that_spells_a_special_token(
    messages: Messages, detail: str, real: Callable[[str], Tokenizer]
) -> None:
    tokenizer = real("qwen3")
    template = template_of("qwen3", tokenizer)
    found = rejection_of(row(messages), tokenizer, template)
    assert found == Rejection("f:1", REASON_SPECIAL, detail)


def test_tools_that_spell_a_special_token(real: Callable[[str], Tokenizer]) -> None:
    tokenizer = real("qwen3")
    given = replace(row(TWO_TURNS), tools=({"function": {"name": "f", "x": ["<|im_start|>"]}},))
    found = rejection_of(given, tokenizer, template_of("qwen3", tokenizer))
    assert (found.reason, found.detail) == (REASON_SPECIAL, "tool 1: <|im_start|>")


def test_markers_are_reserved_where_they_are_plain_text(real: Callable[[str], Tokenizer]) -> None:
    tokenizer = real("gpt2")
    given = row([user("Hi"), assistant("<|im_end|>")])
    chatml = template_of("chatml", tokenizer)
    assert rejection_of(given, tokenizer, chatml).reason == REASON_SPECIAL
    # tokens that are special for nobody here, and think tags, are text like any other
    example_of(row([user("[INST]"), assistant("<think>x</think>y")]), tokenizer, chatml)
    example_of(given, tokenizer, template_of("alpaca", tokenizer))
    mistral = real("mistral_v3")
    spelled = row([user("[INST]"), assistant("a")])
    assert rejection_of(spelled, mistral, template_of("llama2", mistral)).reason == REASON_SPECIAL


def test_refusals_pass_through(real: Callable[[str], Tokenizer]) -> None:
    tokenizer = real("qwen3")
    system = row([{"role": "system", "content": "x"}, *TWO_TURNS])
    found = rejection_of(system, tokenizer, template_of("gemma", tokenizer))
    assert found == Rejection("f:1", REASON_REFUSED, "gemma has no system role")
    left_out = ChatTemplate("t", "u{% generation %}a{% endgeneration %}", "", "<|im_end|>")
    found = rejection_of(row(TWO_TURNS[:2]), tokenizer, left_out)
    assert found.reason == REASON_LEFT_OUT


def test_a_conversation_that_begins_with_the_answer(real: Callable[[str], Tokenizer]) -> None:
    tokenizer = real("qwen3")
    text = "{% generation %}{{ messages[0].content }}<|im_end|>{% endgeneration %}"
    template = ChatTemplate("t", text, "", "<|im_end|>")
    found = rejection_of(row([assistant("Yo.")]), tokenizer, template)
    assert found.reason == REASON_NO_PROMPT
    # with a header in front something predicts it
    chatml = template_of("chatml", tokenizer)
    example = example_of(row([assistant("Yo.")]), tokenizer, chatml)
    assert pieces(example, tokenizer, "assistant", "stop") == ["Yo.<|im_end|>"]


def test_results_keep_their_order(real: Callable[[str], Tokenizer]) -> None:
    tokenizer = real("qwen3")
    template = template_of("chatml", tokenizer)
    rows = [
        row(TWO_TURNS, row_id="a"),
        row([user("<|im_end|>")], row_id="b"),
        row([user("Hi"), assistant("\nYo.")], row_id="c"),
        row([user("Hi")], row_id="d"),
        row(TWO_TURNS[:2], row_id="e"),
    ]
    results = tokenize_chat(rows, tokenizer, template, ChatRules("auto"))
    assert [(type(r).__name__, r.row_id) for r in results] == [
        ("Example", "a"),
        ("Rejection", "b"),
        ("Example", "c"),
        ("Rejection", "d"),
        ("Example", "e"),
    ]
    for chat, result in zip(rows, results, strict=True):
        (alone,) = tokenize_chat([chat], tokenizer, template, ChatRules("auto"))
        if isinstance(result, Example):
            assert isinstance(alone, Example)
            assert alone.ids.tolist() == result.ids.tolist()
            assert alone.weights.tolist() == result.weights.tolist()
    assert tokenize_chat([], tokenizer, template, ChatRules("auto")) == []
