"""Every answer as a server would feed it: prompt ids and answer ids, for every template there is.

The reference is transformers' renderer and the raw tokenizers library: the ids in front of an
answer are those of the prompt, rendered and tokenized alone, and what carries loss decodes to the
answer as the template writes it, or as the row has it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import data_settings
import numpy as np
import pytest
import tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

from torchprime.config.sections.dataset import Reasoning
from torchprime.data.blocks.chunks import Work
from torchprime.data.files.record import Rejection
from torchprime.data.messages.read import Message
from torchprime.data.rows.read import Row
from torchprime.data.shared.notes import RowNotes
from torchprime.data.templates import turns as turns_module
from torchprime.data.templates.choose import FAMILIES, FOLDER, resolve_template
from torchprime.data.templates.left_out import NO_REASONING, NO_TOOLS
from torchprime.data.templates.reasoning import REASON_NO_PLACE
from torchprime.data.templates.render import ChatTemplate, as_served, render
from torchprime.data.templates.turns import (
    REASON_LEFT_OUT,
    REASON_NO_SPAN,
    REASON_NOT_SERVED,
    REASON_REFUSED,
)
from torchprime.data.tokenizer.load import Tokenizer, load_tokenizer
from torchprime.data.tokens.borders import REASON_NOT_FED
from torchprime.data.tokens.branches import AUTO, BRANCH, branches, row_of
from torchprime.data.tokens.completions import Example
from torchprime.data.tokens.conversations import (
    REASON_NO_STOP,
    REASON_SPECIAL,
    ChatRules,
    tokenize_chat,
)

SHARED = Path(__file__).resolve().parents[4].parent / "shared" / "templates"
TEMPLATES = sorted(SHARED.rglob("*.jinja")) if SHARED.is_dir() else []
SOURCES = {name: FOLDER / f"{name}.jinja" for name in FAMILIES} | {
    f"{path.parent.name}/{path.stem}": path for path in TEMPLATES
}
# Control tokens of all these formats, so that one tokenizer serves them all.
CONTROL = (
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]",
    "[TOOL_CONTENT]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|begin_of_text|>",
    "<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>", "<|eom_id|>", "<|python_tag|>",
    "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>",
    "<|endoftext|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>",
    "<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|constrain|>",
    "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<｜tool▁calls▁begin｜>",
    "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>",
    "<｜tool▁outputs▁begin｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>",
    "<｜tool▁outputs▁end｜>", "<|observation|>", "[gMASK]", "<sop>", "<|im_sep|>",
)  # fmt: skip
TOOL = {
    "type": "function",
    "function": {
        "name": "tide_height",
        "description": "Height in metres",
        "parameters": {
            "type": "object",
            "properties": {"harbour": {"type": "string", "description": "where"}},
            "required": ["harbour"],
        },
    },
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(harbour: str) -> dict[str, Any]:
    function = {"name": "tide_height", "arguments": {"harbour": harbour}}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call00001", "type": "function", "function": function}],
    }


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": "call00001", "name": "tide_height"}


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], tuple[Mapping[str, Any], ...]]] = {
    "one turn": ([user("High water?"), assistant("At noon.")], ()),
    "three turns": (
        [user("Hi"), assistant("Yo."), user("Bye"), assistant("\n\nCiao."), user("?"),
         assistant("Gone.")],
        (),
    ),
    "system": (
        [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Yo."), user("Bye"),
         assistant("Ciao.")],
        (),
    ),
    "tools": (
        [user("Skerry?"), call("Skerry"), result("2.4 m"), assistant("2.4 metres."),
         user("And Hale?"), call("Hale"), result("1 m"), assistant("One metre.")],
        (TOOL,),
    ),
    "reasoning": (
        [user("2+2"), assistant("4", reasoning_content="two and two"), user("3+3"),
         assistant("6", reasoning_content="three and three")],
        (),
    ),
    "inline": (
        [user("2+2"), assistant("<think>\ntwo and two\n</think>\n\n4"), user("3+3"),
         assistant("<think>\nthree and three\n</think>\n\n6")],
        (),
    ),
}  # fmt: skip
# A template may refuse a role, and a tool template without tools; it may leave out tool calls.
ALLOWED = {REASON_REFUSED, REASON_LEFT_OUT, REASON_NO_PLACE, REASON_NO_SPAN, REASON_NOT_SERVED}
WANTS_TOOLS = {"llama.cpp/NousResearch-Hermes-3-Llama-3.1-8B-tool_use"}
WRITES_TOOLS = {"mistral", "mistral-small", "qwen2.5", "qwen3"} | {
    "trl/llama3_1", "trl/qwen3", "trl/gptoss",
}  # fmt: skip
# Asked, these open a think block: an answer without reasoning is not what is served.
OPENS_THINKING = {
    "llama.cpp/deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
    "trl/deepseekv3",
    "trl_training/deepseekv3_training",
}


def row(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), row_id: str = "f:1"
) -> Row:
    turns = tuple(map(Message, messages))
    return Row(row_id, "messages", messages=turns, tools=tuple(tools))


@pytest.fixture(scope="module")
def tokenizer(by_hand: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    raw = by_hand.byte_level(CONTROL)
    folder = tmp_path_factory.mktemp("tokenizer")
    return load_tokenizer(by_hand.save(raw, folder, {"bos_token": "<s>", "eos_token": "</s>"}))


@pytest.fixture(scope="module")
def raw_ids(tokenizer: Tokenizer) -> Callable[[str], list[int]]:
    raw = tokenizers.Tokenizer.from_file(str(tokenizer.folder / "tokenizer.json"))
    return lambda text: raw.encode(text, add_special_tokens=False).ids


def template_at(path: Path) -> ChatTemplate:
    return ChatTemplate("t", path.read_text(encoding="utf-8"), "<s>", "</s>")


def served_prompt(template: ChatTemplate, given: Row, turn: int) -> str:
    """By transformers alone."""
    messages = [m.template for m in given.messages[:turn]]
    return render_jinja_template(
        [[dict(message) for message in as_served(messages)]],
        tools=[dict(tool) for tool in given.tools] or None,
        chat_template=template.text,
        add_generation_prompt=True,
        bos_token="<s>",
        eos_token="</s>",
        **template.option_values,
    )[0][0]


def branch_examples(
    given: Row, tokenizer: Tokenizer, template: ChatTemplate, reasoning: Reasoning = "error"
) -> Iterator[tuple[Row, int, Example | Rejection]]:
    parts = branches(given)
    rules = ChatRules("last_assistant", reasoning)
    done = tokenize_chat(parts, tokenizer, template, rules)
    for part, result_ in zip(parts, done, strict=True):
        yield part, len(part.messages) - 1, result_


# The proof ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(SOURCES))
def test_every_answer_is_the_served_prompt_and_the_answer(
    name: str, tokenizer: Tokenizer, raw_ids: Callable[[str], list[int]]
) -> None:
    template = template_at(SOURCES[name])
    counts: Counter[str] = Counter()
    for label, (messages, tools) in CONVERSATIONS.items():
        for part, turn, found in branch_examples(
            row(messages, tools), tokenizer, template, "inline"
        ):
            if isinstance(found, Rejection):
                assert found.reason in ALLOWED, (label, found)
                continue
            counts[label] += 1
            first = int(np.flatnonzero(found.weights)[0])
            fed = raw_ids(served_prompt(template, part, turn))
            assert found.ids[:first].tolist() == fed, (label, turn)
            learned = found.weights > 0
            assert learned[first : first + learned.sum()].all()  # one run of tokens, to its stop
            said = tokenizer.decode(found.ids[learned].tolist(), skip_special_tokens=False)
            message = messages[turn]
            for wanted in (message["content"], message.get("reasoning_content", "")):
                body = wanted.rpartition("</think>")[2].strip()
                assert body in said, (label, turn, said)
            if message.get("tool_calls"):
                assert "tide_height" in said
            # After the prompt comes the finished turn, as the template writes it or, where a
            # server's prompt opens a think block, as the row does.
            finished = render(template, [m.template for m in part.messages], tools)
            prompt = served_prompt(template, part, turn)
            if "reasoning_content" not in message and finished.startswith(prompt):
                rest = finished[len(prompt) :]
                assert rest.startswith(said) or said == rest.rstrip() + "</s>", (label, said)
    plain = counts["one turn"] + counts["three turns"]
    assert plain == (0 if name in OPENS_THINKING | WANTS_TOOLS else 4)
    assert counts["tools"] == 4 or name not in WRITES_TOOLS
    if name not in WANTS_TOOLS:
        assert (counts["reasoning"], counts["inline"]) == (2, 2)


def test_whole_conversations_drop_reasoning_that_branches_train(tokenizer: Tokenizer) -> None:
    template = template_at(FOLDER / "qwen3.jinja")
    messages, _ = CONVERSATIONS["reasoning"]
    notes = RowNotes()
    (whole,) = tokenize_chat([row(messages)], tokenizer, template, notes=notes)
    assert isinstance(whole, Example)
    assert "two and two" not in tokenizer.decode(whole.ids.tolist())
    assert notes.to_dict()["noticed"][NO_REASONING]["count"] == 1
    texts = []
    for _, _, found in branch_examples(row(messages), tokenizer, template):
        assert isinstance(found, Example)
        texts.append(tokenizer.decode(found.ids[found.weights > 0].tolist(), False))
    assert texts == [
        "<think>\ntwo and two\n</think>\n\n4<|im_end|>",
        "<think>\nthree and three\n</think>\n\n6<|im_end|>",
    ]


def test_without_thinking_the_fed_think_block_is_context(tokenizer: Tokenizer) -> None:
    template = resolve_template("qwen3", tokenizer, options={"enable_thinking": False})
    assert template is not None
    given = row([user("2+2"), assistant("4")])
    (found,) = tokenize_chat([given], tokenizer, template)
    assert isinstance(found, Example)
    decode = lambda ids: tokenizer.decode(ids.tolist(), False)  # noqa: E731
    assert decode(found.ids[found.weights > 0]) == "4<|im_end|>"
    assert decode(found.ids[found.weights == 0]).endswith("<think>\n\n</think>\n\n\n")


def test_a_prompt_that_opens_a_think_block_takes_the_rows_own_words(
    shared_dir: Path, tokenizer: Tokenizer, raw_ids: Callable[[str], list[int]]
) -> None:
    name = "llama.cpp/deepseek-ai-DeepSeek-R1-Distill-Qwen-32B"
    template = template_at(shared_dir / "templates" / f"{name}.jinja")
    given = row([user("2+2"), assistant("4", reasoning_content="two and two")])
    (found,) = tokenize_chat(
        [given], tokenizer, template, ChatRules("last_assistant", reasoning="inline")
    )
    assert isinstance(found, Example)
    fed = served_prompt(template, given, 1)
    assert fed.endswith("<｜Assistant｜><think>\n")
    answer = "two and two\n</think>\n\n4<｜end▁of▁sentence｜>"
    assert found.ids.tolist() == raw_ids(fed) + raw_ids(answer)
    assert found.boundary == "answer, joint"
    silent = row([user("2+2"), assistant("4")])
    (refused,) = tokenize_chat([silent], tokenizer, template, ChatRules("last_assistant"))
    assert isinstance(refused, Rejection) and refused.reason == REASON_NOT_SERVED
    assert "<think>" in refused.detail


# Branches as rows ---------------------------------------------------------------------------------


def test_branches_are_one_row_for_each_answer_that_carries_loss() -> None:
    messages, tools = CONVERSATIONS["tools"]
    given = row(messages, tools)
    parts = branches(given)
    assert [part.row_id for part in parts] == ["f:1@2", "f:1@4", "f:1@6", "f:1@8"]
    assert [row_of(part.row_id) for part in parts] == ["f:1"] * 4
    assert [len(part.messages) for part in parts] == [2, 4, 6, 8]
    for part in parts:
        assert [m.weight for m in part.messages] == [0.0] * (len(part.messages) - 1) + [1.0]
        assert [m.template for m in part.messages] == messages[: len(part.messages)]
        assert part.tools is given.tools
    off = Row("f:2", "messages", messages=(Message(user("a")), Message(assistant("b"), 0.0)))
    assert branches(off) == []
    assert [part.row_id for part in branches(given, last_only=True)] == ["f:1@8"]


def test_a_branch_has_the_weight_of_its_answer() -> None:
    turns = (Message(user("a")), Message(assistant("b"), 0.5), Message(assistant("c"), 3.0))
    given = Row("f:1", "messages", messages=turns, weight=2.0)
    assert [(part.weight, part.messages[-1].weight) for part in branches(given)] == [
        (1.0, 1.0),
        (6.0, 1.0),
    ]


def work(tokenizer: Tokenizer, template: ChatTemplate, **settings: Any) -> Work:
    return Work(tokenizer, template, data_settings.settings(2048, **settings))


def test_auto_branches_only_what_no_single_sequence_trains(tokenizer: Tokenizer) -> None:
    # Asked for the second answer a server still shows the reasoning before the tool call.
    messages = [
        user("Skerry?"),
        call("Skerry") | {"reasoning_content": "why"},
        result("2 m"),
        assistant("2."),
        user("Thanks"),
        assistant("Sure."),
    ]
    template = template_at(FOLDER / "qwen3.jinja")
    rows = [row(messages, (TOOL,), "a"), row([user("Hi"), assistant("Yo.")], (), "b")]
    whole = work(tokenizer, template).run(rows)
    assert (whole.count, [r.reason for r in whole.rejected]) == (1, [REASON_NOT_SERVED])
    auto = work(tokenizer, template, turns=AUTO).run(rows)
    assert auto.examples is not None and not auto.rejected
    assert auto.examples.column("row_id").to_pylist() == ["a@2", "a@4", "a@6", "b"]
    branched = work(tokenizer, template, turns=BRANCH).run(rows)
    assert branched.examples is not None
    assert branched.examples.column("row_id").to_pylist() == ["a@2", "a@4", "a@6", "b@2"]


# Every turn's prefix ------------------------------------------------------------------------------


def test_a_later_turn_whose_header_merges_with_its_answer(
    by_hand: SimpleNamespace, tmp_path: Path
) -> None:
    # The pattern takes the header's line break and an answer's first one together.
    raw = by_hand.byte_level(("</s>", "<u>", "<a>"), [("Ċ", "Ċ")])
    folder = by_hand.save(raw, tmp_path / "t", {"eos_token": "</s>"})
    tokenizer = load_tokenizer(folder)
    text = (
        "{% for m in messages %}{{- '<' + m.role[0] + '>\n' + m.content + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{- '<a>\n' }}{% endif %}"
    )
    template = ChatTemplate("t", text, "", "</s>")

    def outcome(*answers: str) -> Example | Rejection:
        said = [m for a in answers for m in (user("q"), assistant(a))]
        return tokenize_chat([row(said)], tokenizer, template)[0]

    ids = raw.encode
    for first, second in (("a", "b"), ("a", "\nb")):
        found = outcome(first, second)
        assert isinstance(found, Example)
        start = np.flatnonzero(np.diff((found.weights > 0).astype(int)) == 1)[-1] + 1
        fed = f"<u>\nq</s><a>\n{first}</s><u>\nq</s><a>\n"
        assert found.ids[:start].tolist() == ids(fed).ids
    # Behind the cut in front of the first answer the second one's prefix is not the served one.
    refused = outcome("\na", "b")
    assert isinstance(refused, Rejection) and refused.reason == REASON_NOT_FED
    for part, turn, found in branch_examples(
        row([user("q"), assistant("\na"), user("q"), assistant("b")]), tokenizer, template
    ):
        assert isinstance(found, Example)
        first = int(np.flatnonzero(found.weights)[0])
        assert found.ids[:first].tolist() == ids(served_prompt(template, part, turn)).ids


def test_marks_are_compared_with_what_a_server_feeds(tokenizer: Tokenizer) -> None:
    # Mistral writes the system message into the last question, so earlier turns were asked with it.
    template = template_at(FOLDER / "mistral.jinja")
    messages, _ = CONVERSATIONS["system"]
    (refused,) = tokenize_chat([row(messages)], tokenizer, template)
    assert isinstance(refused, Rejection) and refused.reason == REASON_NOT_SERVED
    assert refused.detail.startswith("message 3: a server feeds ")
    assert "Be brief." in refused.detail
    done = [found for *_, found in branch_examples(row(messages), tokenizer, template)]
    assert all(isinstance(found, Example) for found in done)


@pytest.mark.parametrize("name", ["qwen3", "qwen2.5", "chatml", "llama3", "mistral"])
def test_structures_seen_before_change_nothing(
    name: str, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = template_at(FOLDER / f"{name}.jinja")
    rng = np.random.default_rng(0)
    pieces = ["Yo.", "", "a\n", "\n\nb", "<think>\nw\n</think>\n\nx", "</think>y"]
    pieces += ["<tool_response>z</tool_response>", "é"]
    rows = []
    for n in range(150):
        said: list[dict[str, Any]] = []
        for _ in range(int(rng.integers(1, 5))):
            said.append(user(str(rng.choice(pieces)) or "q"))
            if rng.random() < 0.3:
                said += [call("Skerry"), result("2")]
            more = {"reasoning_content": "why"} if rng.random() < 0.3 else {}
            said.append(assistant(str(rng.choice(pieces)), **more))
        rows.append(row(said, (TOOL,) if rng.random() < 0.5 else (), f"f:{n}"))
    seen = tokenize_chat(rows, tokenizer, template)
    assert turns_module._moved  # something was remembered
    seen = tokenize_chat(rows, tokenizer, template)  # all that can be is taken from there
    monkeypatch.setattr(turns_module, "structure_of", lambda *_: None)
    compared = tokenize_chat(rows, tokenizer, template)
    kinds = {type(found) for found in compared}
    assert kinds == {Example, Rejection}
    for one, other in zip(seen, compared, strict=True):
        if isinstance(other, Rejection):
            assert one == other
        else:
            assert isinstance(one, Example)
            assert (one.ids == other.ids).all() and (one.weights == other.weights).all()


# Turns left out by a template ---------------------------------------------------------------------


def test_tools_that_the_template_leaves_out_are_noticed(tokenizer: Tokenizer) -> None:
    notes = RowNotes()
    messages = CONVERSATIONS["one turn"][0]
    template = template_at(FOLDER / "zephyr.jinja")
    done = tokenize_chat([row(messages, (TOOL,))] * 3, tokenizer, template, notes=notes)
    assert all(isinstance(found, Example) for found in done)
    assert notes.to_dict()["noticed"] == {NO_TOOLS: {"count": 3, "row_id": "f:1", "example": ""}}


def test_reasoning_without_a_place(tokenizer: Tokenizer, shared_dir: Path) -> None:
    path = shared_dir / "cases/data/extra/reasoning_chatml.jsonl"
    given = row(json.loads(path.read_text().splitlines()[0])["messages"])
    template = template_at(FOLDER / "chatml.jinja")
    (refused,) = tokenize_chat([given], tokenizer, template)
    assert refused == Rejection("f:1", REASON_NO_PLACE, "message 2")
    wanted: dict[Reasoning, str]
    wanted = {"drop": "Eight.", "inline": "<think>\nFour each.\n</think>\n\nEight."}
    for policy, answer in wanted.items():
        (found,) = tokenize_chat([given], tokenizer, template, ChatRules(reasoning=policy))
        assert isinstance(found, Example)
        text = tokenizer.decode(found.ids[found.weights > 0].tolist(), False)
        assert text == f"{answer}<|im_end|>"


# Characters without loss, special tokens ----------------------------------------------------------


def test_masked_characters_carry_no_loss(tokenizer: Tokenizer) -> None:
    template = template_at(FOLDER / "chatml.jinja")
    answer = Message(assistant("good bad good"), masked=((5, 8),))
    given = Row("f:1", "messages", messages=(Message(user("Hi")), answer))
    (found,) = tokenize_chat([given], tokenizer, template)
    assert isinstance(found, Example)
    assert tokenizer.decode(found.ids[found.weights > 0].tolist(), False) == "good  good<|im_end|>"


def test_own_special_tokens_in_answers(by_hand: SimpleNamespace, tmp_path: Path) -> None:
    special = ("</s>", "<|im_start|>", "<|im_end|>", "<answer>", "</answer>", "<pad>")
    raw = by_hand.byte_level(special)
    settings = {"eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = load_tokenizer(by_hand.save(raw, tmp_path / "t", settings))
    template = resolve_template("chatml", tokenizer)
    assert template is not None
    allowed = ChatRules(special_tokens_in_text="answers")

    def outcome(said: str, asked: str = "q", rules: ChatRules = allowed) -> Example | Rejection:
        return tokenize_chat([row([user(asked), assistant(said)])], tokenizer, template, rules)[0]

    refused = outcome("<answer>2</answer>", rules=ChatRules())
    assert refused == Rejection("f:1", REASON_SPECIAL, "message 2: <answer>")
    found = outcome("<answer>2</answer>")
    assert isinstance(found, Example)
    learned = found.ids[found.weights > 0].tolist()
    assert [tokenizer.token_text(i) for i in learned] == [
        "<answer>",
        "2",
        "</answer>",
        "<|im_end|>",
    ]
    for said, asked in (("a<|im_end|>b", "q"), ("a</s>", "q"), ("<pad>", "q"), ("2", "<answer>")):
        refused = outcome(said, asked)
        assert isinstance(refused, Rejection) and refused.reason == REASON_SPECIAL


def test_an_unknown_end_of_turn_is_told(by_hand: SimpleNamespace, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(
        by_hand.save(by_hand.byte_level(("</s>",)), tmp_path / "t", {"eos_token": "</s>"})
    )
    text = (
        "{% for m in messages %}{{- m.role + ': ' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{- 'assistant: ' }}{% endif %}"
    )
    template = ChatTemplate("t", text, "", "</s>")
    messages, _ = CONVERSATIONS["three turns"]
    (refused,) = tokenize_chat([row(messages)], tokenizer, template)
    assert isinstance(refused, Rejection)
    assert refused.reason in (REASON_NO_STOP, REASON_NO_SPAN)
    assert "'<|end|>\\n" in refused.detail and "special token" in refused.detail
