"""Conversations give the model the ids that transformers' own template and tokenizer make.

The answers equal those of transformers' own generate for the same ids.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchprime.checkpoint.proof.certificate import trained_options
from torchprime.config.compose import assets_dir
from torchprime.data.templates.render import ChatTemplate
from torchprime.data.tokenizer.load import Tokenizer, load_tokenizer
from torchprime.errors import CheckpointError, DataError
from torchprime.generation import conversation
from torchprime.generation.conversation import (
    CONTEXT_FULL,
    INTERRUPTED,
    LIMIT,
    STOPPED,
    Conversation,
    Sampling,
    Speaker,
)

CPU = torch.device("cpu")
QUESTION = "Ben has 8 stamps. Kate has 34 more stamps than Ben."
CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
SHORT = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def plain() -> Path:
    return assets_dir() / "quickstart" / "base"


@pytest.fixture(scope="module")
def chatty(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(plain, tmp_path_factory.mktemp("chat") / "chatty"))
    (folder / "chat_template.jinja").write_text(CHAT)
    return folder


@pytest.fixture(scope="module")
def speaker(chatty: Path) -> Speaker:
    return Speaker(chatty, CPU)


@pytest.fixture(scope="module")
def plain_speaker(plain: Path) -> Speaker:
    return Speaker(plain, CPU)


def nothing(text: str) -> None:
    pass


def templated(folder: Path, *messages: tuple[str, str]) -> list[int]:
    chat = [{"role": role, "content": content} for role, content in messages]
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=False
    )


def generated(folder: Path, ids: list[int], limit: int) -> list[int]:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = torch.tensor([ids])
    with torch.no_grad():
        out = model.generate(
            rows, attention_mask=torch.ones_like(rows), do_sample=False, max_new_tokens=limit
        )
    return out[0, len(ids) :].tolist()


def test_plain_text_is_transformers_own(plain: Path, plain_speaker: Speaker) -> None:
    tokenizer = AutoTokenizer.from_pretrained(plain)
    seen: list[str] = []
    reply = Conversation(plain_speaker).ask(QUESTION, Sampling(max_new_tokens=40), seen.append)
    assert reply.prompt_ids == tokenizer(QUESTION)["input_ids"]
    expected = generated(plain, reply.prompt_ids, 40)
    assert reply.ids == expected and reply.ended == LIMIT
    assert reply.text == "".join(seen) == tokenizer.decode(expected)
    assert len(seen) > 20


def test_a_conversation_is_the_templates_with_its_history(chatty: Path, speaker: Speaker) -> None:
    talk = Conversation(speaker, system="Be brief.")
    first = talk.ask(QUESTION, SHORT, nothing)
    system, asked = ("system", "Be brief."), ("user", QUESTION)
    assert first.prompt_ids == templated(chatty, system, asked)
    assert first.ids == generated(chatty, first.prompt_ids, 12)
    second = talk.ask("And then?", SHORT, nothing)
    turns = (system, asked, ("assistant", first.text), ("user", "And then?"))
    assert second.prompt_ids == templated(chatty, *turns)
    assert second.ids == generated(chatty, second.prompt_ids, 12)


def test_without_a_template_each_prompt_stands_by_itself(plain_speaker: Speaker) -> None:
    talk = Conversation(plain_speaker)
    replies = [talk.ask(QUESTION, SHORT, nothing) for _ in range(2)]
    assert replies[0] == replies[1]


def test_the_stop_token_ends_an_answer_and_is_no_part_of_it(plain: Path) -> None:
    speaker = Speaker(plain, CPU)
    free = Conversation(speaker).ask(QUESTION, Sampling(max_new_tokens=20), nothing)
    stop = free.ids[5]
    speaker.stops = (stop,)
    reply = Conversation(speaker).ask(QUESTION, Sampling(max_new_tokens=20), nothing)
    assert (reply.ended, reply.ids) == (STOPPED, free.ids[: free.ids.index(stop)])


def test_the_oldest_turns_go_when_the_context_is_full(chatty: Path, speaker: Speaker) -> None:
    talk = Conversation(speaker, system="Be brief.")
    talk.turns = [(f"{number} " + "word " * 20, "yes") for number in range(12)]
    every = [("system", "Be brief.")]
    every += [m for ask, answer in talk.turns for m in (("user", ask), ("assistant", answer))]
    assert len(templated(chatty, *every)) > speaker.context
    ids, left_out = talk.prepare("Well?", 100)
    assert 0 < left_out < 12
    kept = [every[0], *every[1 + 2 * left_out :], ("user", "Well?")]
    assert ids == templated(chatty, *kept)
    one_more = [every[0], *every[1 + 2 * (left_out - 1) :], ("user", "Well?")]
    assert len(ids) <= speaker.context - 100 < len(templated(chatty, *one_more))
    assert talk.ask("Well?", SHORT, nothing).left_out <= left_out


@pytest.mark.slow
def test_an_answer_ends_where_the_context_does(plain: Path) -> None:
    speaker = Speaker(plain, CPU)
    speaker.stops = ()
    prompt = "Tom has 3 eggs. " * 50
    count = len(speaker.tokenizer.prompt_ids(prompt))
    reply = Conversation(speaker).ask(prompt, Sampling(max_new_tokens=400), nothing)
    assert reply.ended == CONTEXT_FULL
    assert len(reply.ids) == speaker.context - count < 400


def test_the_folders_own_settings_change_no_answer(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "folder"))
    own = {"eos_token_id": 1, "repetition_penalty": 9.0, "do_sample": True, "top_k": 2}
    (folder / "generation_config.json").write_text(json.dumps(own))
    replies = [Conversation(Speaker(f, CPU)).ask(QUESTION, SHORT, nothing) for f in (plain, folder)]
    assert replies[0] == replies[1]


def test_what_cannot_be_asked_is_said(plain_speaker: Speaker, speaker: Speaker) -> None:
    talk = Conversation(plain_speaker)
    with pytest.raises(DataError, match=r"the prompt has [\d,]+ tokens; .* context of 512"):
        talk.ask("Tom has 3 eggs. " * 300, SHORT, nothing)
    speaker = Speaker(speaker.folder, CPU)
    speaker.tokenizer = replace(speaker.tokenizer, add_bos=False)
    speaker.template = ChatTemplate("silent", "")
    with pytest.raises(DataError, match="the prompt is empty"):
        Conversation(speaker).ask("a", SHORT, nothing)
    text = "{{ raise_exception('no system here') if messages[0].role == 'system' }}x"
    speaker.template = ChatTemplate("strict", text)
    with pytest.raises(DataError, match="refuses this: no system here"):
        Conversation(speaker, system="Be brief.").ask("a", SHORT, nothing)
    assert not talk.turns


def test_an_interruption_ends_the_answer_and_keeps_what_there_is(plain_speaker: Speaker) -> None:
    def interrupt(text: str) -> None:
        seen.append(text)
        if len(seen) == 5:
            raise KeyboardInterrupt

    whole = Conversation(plain_speaker).ask(QUESTION, Sampling(max_new_tokens=30), nothing)
    seen: list[str] = []
    talk = Conversation(plain_speaker)
    reply = talk.ask(QUESTION, Sampling(max_new_tokens=30), interrupt, interruptible=True)
    assert reply.ended == INTERRUPTED
    assert reply.ids == whole.ids[: len(reply.ids)] and 5 <= len(reply.ids) < 30
    assert talk.turns == [(QUESTION, reply.text)]
    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        talk.ask(QUESTION, Sampling(max_new_tokens=30), interrupt)


def test_samples_follow_their_seed(plain_speaker: Speaker) -> None:
    def ask(seed: int) -> list[int]:
        sampling = Sampling(max_new_tokens=16, temperature=1.5, seed=seed)
        return Conversation(plain_speaker).ask(QUESTION, sampling, nothing).ids

    assert ask(1) == ask(1) != ask(2)


def test_text_is_shown_when_its_bytes_are_all_there(byte_tokens: Tokenizer) -> None:
    seen: list[str] = []
    stream = conversation._Stream(byte_tokens.decode, (1,), seen.append)
    stream.put(torch.tensor([[5, 6]]))  # the prompt
    for token in byte_tokens.encode_ids(["a€b\xe9"])[0]:
        stream.put(torch.tensor([token]))
    stream.put(torch.tensor([1]))
    stream.put(torch.tensor([7]))  # what a device made before it saw the stop
    stream.finish()
    assert seen == ["a", "€", "b", "é"] and stream.stopped


@pytest.fixture
def byte_tokens(by_hand, tmp_path: Path) -> Tokenizer:
    raw = by_hand.byte_level(["<s>", "</s>"])
    return load_tokenizer(by_hand.save(raw, tmp_path, {"eos_token": "</s>"}))


def test_a_folder_that_transformers_cannot_load_is_a_message(plain: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((plain / name).read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "no-such-thing"}')
    with pytest.raises(CheckpointError, match="cannot load the model in .*no-such-thing"):
        Speaker(tmp_path, CPU)


def test_what_the_template_was_trained_with_is_given_again(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "quiet"))
    (folder / "chat_template.jinja").write_text("{% if quiet %}quiet {% endif %}" + CHAT)
    assert trained_options(folder) == {}
    asked = [{"role": "user", "content": "Hi"}]
    usual = Speaker(folder, CPU).ids_of(asked)
    check = {"name": "chat template", "passed": True, "detail": ""}
    check["values"] = {"sha256": "0" * 64, "options": {"quiet": True}}
    certificate = {
        **{"format_version": 1, "passed": True, "origin": "", "base_model": None, "step": 1},
        **{"dtype": "float32", "fingerprints": {}, "metrics": {}, "versions": {}},
        **{"checks": [check], "files": {}},
    }
    (folder / "certificate.json").write_text(json.dumps(certificate))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_dict=False, quiet=True
    )
    assert Speaker(folder, CPU).ids_of(asked) == given != usual
