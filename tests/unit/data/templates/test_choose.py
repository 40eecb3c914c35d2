"""Chat templates: shipped ones against the well-known originals, spans against hand-written text.

The originals lie in ../shared/templates and are rendered by the same jinja environment; what a
span has to be is written out here by hand, or found a second way (marks against derivation).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprime.data.files.record import Rejection
from torchprime.data.messages.read import Message
from torchprime.data.rows.read import Row
from torchprime.data.templates.choose import FAMILIES, FOLDER, resolve_template
from torchprime.data.templates.reasoning import reasoning_policy
from torchprime.data.templates.render import ChatTemplate, TemplateRefusal, as_served, render
from torchprime.data.templates.turns import (
    REASON_LEFT_OUT,
    REASON_MARKS,
    REASON_NO_SPAN,
    REASON_NOT_SERVED,
    REASON_REFUSED,
    Rendering,
    turn_spans,
)
from torchprime.data.tokenizer.load import Tokenizer, load_tokenizer
from torchprime.errors import DataError

MakeTokenizer = Callable[..., Tokenizer]
Messages = list[dict[str, Any]]

ORIGINALS = {
    "chatml": ("axolotl/chatml",),
    "llama3": ("trl/llama3", "axolotl/llama3"),
    "mistral": ("axolotl/mistral_v2v3",),
    "qwen2.5": ("trl/qwen2_5", "llama.cpp/Qwen-Qwen2.5-7B-Instruct"),
    "qwen3": ("trl/qwen3",),
    "gemma": ("trl/gemma", "axolotl/gemma", "llama.cpp/google-gemma-2-2b-it"),
    "gemma3": ("trl/gemma3",),
    "alpaca": ("axolotl/alpaca",),
    "gpt-oss": ("trl/gptoss",),
}
PAIRS = [(family, name) for family, names in ORIGINALS.items() for name in names]

# Every special token of the formats tested here.
STOPS = frozenset(
    ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "[TOOL_CALLS]"]
    + ["[AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[TOOL_CONTENT]"]
    + ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>"]
    + ["<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|endoftext|>"]
    + ["<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>", "<|START_OF_TURN_TOKEN|>"]
    + ["<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|START_RESPONSE|>"]
    + ["<|im_sep|>", "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"]
    + ["<|start|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"]
    + ["[gMASK]", "<sop>", "<|observation|>"]
)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells é",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def calls(*names: str, arguments: Any = None) -> dict[str, Any]:
    given = {"city": 'B"é', "days": [1, None]} if arguments is None else arguments
    return {
        "tool_calls": [
            {
                "id": "call00001",
                "type": "function",
                "function": {"name": name, "arguments": given},
            }
            for name in names
        ]
    }


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text, "tool_call_id": "call00001", "name": "weather"}


PLAIN: dict[str, Messages] = {
    "question": [user("Hi")],
    "answered": [user(" Hi\n"), assistant("\n\nYo. \n")],
    "two turns": [user("Hi"), assistant("Yo."), user("Bye"), assistant("Ciao.")],
    "open": [user("Hi"), assistant("Yo."), user("Bye")],
    "unicode": [user("déjà \u2028 vu"), assistant("😀\n\n[INST] e\u0301")],
    "empty answer": [user("Hi"), assistant("")],
}
SYSTEM: dict[str, Messages] = {
    "system": [system("Be brief.\n"), user("Hi"), assistant("Yo.")],
    "system, open": [system("Be brief."), user("Hi"), assistant("Yo."), user("Bye")],
    "only system": [system("Be brief."), user("Hi")],
}
TOOLS: dict[str, Messages] = {
    "call": [user("Rain?"), assistant(None, **calls("weather")), tool("no"), assistant("No.")],
    "two calls": [
        user("Rain?"),
        assistant("", **calls("weather", "sun")),
        tool("no"),
        tool("yes"),
        assistant("No."),
        user("Now?"),
        assistant(None, **calls("weather")),
    ],
    "offered": [user("Hi"), assistant("Yo."), user("Bye")],
}
TEXT_AND_CALL: Messages = [
    system("Be brief."),
    user("Rain?"),
    assistant("Let me see.", **calls("weather", "sun")),
    tool("no"),
    tool("yes"),
    assistant("No."),
]
REASONING: dict[str, Messages] = {
    "field": [
        user("Hi"),
        assistant("Yo.", reasoning_content="\nwhy1\n"),
        user("Rain?"),
        assistant("\nLook.", reasoning_content="why2", **calls("weather")),
        tool("no"),
        assistant("No.", reasoning_content="why3"),
    ],
    "inline": [
        user("Hi"),
        assistant("<think>\nwhy1\n</think>\n\nYo."),
        user("Bye"),
        assistant("<think>\nwhy2\n</think>\n\n\nCiao.\n"),
    ],
    "tool's answer as user": [
        user("Rain?"),
        assistant("Look.", reasoning_content="why1"),
        user("<tool_response>no</tool_response>"),
        assistant("No.", reasoning_content="why2"),
    ],
}


def make(text: str) -> ChatTemplate:
    date = "2026-11-29" if "strftime_now" in text else ""
    return ChatTemplate("test", text, "<s>", "</s>", date=date)


def family(name: str) -> ChatTemplate:
    return make((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))


def original(shared_dir: Path, name: str) -> ChatTemplate:
    return make((shared_dir / "templates" / f"{name}.jinja").read_text(encoding="utf-8"))


def without_marks(template: ChatTemplate) -> ChatTemplate:
    text = re.sub(r"\{%- generation %\}", "{%- if true %}", template.text)
    return make(text.replace("{%- endgeneration %}", "{%- endif %}"))


def row(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> Row:
    return Row("f:1", "messages", messages=tuple(map(Message, messages)), tools=tuple(tools))


def spans_of(template: ChatTemplate, messages: Messages, tools: Sequence[Any] = ()) -> list[str]:
    found = turn_spans(template, row(messages, tools), STOPS)
    assert isinstance(found, Rendering), found
    return [found.text[span.start : span.end] for span in found.spans]


def rejected(template: ChatTemplate, messages: Messages) -> Rejection:
    found = turn_spans(template, row(messages), STOPS)
    assert isinstance(found, Rejection)
    return found


# Renderings of the shipped families --------------------------------------------------------------


@pytest.mark.parametrize(("name", "source"), PAIRS)
@pytest.mark.parametrize("ask", [False, True])
def test_family_renders_as_the_original(
    name: str, source: str, ask: bool, shared_dir: Path
) -> None:
    ours, theirs = family(name), original(shared_dir, source)
    conversations = dict(PLAIN)
    if name not in ("gemma", "mistral"):
        conversations |= SYSTEM
    for label, messages in conversations.items():
        assert render(ours, messages, (), ask) == render(theirs, messages, (), ask), label


@pytest.mark.parametrize("ask", [False, True])
def test_phi4_renders_chats_with_a_system_message_as_phi_4_reasoning(
    ask: bool, shared_dir: Path
) -> None:
    """The original of the reasoning model differs by its default system message only."""
    ours, theirs = family("phi4"), original(shared_dir, "axolotl/phi_4")
    for label, messages in SYSTEM.items():
        assert render(ours, messages, (), ask) == render(theirs, messages, (), ask).lstrip(), label


def test_smollm3_without_thinking() -> None:
    """By the option and by the system message; its whole text with /system_override."""
    header = SMOLLM_HEADER + "Reasoning Mode: /no_think\n\n## Custom Instructions\n\n"
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n"
    persona = "You are a helpful AI assistant named SmolLM, trained by Hugging Face."
    plain = dataclasses.replace(family("smollm3"), options=(("enable_thinking", "false"),))
    assert render(plain, [user("Hi")], (), True) == f"{header}{persona}\n\n{asked}"
    chat = [system("/no_think Be."), user("Hi")]
    assert render(family("smollm3"), chat, (), True) == f"{header} Be.\n\n{asked}"
    chat = [system("Be. /system_override"), user("Hi"), assistant("\nYo.")]
    assert render(family("smollm3"), chat) == (
        "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYo.<|im_end|>\n"
    )


def test_gpt_oss_reasoning_of_the_last_answer(shared_dir: Path) -> None:
    ours, theirs = family("gpt-oss"), original(shared_dir, "trl/gptoss")
    chat = [
        user("Hi"),
        assistant("Yo.", thinking="w1"),
        user("Bye"),
        assistant("No", thinking="w2"),
    ]
    assert render(ours, chat) == render(theirs, chat)
    ours_text = [
        {**m, "reasoning_content": m.pop("thinking")} if "thinking" in m else m for m in chat
    ]
    assert render(ours, ours_text).endswith(
        "<|start|>assistant<|channel|>analysis<|message|>w2<|end|>"
        "<|start|>assistant<|channel|>final<|message|>No<|return|>"
    )


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3", "mistral"])
@pytest.mark.parametrize("ask", [False, True])
def test_family_renders_tools_as_the_original(name: str, ask: bool, shared_dir: Path) -> None:
    ours, theirs = family(name), original(shared_dir, ORIGINALS[name][0])
    conversations = dict(TOOLS)
    if name != "mistral":
        conversations["text and call"] = TEXT_AND_CALL
    for label, messages in conversations.items():
        for tools in ((TOOL, TOOL), ()):
            ours_text = render(ours, messages, tools, ask)
            assert ours_text == render(theirs, messages, tools, ask), label
            assert "weather" in ours_text or not (tools or "call" in label)


# Every kind of schema that the original of gpt-oss writes as a TypeScript type.
PROPERTIES: dict[str, dict[str, Any]] = {
    "text": {"type": "string", "nullable": True},
    "choice": {"type": "string", "enum": ["a", "b"], "description": "One", "default": "a"},
    "count": {"type": "integer", "default": 3},
    "share": {"type": "number"},
    "yes": {"type": "boolean"},
    "texts": {"type": "array", "items": {"type": "string", "enum": ["a"]}, "nullable": True},
    "objects": {"type": "array", "items": {"type": "object", "properties": {"a": {}}}},
    "wide": {"type": "array", "items": {"type": "object", "properties": {"a" * 50: {}}}},
    "list": {"type": "array"},
    "either": {"type": ["string", "null"]},
    "one": {"type": ["string"]},
    "object": {"type": "object"},
    "nested": {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["b"]},
    "kinds": {"oneOf": [{"type": "string", "description": "A"}, {"type": "object", "default": 2}]},
    "set": {"oneOf": [{"type": "number"}], "default": "q"},
    "any": {},
}


@pytest.mark.parametrize("ask", [False, True])
def test_gpt_oss_renders_tools_as_the_original(ask: bool, shared_dir: Path) -> None:
    ours, theirs = family("gpt-oss"), original(shared_dir, "trl/gptoss")
    parameters = {"type": "object", "properties": PROPERTIES, "required": ["count", "list"]}
    many = {"name": "many", "description": "All", "parameters": parameters}
    bare = {"name": "bare", "description": "None"}
    empty = {**bare, "parameters": {"type": "object", "properties": {}}}
    tools = [TOOL, *({"type": "function", "function": each} for each in (many, bare, empty))]
    called = [user("Rain?"), assistant("Let me see.", **calls("weather")), tool('no "é"')]
    thought = [user("Rain?"), assistant("", thinking="w1", **calls("many")), tool("no")]
    conversations = (PLAIN | SYSTEM) | {
        "offered": TOOLS["offered"],
        "open call": called,
        "call": [*called, assistant("No.", thinking="w2")],
        "thought": thought,
        "calls": [*called, *thought[1:], assistant("No."), *called],
    }
    for label, messages in conversations.items():
        for offered in ((), tools):
            found = render(ours, messages, offered, ask)
            assert found == render(theirs, messages, offered, ask), label


def test_gpt_oss_tool_call_spans() -> None:
    """Of a call its recipient is learned; without marks the same is derived."""
    messages = TOOLS["call"]
    for template in (family("gpt-oss"), without_marks(family("gpt-oss"))):
        assert spans_of(template, messages, [TOOL]) == [
            " to=functions.weather<|channel|>commentary json<|message|>"
            '{"city": "B\\"é", "days": [1, null]}<|call|>',
            "<|channel|>final<|message|>No.<|return|>",
        ]
    with pytest.raises(TemplateRefusal, match="one tool call in a message"):
        render(family("gpt-oss"), TOOLS["two calls"])


def test_granite_offers_tools() -> None:
    """As Granite 3.3: behind the system message, which without one of its own explains them."""
    listed = json.dumps([TOOL], indent=4, ensure_ascii=False)
    offered = f"<|start_of_role|>available_tools<|end_of_role|>{listed}<|end_of_text|>\n"
    asked = "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n"
    told = render(family("granite"), [system("Be."), user("Hi")], [TOOL])
    assert told == (f"<|start_of_role|>system<|end_of_role|>Be.<|end_of_text|>\n{offered}{asked}")
    explained = (
        " You are a helpful assistant with access to the following tools. When a tool is required "
        "to answer the user's query, respond only with <|tool_call|> followed by a JSON list of "
        "tools used. If a tool does not exist in the provided list of tools, notify the user that "
        "you do not have the ability to fulfill the request."
    )
    default = GRANITE_SYSTEM.replace(" You are a helpful AI assistant.", explained)
    assert render(family("granite"), [user("Hi")], [TOOL]) == default + offered + asked
    with_result = render(family("granite"), [user("Hi"), {"role": "tool", "content": "4"}], [TOOL])
    assert with_result.endswith("<|start_of_role|>tool<|end_of_role|>4<|end_of_text|>\n")


def test_glm4_tools() -> None:
    """As GLM-4-0414, whose callers write a call as `metadata` (the name) and content."""
    schema = json.dumps(TOOL["function"], indent=4, ensure_ascii=False)
    one = f"\n## weather\n\n{schema}\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
    offered = f"[gMASK]<sop><|system|>\n# 可用工具\n{one}{one}"
    asked = "<|system|>\nBe.<|user|>\nHi<|assistant|>"
    messages = [system("Be."), user("Hi")]
    assert render(family("glm4"), messages, [TOOL, TOOL], True) == offered + asked
    called = 'weather\n{"city": "B\\"é", "days": [1, null]}<|observation|>'
    assert render(family("glm4"), TOOLS["call"]) == (
        f"[gMASK]<sop><|user|>\nRain?<|assistant|>{called}\nno<|assistant|>\nNo."
    )
    assert spans_of(family("glm4"), TOOLS["call"], [TOOL]) == [called, "\nNo."]
    for refused in (TOOLS["two calls"], TEXT_AND_CALL):
        with pytest.raises(TemplateRefusal, match="one tool call in a message, without text"):
            render(family("glm4"), refused)


MISTRAL_CALL = (
    '{"name": "%s", "arguments": {"city": "B\\"é", "days": [1, null]}, "id": "call00001"}'
)


def test_mistral_small_tools() -> None:
    """As mistral-common's template of version 7 (tests/data/chat_templates/v7.jinja there)."""
    offered = f"[AVAILABLE_TOOLS]{json.dumps([TOOL, TOOL], ensure_ascii=False)}[/AVAILABLE_TOOLS]"
    said = f"[TOOL_CALLS][{MISTRAL_CALL % 'weather'}, {MISTRAL_CALL % 'sun'}]</s>"
    one = f"[TOOL_CALLS][{MISTRAL_CALL % 'weather'}]</s>"
    results = "".join(
        f"[TOOL_RESULTS]call00001[TOOL_CONTENT]{text}[/TOOL_RESULTS]" for text in ("no", "yes")
    )
    for ask in (False, True):
        assert render(family("mistral-small"), TOOLS["two calls"], [TOOL, TOOL], ask) == (
            f"<s>[INST]Rain?[/INST]{said}{results}No.</s>{offered}[INST]Now?[/INST]{one}"
        )
    assert render(family("mistral-small"), TEXT_AND_CALL, [TOOL, TOOL]) == (
        f"<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT]{offered}[INST]Rain?[/INST]"
        f"Let me see.{said}{results}No.</s>"
    )
    for template in (family("mistral-small"), without_marks(family("mistral-small"))):
        assert spans_of(template, TOOLS["call"], [TOOL]) == [one, "No.</s>"]
        assert spans_of(template, TEXT_AND_CALL, [TOOL]) == [f"Let me see.{said}", "No.</s>"]


# vLLM's environment has Mistral's own package, which generates its templates.
REPO = Path(__file__).resolve().parents[4]
VLLM = Path(os.environ.get("TORCHPRIME_VLLM_PYTHON") or REPO / ".venv-vllm" / "bin" / "python")
OF_MISTRAL = """
from mistral_common.integrations.chat_templates.template_generator import *
from mistral_common.tokens.tokenizers.base import TokenizerVersion
config = TemplateConfig(version=TokenizerVersion.v7, use_special_token_variables=True)
print(build_chat_template(config))
"""


@pytest.mark.vllm
@pytest.mark.skipif(not VLLM.exists(), reason=f"no {VLLM}: run make test-vllm")
def test_mistral_small_renders_as_the_template_that_mistral_generates() -> None:
    run = subprocess.run([VLLM, "-c", OF_MISTRAL], check=True, capture_output=True, text=True)
    theirs = make(run.stdout.removesuffix("\n"))
    conversations = PLAIN | SYSTEM | TOOLS | {"text and call": TEXT_AND_CALL}
    del conversations["empty answer"]  # refused by the original
    for label, messages in conversations.items():
        for tools in ((), (TOOL,), (TOOL, TOOL)):
            for ask in (False, True):
                ours_text = render(family("mistral-small"), messages, tools, ask)
                assert ours_text == render(theirs, messages, tools, ask), label


def test_smollm3_offers_tools() -> None:
    """In the header, which then has its <|im_end|>; a result is a user's message."""
    header = SMOLLM_HEADER + "Reasoning Mode: /think\n\n## Custom Instructions\n\nBe.\n\n"
    offered = (
        "### Tools\n\nYou may call one or more functions to assist with the user query.\nYou are "
        "provided with function signatures within <tools></tools> XML tags:\n\n<tools>\n"
        f"{TOOL}\n{TOOL}\n</tools>\n\nFor each function call, return a json object with function "
        "name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>\n\n<|im_end|>\n'
    )
    said = '<tool_call>\n{"name": "weather"}\n</tool_call>'
    messages = [system("Be."), user("Rain?"), assistant(said), {"role": "tool", "content": "no"}]
    assert render(family("smollm3"), messages, [TOOL, TOOL]) == (
        f"{header}{offered}<|im_start|>user\nRain?<|im_end|>\n<|im_start|>assistant\n{said}"
        "<|im_end|>\n<|im_start|>user\nno<|im_end|>\n"
    )
    assert spans_of(family("smollm3"), messages, [TOOL]) == [f"{said}<|im_end|>"]


@pytest.mark.parametrize("name", ["gemma3", "phi4", "olmo"])
def test_families_without_a_form_for_tools_refuse_them(name: str) -> None:
    with pytest.raises(TemplateRefusal, match=f"{name} has no form for tools"):
        render(family(name), PLAIN["answered"], [TOOL])


@pytest.mark.parametrize("ask", [False, True])
def test_qwen3_renders_reasoning_as_the_original(ask: bool, shared_dir: Path) -> None:
    for label, messages in REASONING.items():
        theirs = render(original(shared_dir, "trl/qwen3"), messages, (), ask)
        assert render(family("qwen3"), messages, (), ask) == theirs, label
        assert "why2" in theirs


def test_mistral_keeps_the_system_message_of_an_answered_question(shared_dir: Path) -> None:
    # The original writes it only where the last message is the user's, so at serving but never
    # in training. Where it is written both agree.
    ours, theirs = family("mistral"), original(shared_dir, "axolotl/mistral_v2v3")
    asked, answered = SYSTEM["only system"], SYSTEM["system"]
    assert render(ours, asked) == render(theirs, asked) == "<s>[INST] Be brief.\n\nHi[/INST]"
    assert render(theirs, answered) == "<s>[INST] Hi[/INST] Yo.</s>"
    assert render(ours, answered) == "<s>[INST] Be brief.\n\n\nHi[/INST] Yo.</s>"
    longer = SYSTEM["system, open"]
    assert render(ours, longer) == render(theirs, longer)


def test_mistral_offers_tools_once(shared_dir: Path) -> None:
    # The original compares messages by value: a repeated question gets the tools again.
    messages = [user("Hi"), assistant("Yo."), user("Hi")]
    assert render(family("mistral"), messages, [TOOL]).count("[AVAILABLE_TOOLS]") == 1
    theirs = original(shared_dir, "axolotl/mistral_v2v3")
    assert render(theirs, messages, [TOOL]).count("[AVAILABLE_TOOLS]") == 2


# Granite's default system message on the day that `make` gives.
GRANITE_SYSTEM = (
    "<|start_of_role|>system<|end_of_role|>Knowledge Cutoff Date: April 2024.\nToday's Date: "
    "November 29, 2026.\nYou are Granite, developed by IBM. You are a helpful AI assistant."
    "<|end_of_text|>\n"
)
SMOLLM_HEADER = (
    "<|im_start|>system\n## Metadata\n\nKnowledge Cutoff Date: June 2025\n"
    "Today Date: 29 November 2026\n"
)
WRITTEN = {
    "llama2": {
        "two turns": "<s>[INST] Hi [/INST] Yo. </s><s>[INST] Bye [/INST] Ciao. </s>",
        "open": "<s>[INST] Hi [/INST] Yo. </s><s>[INST] Bye [/INST]",
        "answered": "<s>[INST] Hi [/INST] Yo. </s>",
        "system": "<s>[INST] <<SYS>>\nBe brief.\n\n<</SYS>>\n\nHi [/INST] Yo. </s>",
        "system, open": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Yo. </s>"
        "<s>[INST] Bye [/INST]",
    },
    "zephyr": {
        "two turns": "<|user|>\nHi</s>\n<|assistant|>\nYo.</s>\n<|user|>\nBye</s>\n"
        "<|assistant|>\nCiao.</s>\n",
        "open": "<|user|>\nHi</s>\n<|assistant|>\nYo.</s>\n<|user|>\nBye</s>\n",
        "answered": "<|user|>\n Hi\n</s>\n<|assistant|>\n\n\nYo. \n</s>\n",
        "system": "<|system|>\nBe brief.\n</s>\n<|user|>\nHi</s>\n<|assistant|>\nYo.</s>\n",
    },
    "mistral-small": {
        "two turns": "<s>[INST]Hi[/INST]Yo.</s>[INST]Bye[/INST]Ciao.</s>",
        "answered": "<s>[INST] Hi\n[/INST]\n\nYo. \n</s>",
        "system": "<s>[SYSTEM_PROMPT]Be brief.\n[/SYSTEM_PROMPT][INST]Hi[/INST]Yo.</s>",
        "only system": "<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]Hi[/INST]",
    },
    # As the template of OLMo 2 Instruct writes it, which is Tulu's.
    "olmo": {
        "two turns": "<s><|user|>\nHi\n<|assistant|>\nYo.</s>\n<|user|>\nBye\n<|assistant|>\n"
        "Ciao.</s>",
        "system": "<s><|system|>\nBe brief.\n\n<|user|>\nHi\n<|assistant|>\nYo.</s>",
    },
    "granite": {
        "question": GRANITE_SYSTEM + "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n",
        "system": "<|start_of_role|>system<|end_of_role|>Be brief.\n<|end_of_text|>\n"
        "<|start_of_role|>user<|end_of_role|>Hi<|end_of_text|>\n"
        "<|start_of_role|>assistant<|end_of_role|>Yo.<|end_of_text|>\n",
    },
    "smollm3": {
        "system": SMOLLM_HEADER
        + "Reasoning Mode: /think\n\n## Custom Instructions\n\nBe brief.\n\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo.<|im_end|>\n",
    },
    "phi4": {
        "two turns": "<|im_start|>user<|im_sep|>Hi<|im_end|><|im_start|>assistant<|im_sep|>Yo."
        "<|im_end|><|im_start|>user<|im_sep|>Bye<|im_end|><|im_start|>assistant<|im_sep|>Ciao."
        "<|im_end|>",
    },
    # As the template of GLM-4-0414 writes it: no token closes a turn.
    "glm4": {
        "two turns": "[gMASK]<sop><|user|>\nHi<|assistant|>\nYo.<|user|>\nBye<|assistant|>\nCiao.",
        "answered": "[gMASK]<sop><|user|>\n Hi\n<|assistant|>\n\n\nYo. \n",
        "system, open": "[gMASK]<sop><|system|>\nBe brief.<|user|>\nHi<|assistant|>\nYo."
        "<|user|>\nBye",
    },
    "vicuna": {
        "two turns": "A chat between a curious user and an artificial intelligence assistant. The "
        "assistant gives helpful, detailed, and polite answers to the user's questions. "
        "USER: Hi ASSISTANT: Yo.</s>USER: Bye ASSISTANT: Ciao.</s>",
        "system": "Be brief.\n USER: Hi ASSISTANT: Yo.</s>",
        "only system": "Be brief. USER: Hi ",
    },
}
ASKED = {
    **{"llama2": "", "zephyr": "<|assistant|>\n", "vicuna": "ASSISTANT:", "mistral-small": ""},
    **{"olmo": "<|assistant|>\n", "granite": "<|start_of_role|>assistant<|end_of_role|>"},
    **{"smollm3": "<|im_start|>assistant\n"},
    **{"phi4": "<|im_start|>assistant<|im_sep|>", "glm4": "<|assistant|>"},
}


@pytest.mark.parametrize("name", list(WRITTEN))
def test_family_renders_the_published_format(name: str) -> None:
    for label, text in WRITTEN[name].items():
        messages = (PLAIN | SYSTEM)[label]
        assert render(family(name), messages) == text
        assert render(family(name), messages, (), True) == text + ASKED[name]


@pytest.mark.parametrize(
    ("name", "messages", "said"),
    [
        ("gemma", SYSTEM["system"], "no system role"),
        ("gemma", [user("a"), user("b")], "in turn"),
        ("llama2", [user("a"), user("b")], "in turn"),
        ("llama2", [assistant("a")], "in turn"),
        ("vicuna", [user("a"), assistant("b"), assistant("c")], "in turn"),
        ("mistral", [user("a"), user("b")], "in turn"),
        ("mistral", [user("a"), system("b"), assistant("c")], "found system"),
        ("mistral", [system("a")], "no|none"),
        ("mistral", TEXT_AND_CALL, "both text and tool calls"),
        ("mistral", [user("a"), {**assistant("", **calls("f")), "x": 1}], ""),
        ("alpaca", [user("a"), system("b")], "found system"),
        ("zephyr", [user("a"), tool("b")], "found tool"),
        ("qwen3", [{"role": "critic", "content": "a"}], "found critic"),
        ("qwen2.5", [{"role": "critic", "content": "a"}], "found critic"),
        ("olmo", [{"role": "critic", "content": "a"}], "found critic"),
        ("gemma3", [system("a"), assistant("b")], "found assistant"),
        ("phi4", [{"role": "critic", "content": "a"}], "found critic"),
        ("smollm3", [{"role": "critic", "content": "a"}], "found critic"),
        ("gpt-oss", [{"role": "critic", "content": "a"}], "found critic"),
        ("granite", [{"role": "critic", "content": "a"}], "found critic"),
        ("glm4", [{"role": "critic", "content": "a"}], "found critic"),
        ("mistral-small", [{"role": "critic", "content": "a"}], "found critic"),
        ("mistral-small", [assistant("", tool_calls=[{"name": "f", "arguments": {}}])], "an id of"),
        ("mistral-small", [{"role": "tool", "content": "a", "tool_call_id": "1"}], "tool_call_id"),
        *(
            (name, TOOLS["call"], "tool")
            for name in FAMILIES
            if name not in ("qwen2.5", "qwen3", "mistral", "mistral-small", "gpt-oss", "glm4")
        ),
    ],
)
def test_family_says_what_it_cannot_write(name: str, messages: Messages, said: str) -> None:
    if not said:
        assert render(family(name), messages)
        return
    with pytest.raises(TemplateRefusal, match=said):
        render(family(name), messages)
    found = rejected(family(name), messages)
    assert found.reason == REASON_REFUSED
    assert re.search(said, found.detail)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_shipped_templates_are_ours_and_small(name: str) -> None:
    text = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    assert text.startswith("{#-")  # says what it is
    assert len(text) < (6500 if name == "gpt-oss" else 5000)  # its tools are TypeScript
    assert family(name).has_generation_marks
    # vLLM gives content as a list of parts to templates that loop over it.
    assert not re.search(r"in message\.content|in message\['content'\]", text)


def test_originals_are_not_copied(shared_dir: Path) -> None:
    ours = {(FOLDER / f"{name}.jinja").read_text(encoding="utf-8") for name in FAMILIES}
    theirs = {p.read_text(encoding="utf-8") for p in (shared_dir / "templates").rglob("*.jinja")}
    assert not ours & theirs


# Spans -------------------------------------------------------------------------------------------

TWO_TURNS = {
    "chatml": ["Yo.<|im_end|>", "Ciao.<|im_end|>"],
    "llama2": [" Yo. </s>", " Ciao. </s>"],
    "llama3": ["Yo.<|eot_id|>", "Ciao.<|eot_id|>"],
    "mistral": [" Yo.</s>", " Ciao.</s>"],
    "qwen2.5": ["Yo.<|im_end|>", "Ciao.<|im_end|>"],
    "qwen3": ["Yo.<|im_end|>", "<think>\n\n</think>\n\nCiao.<|im_end|>"],
    "gemma": ["Yo.<end_of_turn>", "Ciao.<end_of_turn>"],
    "zephyr": ["Yo.</s>", "Ciao.</s>"],
    "alpaca": ["Yo.</s>", "Ciao.</s>"],
    "vicuna": [" Yo.</s>", " Ciao.</s>"],
    "phi4": ["Yo.<|im_end|>", "Ciao.<|im_end|>"],
    "smollm3": ["Yo.<|im_end|>", "Ciao.<|im_end|>"],
    "gpt-oss": [
        "<|channel|>final<|message|>Yo.<|end|>",
        "<|channel|>final<|message|>Ciao.<|return|>",
    ],
    "mistral-small": ["Yo.</s>", "Ciao.</s>"],
    "gemma3": ["Yo.<end_of_turn>", "Ciao.<end_of_turn>"],
    "olmo": ["Yo.</s>", "Ciao.</s>"],
    "granite": ["Yo.<|end_of_text|>", "Ciao.<|end_of_text|>"],
    "glm4": ["\nYo.<|user|>", "\nCiao."],
}


@pytest.mark.parametrize("name", list(FAMILIES))
def test_spans_are_what_the_model_must_produce(name: str) -> None:
    messages = PLAIN["two turns"]
    for template in (family(name), without_marks(family(name))):
        found = turn_spans(template, row(messages), STOPS)
        assert isinstance(found, Rendering)
        assert [found.text[s.start : s.end] for s in found.spans] == TWO_TURNS[name]
        assert [s.message for s in found.spans] == [1, 3]
        ends = {found.text[s.stop : s.end] for s in found.spans}
        # After the last answer of GLM-4 stands nothing: EOS is added to its ids.
        assert ends < STOPS or (name == "glm4" and ends == {"<|user|>", ""})
        for span in found.spans:  # what a server feeds stands in front
            fed = render(template, messages[: span.message], (), True)
            assert found.text[: span.start] == fed
        last = turn_spans(template, row(messages), STOPS, last_only=True)
        assert isinstance(last, Rendering)
        assert last.spans == found.spans[-1:]


@pytest.mark.parametrize("name", ["qwen2.5", "qwen3"])
def test_spans_of_tool_calls(name: str) -> None:
    arguments = '{"city": "B\\"é", "days": [1, null]}'
    call = '<tool_call>\n{"name": "%s", "arguments": ' + arguments + "}\n</tool_call>"
    think = "<think>\n\n</think>\n\n" if name == "qwen3" else ""
    for template in (family(name), without_marks(family(name))):
        assert spans_of(template, TOOLS["two calls"], [TOOL]) == [
            f"{call % 'weather'}\n{call % 'sun'}<|im_end|>",
            "No.<|im_end|>",
            f"{think}{call % 'weather'}<|im_end|>",
        ]
        assert spans_of(template, TEXT_AND_CALL)[0] == (
            f"Let me see.\n{call % 'weather'}\n{call % 'sun'}<|im_end|>"
        )


def test_mistral_tool_call_span() -> None:
    assert spans_of(family("mistral"), TOOLS["call"], [TOOL])[0] == (
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "B\\"é", "days": [1, null]}, '
        '"id": "call00001"}]</s>'
    )


PIECES = st.sampled_from(list("aé😀 \n\t\r\u2028'\"{}<>/|[]#:") + ["[INST]", "<think>", "User"])
CONTENT = st.lists(PIECES, max_size=8).map("".join) | st.text(max_size=20)


@pytest.mark.parametrize("name", list(FAMILIES))
@settings(max_examples=60, deadline=None)
@given(contents=st.lists(CONTENT, min_size=2, max_size=6).filter(lambda c: len(c) % 2 == 0))
def test_marks_and_derivation_agree(name: str, contents: list[str]) -> None:
    if any(stop in text for text in contents for stop in STOPS):
        return  # rejected before it comes here, see test_chat.py
    turns = [(assistant if i % 2 else user)(text) for i, text in enumerate(contents)]
    marked = turn_spans(family(name), row(turns), STOPS)
    derived = turn_spans(without_marks(family(name)), row(turns), STOPS)
    if isinstance(marked, Rejection):
        assert isinstance(derived, Rejection)
        assert derived.reason == marked.reason
        return
    assert isinstance(derived, Rendering)
    assert (derived.text, derived.spans) == (marked.text, marked.spans)
    assert (marked.rule, derived.rule) == ("marks", "derived")


@pytest.mark.parametrize("name", ["qwen3", "qwen2.5"])
def test_marks_and_derivation_agree_on_real_tool_calls(name: str, shared_dir: Path) -> None:
    lines = (shared_dir / "data" / "sgd_dev_messages.jsonl").read_text().splitlines()[::12]
    theirs = original(shared_dir, ORIGINALS[name][0])
    for record in map(json.loads, lines):
        given = row(record["messages"], record["tools"])
        marked = turn_spans(family(name), given, STOPS)
        derived = turn_spans(theirs, given, STOPS)
        assert isinstance(marked, Rendering)
        assert isinstance(derived, Rendering), derived
        assert (derived.text, derived.spans) == (marked.text, marked.spans)
        assert len(marked.spans) == sum(m["role"] == "assistant" for m in record["messages"])


@pytest.mark.parametrize(
    "name",
    ["llama3", "gemma", "gemma3", "qwen2_5", "qwen3_instruct_2507", "cohere2", "gptoss"],
)
def test_trl_marks_and_our_derivation_agree(name: str, shared_dir: Path) -> None:
    # TRL's marks take in the white space behind the stop token and parts of the header; both are
    # cut off, so what is left is what derivation finds in the template without marks.
    marked = original(shared_dir, f"trl_training/{name}_training")
    derived = original(shared_dir, f"trl/{name}")
    conversations = PLAIN if name.startswith("gemma") else PLAIN | SYSTEM
    if name in ("qwen2_5", "qwen3_instruct_2507"):
        conversations = conversations | TOOLS | {"text and call": TEXT_AND_CALL}
    for label, messages in conversations.items():
        assert spans_of(marked, messages) == spans_of(derived, messages), label


def test_trl_supervises_reasoning_that_the_original_drops(shared_dir: Path) -> None:
    messages = REASONING["inline"]
    assert spans_of(original(shared_dir, "trl_training/qwen3_training"), messages) == [
        "<think>\nwhy1\n</think>\n\nYo.<|im_end|>",
        "<think>\nwhy2\n</think>\n\nCiao.\n<|im_end|>",
    ]
    assert spans_of(family("qwen3"), messages) == [
        "Yo.<|im_end|>",
        "<think>\nwhy2\n</think>\n\nCiao.\n<|im_end|>",
    ]


def test_two_closing_tokens_belong_to_the_turn(shared_dir: Path) -> None:
    assert spans_of(original(shared_dir, "trl/cohere2"), PLAIN["two turns"]) == [
        "Yo.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        "Ciao.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    ]


def test_a_token_that_closes_the_conversation_is_not_the_stop(shared_dir: Path) -> None:
    # phi3 writes EOS behind the last <|end|> and a line break.
    template = original(shared_dir, "trl/phi3")
    assert spans_of(template, PLAIN["two turns"]) == ["Yo.<|end|>", "Ciao.<|end|>"]
    assert render(template, PLAIN["answered"]).endswith("<|end|>\n</s>")


def test_bos_that_equals_eos_is_not_taken_for_a_second_stop() -> None:
    template = ChatTemplate("t", without_marks(family("llama2")).text, "</s>", "</s>")
    assert spans_of(template, PLAIN["two turns"]) == [" Yo. </s>", " Ciao. </s>"]


def test_marks_that_leave_the_stop_out_are_extended() -> None:
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert spans_of(make(text), PLAIN["two turns"]) == TWO_TURNS["chatml"]


def test_marks_that_take_in_the_header_are_cut() -> None:
    text = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{- '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{- '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"
    )
    assert spans_of(make(text), PLAIN["two turns"]) == TWO_TURNS["chatml"]


def test_content_that_repeats_the_prompt_is_not_cut() -> None:
    text = (
        "{% for m in messages %}{{- m.role + '\n' }}{% if m.role == 'user' %}{{- m.content }}"
        "{% else %}{%- generation %}{{- m.content + eos_token }}{%- endgeneration %}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{- 'assistant\n' }}{% endif %}"
    )
    messages = [user("Hi"), assistant("assistant\nYo.")]
    assert spans_of(make(text), messages) == ["assistant\nYo.</s>"]


def test_a_mark_in_a_comment_is_none() -> None:
    assert not make("{#- no {% generation %} here -#}\n" + NO_STOPS).has_generation_marks
    assert make("{#- a -#}{%- generation -%}{% endgeneration %}").has_generation_marks


NO_STOPS = (
    "{% for m in messages %}{{- '<|' + m.role + '|>' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{- '<|assistant|>' }}{% endif %}"
)


def test_the_next_message_does_not_end_a_turn() -> None:
    found = turn_spans(make(NO_STOPS), row(PLAIN["two turns"]), STOPS)
    assert isinstance(found, Rendering)
    assert [found.text[s.start : s.end] for s in found.spans] == ["Yo.", "Ciao."]
    assert all(span.stop == span.end for span in found.spans)
    marked = NO_STOPS.replace(
        "{{- '<|' + m.role + '|>' + m.content + '\n' }}",
        "{{- '<|' + m.role + '|>' }}{% if m.role == 'user' %}{{- m.content }}{% else %}"
        "{%- generation %}{{- m.content }}{%- endgeneration %}{% endif %}{{- '\n' }}",
    )
    assert spans_of(make(marked), PLAIN["two turns"]) == ["Yo.", "Ciao."]


@pytest.mark.parametrize(
    ("text", "messages", "reason", "detail"),
    [
        # A server's prompt for turn 1 is not the text before it in the conversation.
        (
            "{{ messages | length }}" + NO_STOPS,
            PLAIN["answered"],
            REASON_NOT_SERVED,
            "message 2: a server feeds '1",
        ),
        # The content appears twice: which one is the answer?
        (
            NO_STOPS.replace("m.content", "m.content + m.content"),
            PLAIN["two turns"],
            REASON_NO_SPAN,
            "message 2: the end of the turn cannot be determined",
        ),
        # The text appended to the content is cut off: nothing marks its end.
        (
            NO_STOPS.replace("m.content", "m.content[:4]"),
            PLAIN["two turns"],
            REASON_NO_SPAN,
            "message 2: the end of the turn cannot be determined",
        ),
        (
            NO_STOPS.replace("m.content", "m.content[:4]"),
            [user("Hi"), assistant("Yo.!")],
            REASON_NO_SPAN,
            "message 2: the end of the turn cannot be determined",
        ),
        # Words behind the content that are no stop token.
        (
            NO_STOPS.replace("'\n'", "' (end)\n'"),
            PLAIN["two turns"],
            REASON_NO_SPAN,
            "message 2: the end of the turn cannot be determined",
        ),
        (
            NO_STOPS.replace("m.content", "m.text"),
            PLAIN["answered"],
            REASON_REFUSED,
            "no attribute 'text'",
        ),
        ("{{ messages[0].content / 2 }}", PLAIN["answered"], REASON_REFUSED, "TypeError"),
        ("{% for i in range(9999999999) %}{% endfor %}", PLAIN["answered"], REASON_REFUSED, ""),
        (
            "{% generation %}a{% endgeneration %}",
            PLAIN["two turns"],
            REASON_MARKS,
            "1 marks, 2 assistant turns",
        ),
        (
            "{% for m in messages %}x{% generation %}a{% endgeneration %}{% endfor %}",
            PLAIN["two turns"],
            REASON_MARKS,
            "4 marks, 2 assistant turns",
        ),
        (
            "u{% generation %}a{% endgeneration %}",
            PLAIN["answered"],
            REASON_LEFT_OUT,
            "message 2: its content",
        ),
    ],
)
def test_what_cannot_be_told_is_rejected(
    text: str, messages: Messages, reason: str, detail: str
) -> None:
    found = rejected(make(text), messages)
    assert (found.row_id, found.reason) == ("f:1", reason)
    assert detail in found.detail


def test_a_template_that_leaves_out_tool_calls(shared_dir: Path) -> None:
    found = rejected(original(shared_dir, "trl/llama3"), TOOLS["call"])
    assert (found.reason, found.detail) == (REASON_LEFT_OUT, "message 2: the call of weather")


def test_reasoning_in_the_middle_of_tool_calls_is_served_otherwise(shared_dir: Path) -> None:
    # Answered, the reasoning of the steps before is dropped; asked for turn 3, it was served.
    messages = [*REASONING["field"], user("Thanks"), assistant("Sure.")]
    for template in (original(shared_dir, "trl/qwen3"), family("qwen3")):
        assert rejected(template, messages).reason == REASON_NOT_SERVED


def test_several_marks_in_a_row_are_one_turn() -> None:
    text = (
        "{% for m in messages %}{% if m.role == 'user' %}{{- m.content }}{% else %}"
        "{%- generation %}{{- m.content }}{%- endgeneration %}"
        "{%- generation %}{{- eos_token }}{%- endgeneration %}{% endif %}{% endfor %}"
    )
    assert spans_of(make(text), PLAIN["two turns"]) == ["Yo.</s>", "Ciao.</s>"]


def test_conversation_without_assistant_has_no_spans() -> None:
    assert spans_of(family("chatml"), PLAIN["question"]) == []
    assert spans_of(without_marks(family("chatml")), PLAIN["question"]) == []


# Variables of a template --------------------------------------------------------------------------


def test_tool_calls_reach_the_template_as_a_server_gives_them() -> None:
    given = [assistant(None, **calls("f", arguments='{"a": 1}')), assistant(None)]
    served = as_served(given)
    assert served[0]["tool_calls"][0]["function"]["arguments"] == {"a": 1}
    assert served[0]["content"] == ""
    assert served[1] == given[1]
    assert given[0]["tool_calls"][0]["function"]["arguments"] == '{"a": 1}'  # left alone
    odd = assistant("", tool_calls=[{"name": "f", "arguments": "not json"}, {"name": "g"}, "x"])
    assert as_served([odd]) == [odd]


def test_arguments_as_text_or_object_render_alike() -> None:
    as_text = [user("a"), assistant(None, **calls("f", arguments='{"a": 1,"b":"é"}'))]
    as_object = [user("a"), assistant(None, **calls("f", arguments={"a": 1, "b": "é"}))]
    for name in ("qwen2.5", "qwen3", "mistral", "mistral-small"):
        assert render(family(name), as_text) == render(family(name), as_object)


def test_tokens_the_tokenizer_lacks_are_undefined() -> None:
    text = "{% if bos_token is defined %}yes{% else %}no{% endif %}{{ eos_token }}"
    assert render(ChatTemplate("t", text, "", "</s>"), []) == "no</s>"
    assert render(ChatTemplate("t", text, "<s>", "</s>"), []) == "yes</s>"


# Choice of the template ---------------------------------------------------------------------------


def own(tokenizer: Tokenizer, **settings: Any) -> None:
    path = tokenizer.folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.fixture
def tokenizer(build: SimpleNamespace, make_tokenizer: MakeTokenizer) -> Tokenizer:
    return make_tokenizer(build.byte_level(), bos_token="<s>")


@pytest.mark.parametrize("chosen", [None, "auto", "default"])
def test_the_tokenizers_own_template(chosen: str | None, tokenizer: Tokenizer) -> None:
    assert resolve_template(chosen, tokenizer) is None
    (tokenizer.folder / "chat_template.json").write_text('{"chat_template": "json"}')
    found = resolve_template(chosen, tokenizer)
    assert found is not None
    assert (found.name, found.text) == ("tokenizer's own", "json")
    assert (found.bos_token, found.eos_token) == ("<s>", "</s>")
    own(tokenizer, chat_template=[{"name": "rag", "template": "x"}, {"name": "default"}])
    with pytest.raises(DataError, match="no template named default.*rag"):
        resolve_template(chosen, tokenizer)
    listed = [{"name": "rag", "template": "x"}, {"name": "default", "template": "listed"}]
    own(tokenizer, chat_template=listed)
    assert resolve_template(chosen, tokenizer).text == "listed"  # type: ignore[union-attr]
    own(tokenizer, chat_template="config")
    assert resolve_template(chosen, tokenizer).text == "config"  # type: ignore[union-attr]
    # transformers takes the file when there are both
    (tokenizer.folder / "chat_template.jinja").write_text("file")
    assert resolve_template(chosen, tokenizer).text == "file"  # type: ignore[union-attr]


def test_own_template_is_what_transformers_would_use(tokenizer: Tokenizer) -> None:
    from transformers import PreTrainedTokenizerFast

    own(tokenizer, chat_template="config")
    for name in ("", "chat_template.jinja"):
        if name:
            (tokenizer.folder / name).write_text("file")
        theirs = PreTrainedTokenizerFast.from_pretrained(tokenizer.folder)
        found = resolve_template(None, tokenizer)
        assert found is not None
        assert found.text == theirs.chat_template


def test_family_and_fingerprint(tokenizer: Tokenizer) -> None:
    found = resolve_template("chatml", tokenizer)
    assert found is not None
    assert found.name == "chatml"
    assert found.text == (FOLDER / "chatml.jinja").read_text()
    assert found.fingerprint() == hashlib.sha256(found.text.encode()).hexdigest()
    assert found.has_generation_marks


def test_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("{{ messages[0].content }}")
    found = resolve_template(str(path), tokenizer)
    assert found is not None
    assert (found.name, found.has_generation_marks) == ("mine.jinja", False)
    with pytest.raises(DataError, match=r"nime\.jinja: there is no such file.*mine\.jinja"):
        resolve_template(str(tmp_path / "nime.jinja"), tokenizer)
    with pytest.raises(DataError, match="no such file$"):
        resolve_template("/nowhere/at/all.jinja2", tokenizer)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read"):
        resolve_template(str(path), tokenizer)
    path.write_text("{{ " + "-" * 5000 + "1 }}")
    with pytest.raises(DataError, match=r"mine\.jinja\) cannot be compiled: RecursionError"):
        resolve_template(str(path), tokenizer)
    path.write_text("a\n{% for %}")
    with pytest.raises(DataError, match=r"mine\.jinja\) is not valid jinja.*line 2"):
        resolve_template(str(path), tokenizer)


def test_unknown_family_names_the_nearest(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"=qwen-3 is not known; did you mean qwen3\?.*vicuna"):
        resolve_template("qwen-3", tokenizer)


def test_a_tokenizer_that_wants_bos_gets_it_from_the_template(
    build: SimpleNamespace, make_tokenizer: MakeTokenizer
) -> None:
    wants = make_tokenizer(build.begin_with_bos(build.byte_level()), bos_token="<s>")
    for name in FAMILIES:
        found = resolve_template(name, wants)
        assert found is not None
        text = render(found, PLAIN["answered"])
        assert text.startswith("<s>")
        assert not text.startswith("<s><s>")
        assert "no BOS" not in " ".join(found.warnings)
    (wants.folder / "chat_template.jinja").write_text(NO_STOPS)
    found = resolve_template(None, wants)
    assert found is not None
    assert found.text == NO_STOPS  # what others serve with is left as it is
    assert "conversations have no BOS" in " ".join(found.warnings)


def test_bos_that_only_the_post_processor_knows(
    build: SimpleNamespace, make_tokenizer: MakeTokenizer
) -> None:
    found = resolve_template("chatml", make_tokenizer(build.begin_with_bos(build.byte_level())))
    assert found is not None
    assert found.bos_token == "<s>"
    assert "names no bos_token" in found.warnings[0]


def test_warnings(tokenizer: Tokenizer) -> None:
    found = resolve_template("chatml", tokenizer)
    assert found is not None
    said = " ".join(found.warnings)
    assert "<|im_start|>, <|im_end|> of the chatml template are not special tokens" in said
    assert "turns end with '<|im_end|>', which is neither eos_token ('</s>')" in said
    vicuna = resolve_template("vicuna", tokenizer)
    assert vicuna is not None
    assert vicuna.warnings == ()
    (tokenizer.folder / "chat_template.jinja").write_text("{{ strftime_now('%d') }}")
    dated = resolve_template(None, tokenizer)
    assert dated is not None
    assert "the template writes the date" in dated.warnings[0]


def test_no_warning_for_a_tokenizer_made_for_the_template(shared_dir: Path) -> None:
    qwen = load_tokenizer(shared_dir / "tokenizers" / "qwen3")
    for name in (None, "qwen3", "qwen2.5", "chatml"):
        found = resolve_template(name, qwen)
        assert found is not None
        assert found.warnings == ()


def test_a_stop_that_generation_config_names_is_no_surprise(
    build: SimpleNamespace, tmp_path: Path
) -> None:
    raw = build.byte_level()
    raw.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    folder = build.save(raw, tmp_path / "t", {"eos_token": "</s>"})
    stop = {"eos_token_id": [raw.token_to_id("</s>"), raw.token_to_id("<|im_end|>")]}
    (folder / "generation_config.json").write_text(json.dumps(stop))
    found = resolve_template("chatml", load_tokenizer(folder))
    assert found is not None
    assert found.warnings == ()


# Reasoning ---------------------------------------------------------------------------------------


def test_reasoning_policy(shared_dir: Path) -> None:
    qwen3 = reasoning_policy(family("qwen3"))
    assert qwen3 == (
        "Reasoning (as reasoning_content or in <think> in the content) is kept in the last turn "
        "and dropped from earlier ones. A conversation without reasoning gets an empty think "
        "block in the last turn."
    )
    assert reasoning_policy(original(shared_dir, "trl/qwen3")) == qwen3
    trl = reasoning_policy(original(shared_dir, "trl_training/qwen3_training"))
    assert "is kept in every turn" in trl
    assert "an empty think block in earlier turns and the last turn" in trl
    assert reasoning_policy(family("chatml")) == (
        "Reasoning as reasoning_content is dropped; in <think> in the content it is kept in every "
        "turn. A conversation without reasoning gets no think block."
    )
    assert "the generation prompt opens one" in reasoning_policy(
        make(NO_STOPS.replace("'<|assistant|>'", "'<|assistant|><think>'"))
    )
    assert "refuses" in reasoning_policy(make("{{ raise_exception('no') }}"))
