"""The card says what was done; what is unknown is left out, not invented."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import asdict

import huggingface_hub
import pytest
import yaml

from torchprime.checkpoint.hf.card import CardFacts, model_card

FACTS = CardFacts(
    name="export",
    base_model="meta-llama/Meta-Llama-3-8B",
    dataset="openai/gsm8k/main:train",
    hub_model="meta-llama/Meta-Llama-3-8B",
    hub_datasets=("openai/gsm8k", "squad"),
    command="python3 torchprime/torch_xla_models/train.py --config-name x",
    versions={"torch": "2.9.1"},
)


def front_matter(card):
    return yaml.safe_load(card.split("---")[1])


def test_all_facts_are_in_the_card():
    card = model_card(FACTS, steps=1234, metrics={"loss": 0.123456789})
    for text in (
        *(FACTS.name, FACTS.base_model, FACTS.dataset, FACTS.hub_model),
        "1,234",
        "0.123457",
        "2.9.1",
        "vllm serve",
        "transformers",
    ):
        assert text is not None and text in card
    front = front_matter(card)
    assert front["base_model"] == "meta-llama/Meta-Llama-3-8B"
    assert front["datasets"] == ["openai/gsm8k", "squad"]
    read = huggingface_hub.ModelCard(card).data
    assert isinstance(read, huggingface_hub.ModelCardData)
    assert (read.base_model, read.datasets) == (FACTS.hub_model, list(FACTS.hub_datasets))


@pytest.mark.parametrize(
    "facts",
    [
        CardFacts(base_model="/data/my/model", dataset="./rows.jsonl"),
        # A folder here, which a hub would take for somebody's repository.
        CardFacts(base_model="models/mine", dataset="data/rows", hub_datasets=()),
        # As edited facts of a checkpoint may have them.
        CardFacts(hub_model="a/b\nlicense: mit", hub_datasets=("", "../b", "a/b/c")),
    ],
)
def test_local_paths_stay_out_of_what_hubs_read(facts):
    front = front_matter(model_card(facts))
    assert "base_model" not in front and "datasets" not in front and "license" not in front


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("hub_model", ["a/b"], "card.hub_model: given list, expected text, or null"),
        ("hub_datasets", "a/b", "card.hub_datasets: given 'a/b', expected a list of names"),
        ("hub_datasets", [None], "card.hub_datasets: given list, expected a list of names"),
        ("hub_datasets", None, "card.hub_datasets: given None, expected a list of names"),
        ("parameters", "many", "card.parameters: given 'many', expected a whole number"),
        ("versions", {"torch": 2}, "card.versions: given dict, expected an object"),
        ("chat", 1, "card.chat: given 1, expected true or false"),
    ],
)
def test_a_fact_of_another_type_is_refused_by_name(field, value, expected):
    with pytest.raises(ValueError, match=re.escape(expected)):
        CardFacts.from_json({field: value}, "card")


def test_facts_are_read_as_they_were_written():
    content = json.loads(json.dumps(asdict(FACTS)))
    assert CardFacts.from_json(content, "card") == FACTS
    assert CardFacts.from_json({"name": "older", "unknown": 1}, "card") == CardFacts(name="older")


def test_empty_facts_make_a_card_without_empty_sections():
    card = model_card(CardFacts())
    assert "Trained from scratch" in card
    assert "## Training" not in card and "## Command" not in card and "None" not in card


def test_usage_follows_the_chat_template():
    assert "apply_chat_template" in model_card(CardFacts(chat=True))
    assert "chat/completions" in model_card(CardFacts(chat=True))
    assert "apply_chat_template" not in model_card(CardFacts(chat=False))


def test_table_cells_cannot_break_the_table():
    assert "a\\|b c" in model_card(CardFacts(dataset="a|b\nc")).split("## Training")[1]


def test_a_fence_is_longer_than_any_in_the_command():
    card = model_card(CardFacts(command="train run_name='```\n# x'"))
    assert "````bash\ntrain run_name='```\n# x'\n````" in card


def test_what_is_copied_into_a_shell_is_quoted():
    card = model_card(CardFacts(name="a'b $(c)", chat=True), template_options={"d e": "'"})
    shell = card.split("```bash\n")[-1].split("\n```")[0]
    words = shlex.split(shell.replace("\\\n", ""))
    assert words[words.index("--served-model-name") + 1] == "a'b $(c)"
    assert json.loads(words[words.index("--default-chat-template-kwargs") + 1]) == {"d e": "'"}
    assert json.loads(words[-1])["model"] == "a'b $(c)"
    assert "**{'d e': \"'\"}" in card


def test_the_card_of_a_wrapper_says_which_parts_are_there():
    facts = CardFacts(base_model="some/base", wrapper="gemma3")
    text, whole = model_card(facts), model_card(facts, whole=True)
    assert "This is the text model of the base, whose `model_type` is `gemma3`" in text
    assert "AutoModelForCausalLM.from_pretrained" in text
    assert "pipeline_tag: text-generation" in text
    assert "This is the whole model, whose `model_type` is `gemma3`." in whole
    assert "AutoModelForImageTextToText.from_pretrained" in whole
    assert "pipeline_tag: image-text-to-text" in whole
