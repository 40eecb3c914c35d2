"""Our labels against TRL's on the same rows, tokenizers and templates: every difference explained.

TRL is an independent reference: its trainer prepares the rows in a process of its own (it must not
meet XLA) and gives the id that each position is to predict. Ours come from the blocks that training
reads. Where a row differs, a rule has to say why, and a rule checks all it claims: a difference
that none explains fails, and so does another count of rows in any class.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import data_settings
import numpy as np
import pytest
import tokenizers

from torchprime.data.files.source import SourceSpec
from torchprime.data.prepare import Part, prepare_dataset
from torchprime.data.report import DataReport
from torchprime.data.rows.read import QUESTION_PROMPT, RowReading
from torchprime.data.templates.choose import resolve_template
from torchprime.data.templates.turns import REASON_LEFT_OUT
from torchprime.data.tokenizer.load import Tokenizer, load_tokenizer
from torchprime.data.tokens import completions as tokenize
from torchprime.data.tokens import conversations as chat

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None, reason="trl is not installed"
)

Rows = list[dict[str, Any]]
WORKER = Path(__file__).with_name("trl_worker.py")
BLOCK = 8192

# Classes: what a row that differs is explained by. Rows may have several.
EQUAL = "equal"
NEWLINE = "TRL's mark takes in the newline behind the stop token, which no answer needs"
HEADER = "TRL's mark takes in the newline that ends the header, which a server feeds"
CONTEXT_TURN = "TRL supervises turns of others inside a completion of several turns"
OFF_TURN = "TRL ignores train: false"
CONTEXT = "TRL leaves out the end of the prompt where it merges with the completion"
THINK = "TRL trains on another template, with a think block in every turn"
QUOTED = "TRL quotes the JSON text of a call's arguments once more"
# Classes of rows that we reject, each with what TRL does.
LOST_CALL = "TRL trains on an empty answer where the template leaves out a tool call"
FAKED = "TRL lets a message end its own turn by spelling the token"
UNSEEN = "TRL leaves the first token without a label"
REJECTED = {
    REASON_LEFT_OUT: LOST_CALL,
    chat.REASON_SPECIAL: FAKED,
    tokenize.REASON_UNPREDICTED: UNSEEN,
}
# TRL's run ends where we reject single rows.
STOPPED = "TRL stops at the first row of this kind"

# Rows --------------------------------------------------------------------------------------------


def _records(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def gsm8k(shared: Path) -> Rows:
    return [
        {"prompt": QUESTION_PROMPT.format(question=r["question"]), "completion": r["answer"]}
        for r in _records(shared / "data" / "gsm8k" / "train.jsonl")[:400]
    ]


def stories(shared: Path) -> Rows:
    return _records(shared / "data" / "tinystories_qa.jsonl")


def stories_space(shared: Path) -> Rows:
    """The space in front of the answer moved to the prompt: a common mistake."""
    return [
        {"prompt": row["prompt"] + " ", "completion": row["completion"].lstrip()}
        for row in stories(shared)
    ]


def no_prompt(shared: Path) -> Rows:
    return [{"prompt": "", "completion": "Once upon a time."}, *stories(shared)[:1]]


def texts(shared: Path) -> Rows:
    head = (shared / "data" / "tinystories_valid_head.txt").read_text(encoding="utf-8")
    return [{"text": text} for text in head.split("\n\n") if text.strip()][:200]


def short_chats(shared: Path) -> Rows:
    """One question, one answer, 25 of 128 with a system message."""
    return _records(shared / "data" / "tinker_conversations.jsonl")


def short_chats_without_system(shared: Path) -> Rows:
    return [row for row in short_chats(shared) if row["messages"][0]["role"] != "system"]


def tiny_chat(shared: Path) -> Rows:
    roles = {"human": "user", "gpt": "assistant", "system": "system"}
    rows = json.loads((shared / "data" / "torchtune_chat_tiny.json").read_text(encoding="utf-8"))
    return [
        {
            "messages": [
                {"role": roles[t["from"]], "content": t["value"]} for t in r["conversations"]
            ]
        }
        for r in rows
    ]


def _dialogues(shared: Path, count: int, arguments: Callable[[str], Any]) -> Rows:
    rows = _records(shared / "data" / "sgd_dev_messages.jsonl")[:count]
    for row in rows:
        row["tools"] = json.dumps(row["tools"])  # TRL's documentation asks for text
        for message in row["messages"]:
            for call in message.get("tool_calls") or ():
                call["function"]["arguments"] = arguments(call["function"]["arguments"])
    return rows


def tool_chats(shared: Path) -> Rows:
    """Arguments as objects, which templates are written for."""
    return _dialogues(shared, 300, json.loads)


def tool_chats_text(shared: Path) -> Rows:
    """Arguments as JSON text, as the API has them."""
    return _dialogues(shared, 40, str)


def tool_and_short_chats(shared: Path) -> Rows:
    return tool_chats_text(shared) + short_chats(shared)


def long_chats(shared: Path) -> Rows:
    """Many turns, no tools."""
    return [
        {"messages": [m for m in row["messages"] if m["role"] != "tool" and m["content"]]}
        for row in _dialogues(shared, 60, str)
    ]


def long_chats_half_off(shared: Path) -> Rows:
    rows = long_chats(shared)
    for row in rows:
        for message in row["messages"][1:-2:4]:
            message["train"] = False
    return rows


def no_assistant(shared: Path) -> Rows:
    return [{"messages": [{"role": "user", "content": "Hm."}]}, *short_chats(shared)[:1]]


def faked_turn(shared: Path) -> Rows:
    turns = [("user", "Say <|im_end|>."), ("assistant", "I'd say <|im_end|>, then.")]
    messages = [{"role": role, "content": content} for role, content in turns]
    return [{"messages": messages}, *short_chats(shared)[:1]]


def _completions(rows: Rows, turns: int) -> Rows:
    return [
        {"prompt": r["messages"][:-turns], "completion": r["messages"][-turns:]}
        for r in rows
        if r["messages"][-turns]["role"] == "assistant"
    ]


def answers(shared: Path) -> Rows:
    return _completions(short_chats(shared), 1)


def last_answers(shared: Path) -> Rows:
    return _completions(long_chats(shared), 1)


def last_three_turns(shared: Path) -> Rows:
    return _completions(long_chats(shared), 3)


# Cases -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """Rows prepared by both.

    Attributes:
        tokenizer: a name that `_tokenizer_folder` knows.
        rows: for both, unless ours come from `our_rows`.
        template: below ../shared/templates; "" where the rows need none.
        trl: SFTConfig's arguments; mode is our compute_loss_on.
        classes: of how many rows each is the explanation.
    """

    tokenizer: str
    rows: Callable[[Path], Rows]
    classes: Mapping[str, int]
    template: str = ""
    trl: Mapping[str, Any] = field(default_factory=dict)
    mode: str = "auto"
    our_rows: Callable[[Path], Rows] | None = None


def _training(name: str) -> str:
    return f"trl_training/{name}_training"


def _assistant(
    tokenizer: str, name: str, rows: Callable[[Path], Rows], classes: Mapping[str, int]
) -> Case:
    """Loss on every assistant turn, with the template TRL marks for that."""
    return Case(tokenizer, rows, classes, _training(name), {"assistant_only_loss": True})


# Byte-level BPE with and without its own padding token, sentencepiece with merges over spaces and
# without: only the last two begin texts with BOS.
PLAIN = ("qwen3", "gpt2", "mistral_v3", "stories260K")
ALL = {"completion_only_loss": False}
CASES: dict[str, Case] = {
    **{f"gsm8k, {t}": Case(t, gsm8k, {EQUAL: 400}) for t in PLAIN},
    **{f"stories, {t}": Case(t, stories, {EQUAL: 225}) for t in PLAIN},
    **{f"space in the prompt, {t}": Case(t, stories_space, {CONTEXT: 225}) for t in PLAIN[:3]},
    "space in the prompt, stories260K": Case(
        "stories260K", stories_space, {EQUAL: 50, CONTEXT: 175}
    ),
    **{f"text, {t}": Case(t, texts, {EQUAL: 200}) for t in PLAIN},
    "gsm8k, loss on all": Case("qwen3", gsm8k, {EQUAL: 400}, trl=ALL, mode="all"),
    "gsm8k, loss on all, BOS": Case("stories260K", gsm8k, {EQUAL: 400}, trl=ALL, mode="all"),
    "no prompt": Case("qwen3", no_prompt, {UNSEEN: 1, EQUAL: 1}),
    "no prompt but BOS": Case("mistral_v3", no_prompt, {EQUAL: 2}),
    # Conversations
    "short chats, llama3": _assistant("formats", "llama3", short_chats, {EQUAL: 128}),
    "short chats, qwen3": _assistant("qwen3", "qwen3", short_chats, {NEWLINE: 128}),
    "short chats, qwen2.5": _assistant(
        "qwen3", "qwen2_5", short_chats, {NEWLINE: 128, HEADER: 128}
    ),
    "short chats, gemma": _assistant(
        "formats", "gemma", short_chats_without_system, {NEWLINE: 103}
    ),
    "system message, gemma": _assistant("formats", "gemma", short_chats, {STOPPED: 25}),
    "short chats, loss on all": Case(
        "formats", short_chats, {EQUAL: 128}, _training("llama3"), mode="all"
    ),
    "tiny chat, llama3": _assistant("formats", "llama3", tiny_chat, {EQUAL: 1}),
    "tiny chat, qwen3": _assistant("qwen3", "qwen3", tiny_chat, {NEWLINE: 1}),
    "long chats, llama3": _assistant("formats", "llama3", long_chats, {EQUAL: 60}),
    "long chats, qwen3": _assistant("qwen3", "qwen3", long_chats, {NEWLINE: 60}),
    "long chats, qwen2.5": _assistant("qwen3", "qwen2_5", long_chats, {NEWLINE: 60, HEADER: 60}),
    "long chats, gemma": _assistant("formats", "gemma", long_chats, {NEWLINE: 60}),
    "long chats, qwen3's own": Case(
        *("qwen3", long_chats, {THINK: 60, NEWLINE: 60}, "trl/qwen3"),
        trl={"assistant_only_loss": True},
    ),
    "long chats, half off": _assistant("formats", "llama3", long_chats_half_off, {OFF_TURN: 60}),
    "no assistant": _assistant("formats", "llama3", no_assistant, {STOPPED: 1}),
    "faked turn": _assistant("qwen3", "qwen3", faked_turn, {FAKED: 1, NEWLINE: 1}),
    # Tools
    "tools, qwen3": _assistant("qwen3", "qwen3", tool_chats, {NEWLINE: 300}),
    "tools, qwen3, text": _assistant("qwen3", "qwen3", tool_chats_text, {NEWLINE: 40}),
    "tools, qwen2.5": _assistant("qwen3", "qwen2_5", tool_chats, {NEWLINE: 300, HEADER: 300}),
    "tools, qwen2.5, text": _assistant(
        "qwen3", "qwen2_5", tool_chats_text, {QUOTED: 40, NEWLINE: 40, HEADER: 40}
    ),
    "tools, llama3": _assistant(
        "formats", "llama3", tool_and_short_chats, {LOST_CALL: 40, EQUAL: 128}
    ),
    # Conversations in prompt and completion
    "answers, llama3": Case("formats", answers, {EQUAL: 128}, _training("llama3")),
    "answers, qwen3": Case("qwen3", answers, {NEWLINE: 128}, _training("qwen3")),
    "answers, qwen3's own": Case("qwen3", answers, {NEWLINE: 128}, "trl/qwen3"),
    "last answers, qwen2.5": Case("qwen3", last_answers, {NEWLINE: 60}, _training("qwen2_5")),
    "last answers, qwen3's own": Case("qwen3", last_answers, {NEWLINE: 60}, "trl/qwen3"),
    "three turns, llama3": Case(
        "formats", last_three_turns, {CONTEXT_TURN: 60}, _training("llama3")
    ),
    "three turns, qwen3": Case(
        "qwen3", last_three_turns, {CONTEXT_TURN: 60, NEWLINE: 60}, _training("qwen3")
    ),
    "last_assistant": Case(
        *("formats", last_answers, {EQUAL: 60}, _training("llama3")),
        mode="last_assistant",
        our_rows=long_chats,
    ),
}


# Both sides --------------------------------------------------------------------------------------


def _tokenizer_folder(name: str, shared: Path, scratch: Path) -> Path:
    """A folder that both sides load; where the shared one is not complete, a copy that is."""
    if name == "qwen3":
        return shared / "tokenizers" / name
    if name == "stories260K":
        return shared / "models" / name
    folder = scratch / name
    if folder.exists():
        return folder
    folder.mkdir()
    source = shared / "tokenizers" / ("qwen3" if name == "formats" else name) / "tokenizer.json"
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if name == "formats":  # a real vocabulary with the control tokens of Llama 3 and Gemma
        raw = tokenizers.Tokenizer.from_file(str(source))
        header = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        turn = ["<start_of_turn>", "<end_of_turn>"]
        raw.add_special_tokens(["<|begin_of_text|>", *header, *turn])
        raw.save(str(folder / "tokenizer.json"))
        config |= {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
        config |= {"add_bos_token": False, "pad_token": "<|endoftext|>"}
    else:
        shutil.copyfile(source, folder / "tokenizer.json")
        ends = {"mistral_v3": ("<s>", "</s>"), "gpt2": ("<|endoftext|>", "<|endoftext|>")}
        config |= dict(zip(("bos_token", "eos_token"), ends[name], strict=True))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@dataclass(frozen=True)
class Prepared:
    """One case: its rows, what TRL made of them, and what is needed to make ours."""

    rows: Rows
    our_rows: Path
    trl: list[list[list[int]]] | str  # ids and targets of each row, or the error
    folder: Path
    template: Path | None


@pytest.fixture(scope="module")
def prepared(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Prepared]:
    """All cases through TRL, in one process."""
    scratch = tmp_path_factory.mktemp("trl")
    inputs: dict[str, dict[str, Any]] = {}
    made: dict[str, tuple[Rows, Path, Path, Path | None]] = {}
    for number, (name, case) in enumerate(CASES.items()):
        rows, path = case.rows(shared_dir), scratch / f"{number}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        ours = path
        if case.our_rows is not None:
            ours = scratch / f"{number}_ours.jsonl"
            ours.write_text("".join(json.dumps(row) + "\n" for row in case.our_rows(shared_dir)))
        folder = _tokenizer_folder(case.tokenizer, shared_dir, scratch)
        template = shared_dir / "templates" / f"{case.template}.jinja" if case.template else None
        made[name] = rows, ours, folder, template
        inputs[name] = {
            "tokenizer": str(folder),
            "template": template.read_text(encoding="utf-8") if template else "",
            "rows": str(path),
            "options": dict(case.trl),
        }
    (scratch / "cases.json").write_text(json.dumps(inputs))
    results = scratch / "results.json"
    command = [sys.executable, str(WORKER), str(scratch / "cases.json"), str(results)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PJRT_", "XLA_"))}
    environment |= {"USE_TORCH_XLA": "0", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(results.read_text())
    return {
        name: Prepared(rows, ours, found[name], folder, template)
        for name, (rows, ours, folder, template) in made.items()
    }


_load_tokenizer = lru_cache(load_tokenizer)


@dataclass(frozen=True)
class Pair:
    """One row's ids and which of them are predicted, on both sides."""

    row: Mapping[str, Any]
    tokenizer: Tokenizer
    ours: list[int]
    our_labels: list[bool]
    theirs: list[int]
    their_labels: list[bool]

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def _labels(ids: Sequence[int], targets: Sequence[int]) -> list[bool]:
    """Return True for each predicted id; a target other than the next id is an error."""
    assert targets[-1] == tokenize.IGNORED
    nexts = zip(ids[1:], targets[:-1], strict=True)
    assert all(target in (tokenize.IGNORED, following) for following, target in nexts)
    return [False, *(target != tokenize.IGNORED for target in targets[:-1])]


def _prepare_ours(
    case: Case, found: Prepared
) -> tuple[dict[int, tuple[list[int], list[bool]]], DataReport, Tokenizer]:
    """Return ids and labels of each accepted row, by its place in the file."""
    tokenizer = _load_tokenizer(found.folder)
    chosen = str(found.template) if found.template else None
    data, report = prepare_dataset(
        [Part(SourceSpec(file_dataset_path=str(found.our_rows)), RowReading())],
        tokenizer,
        data_settings.settings(
            BLOCK, compute_loss_on=case.mode, packing="none", max_rejected_fraction=1.0
        ),
        template=resolve_template(chosen, tokenizer),
    )
    rows: dict[int, tuple[list[int], list[bool]]] = {}
    for block in range(data.num_blocks):
        batch = data.batch(np.array([block]))
        real = batch.segment_ids[0] > 0
        ids, targets = batch.input_ids[0][real].tolist(), batch.targets[0][real].tolist()
        example = int(data.plan.examples[block])
        rows[_place(data.store.row_id(example))] = ids, _labels(ids, targets)
        assert set(batch.loss_weights[0][real].tolist()) <= {0.0, 1.0}
    return rows, report, tokenizer


def _place(row_id: str) -> int:
    return int(row_id.rpartition(":")[2]) - 1


# Explanations ------------------------------------------------------------------------------------


def explain(pair: Pair) -> set[str]:
    """The classes of this row; AssertionError where something is left without explanation."""
    if pair.ours != pair.theirs:
        for rule in (_context, _think, _quoted):
            classes = rule(pair)
            if classes:
                return classes
        raise AssertionError(f"ids:\n{pair.text(pair.ours)}\n----\n{pair.text(pair.theirs)}")
    if pair.our_labels == pair.their_labels:
        return {EQUAL}
    return {_explain_run(pair, run) for run in _runs(pair)}


def _runs(pair: Pair) -> list[range]:
    """Stretches of tokens that one side predicts and the other does not."""
    both = list(zip(pair.our_labels, pair.their_labels, strict=True))
    runs = [list(run) for _, run in groupby(range(len(both)), key=both.__getitem__)]
    return [range(run[0], run[-1] + 1) for run in runs if len(set(both[run[0]])) == 2]


def _explain_run(pair: Pair, run: range) -> str:
    assert not any(pair.our_labels[i] for i in run), f"only ours: {_shown(pair, run)}"
    text, before = (pair.text(pair.theirs[a:b]) for a, b in ((run.start, run.stop), (0, run.start)))
    if text == "\n" and before.endswith(("<|im_end|>", "<end_of_turn>")):
        assert pair.our_labels[run.start - 1], "the stop token itself is ours too"
        return NEWLINE
    if text == "\n" and before.endswith("<|im_start|>assistant"):
        return HEADER
    if text in _context_turns(pair.row):
        return CONTEXT_TURN
    if text in _off_turns(pair.row):
        return OFF_TURN
    raise AssertionError(f"only theirs: {_shown(pair, run)}")


def _shown(pair: Pair, run: range) -> str:
    return repr([pair.text([i]) for i in pair.theirs[run.start : run.stop]])


def _context_turns(row: Mapping[str, Any]) -> list[str]:
    """A user's turn inside a completion, between one answer's stop token and the next answer."""
    said = [m["content"] for m in row.get("completion", ()) if m["role"] == "user"]
    return [
        form.format(text)
        for text in said
        for form in (
            "\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
            "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        )
    ]


def _off_turns(row: Mapping[str, Any]) -> list[str]:
    return [m["content"] + "<|eot_id|>" for m in row["messages"] if m.get("train") is False]


def _context(pair: Pair) -> set[str]:
    """Ours feeds exactly the prompt's ids. TRL tokenizes prompt and completion as one text and
    takes for the prompt what the two have in common."""
    if not isinstance(pair.row.get("prompt"), str):
        return set()
    tokenizer = pair.tokenizer
    prompt = tokenizer.prompt_ids(pair.row["prompt"])
    joint = tokenizer.prompt_ids(pair.row["prompt"] + pair.row["completion"])
    common = len(os.path.commonprefix([prompt, joint]))
    assert common < len(prompt)
    assert pair.text(pair.ours) == pair.text(pair.theirs)
    assert pair.ours[: len(prompt)] == prompt
    assert pair.theirs == [*joint, tokenizer.eos_id]
    assert pair.our_labels == [i >= len(prompt) for i in range(len(pair.ours))]
    assert pair.their_labels == [i >= common for i in range(len(pair.theirs))]
    return {CONTEXT}


def _think(pair: Pair) -> set[str]:
    """The template that the tokenizer has writes an empty think block into the last turn only;
    TRL exchanges it for one that writes it into all of them."""
    block = pair.tokenizer.encode_ids(["<think>\n\n</think>\n\n"])[0]
    kept: list[int] = []
    i = 0
    while i < len(pair.theirs):
        here = range(i, i + len(block))
        added = pair.theirs[i : here.stop] == block
        if added and pair.ours[len(kept) : len(kept) + len(block)] != block:
            assert all(pair.their_labels[j] for j in here)
            i = here.stop
        else:
            kept.append(i)
            i += 1
    ids, labels = [pair.theirs[i] for i in kept], [pair.their_labels[i] for i in kept]
    if ids != pair.ours:
        return set()
    rest = Pair(pair.row, pair.tokenizer, pair.ours, pair.our_labels, ids, labels)
    return {THINK} | (explain(rest) - {EQUAL})


def _quoted(pair: Pair) -> set[str]:
    """A template that writes `arguments | tojson` makes a quoted string of a text. We give it the
    object that the text says, as vLLM does; what TRL supervises is otherwise ours and, with Qwen
    2.5, the newlines around it."""
    calls = [c for m in pair.row.get("messages", ()) for c in m.get("tool_calls") or ()]
    arguments = {c["function"]["arguments"] for c in calls}

    def unquoted(text: str) -> str:
        for given in arguments:
            text = text.replace(json.dumps(given), json.dumps(json.loads(given)))
        return text

    theirs = unquoted(pair.text(pair.theirs))
    if not arguments or theirs == pair.text(pair.theirs):
        return set()
    assert pair.tokenizer.encode_ids([theirs])[0] == pair.ours
    ours, theirs = (
        [
            pair.text([ids[i] for i in run])
            for on, run in groupby(range(len(ids)), key=labels.__getitem__)
            if on
        ]
        for ids, labels in ((pair.ours, pair.our_labels), (pair.theirs, pair.their_labels))
    )
    assert list(map(unquoted, theirs)) == [f"\n{text}\n" for text in ours]
    return {QUOTED, HEADER, NEWLINE}


def _explain_rejected(
    reason: str, row: Mapping[str, Any], theirs: list[int], labels: list[bool], tokenizer: Tokenizer
) -> str:
    """The class of a row that we reject, with what TRL did checked."""
    found = REJECTED[reason]
    text = tokenizer.decode(theirs, skip_special_tokens=False)
    learnt = tokenizer.decode(
        [i for i, on in zip(theirs, labels, strict=True) if on], skip_special_tokens=False
    )
    if found == LOST_CALL:
        calls = [m for m in row["messages"] if m.get("tool_calls")]
        answers = learnt.split("<|eot_id|>")[:-1]
        assert answers.count("") == len(calls) > 0
        assert not any(c["function"]["name"] in text for m in calls for c in m["tool_calls"])
    elif found == FAKED:
        ends = text.count("<|im_end|>")
        assert ends > len(row["messages"])
        assert theirs.count(tokenizer.eos_id) == ends, "what was written became the control token"
    else:
        assert row["prompt"] == "" and labels == [False, *[True] * (len(theirs) - 1)]
        assert text.startswith(row["completion"])
    return found


@pytest.mark.parametrize("name", CASES)
def test_labels_are_trls_but_for_explained_differences(
    name: str, prepared: dict[str, Prepared]
) -> None:
    case, found = CASES[name], prepared[name]
    ours, report, tokenizer = _prepare_ours(case, found)
    reasons = {_place(i): reason for reason, ids in report.rejected.items() for i in ids}
    assert len(ours) + len(reasons) == len(found.rows)
    if isinstance(found.trl, str):
        assert case.classes == {STOPPED: len(reasons)}, found.trl
        assert found.trl.startswith(("TemplateError: System role", "RuntimeError: You're using"))
        return
    assert len(found.trl) == len(found.rows)
    classes: Counter[str] = Counter()
    for i, (row, (ids, targets)) in enumerate(zip(found.rows, found.trl, strict=True)):
        labels = _labels(ids, targets)
        assert any(labels)
        if i in reasons:
            classes[_explain_rejected(reasons[i], row, ids, labels, tokenizer)] += 1
        else:
            classes.update(explain(Pair(row, tokenizer, *ours[i], ids, labels)))
    assert classes == case.classes
