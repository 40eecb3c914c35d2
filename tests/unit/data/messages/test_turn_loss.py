"""The switches by which messages ask for loss or none: read, contradicting, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from torchprime.data.files.record import Rejection
from torchprime.data.files.source import SourceSpec
from torchprime.data.rows.read import Row, load_rows, read_row
from torchprime.data.shared.notes import RowNotes

USER = {"role": "user", "content": "u"}
BOT = {"role": "assistant", "content": "b"}
LAST = BOT | {"weight": 4}
DIFFER = "weights and switches of a message contradict each other"


def read(switches: dict[str, Any], kind: str = "messages", content: str = "b") -> Any:
    """The message with these switches, or why there is none."""
    bot = BOT | {"content": content} | switches
    record: dict[str, Any] = {"messages": [USER, bot, LAST]}
    if kind == "sharegpt":
        renamed = {"from": "gpt", "value": content} | switches
        last = {"from": "gpt", "value": "b", "weight": 4}
        record = {"conversations": [{"from": "human", "value": "u"}, renamed, last]}
    elif kind == "prompt_completion":
        record = {"prompt": [USER], "completion": [bot, LAST]}
    row = read_row("f:1", record, kind)
    if isinstance(row, Rejection):
        return row.reason
    assert not set(row.messages[1].template) - {"role", "content"}
    return row.messages[1]


ON = [1, 1.0, True]
OFF = [0, 0.0, False]
FLAGS = ("loss", "train", "training", "trainable")


@pytest.mark.parametrize("kind", ["messages", "sharegpt", "prompt_completion"])
@pytest.mark.parametrize(
    ("switches", "weight"),
    [
        ({}, 1.0),
        ({"weight": None, "train": None, "masked": None, "train_detail": None}, 1.0),
        ({"weight": 2}, 2.0),
        ({"loss_weight": 10}, 10.0),
        ({"loss_scale": 0.5}, 0.5),
        ({"weight": 0.5, "loss_weight": 0.5}, 0.5),
        *(({flag: on}, 1.0) for flag in FLAGS for on in ON),
        *(({flag: off}, 0.0) for flag in FLAGS for off in OFF),
        ({"masked": True}, 0.0),
        ({"masked": 0}, 1.0),
        ({"weight": 3, "train": True, "masked": False}, 3.0),
        ({"weight": 0, "loss": False, "masked": True}, 0.0),
    ],
)
def test_switches_are_read_in_all_kinds(kind: str, switches: dict, weight: float) -> None:
    assert read(switches, kind).weight == weight


@pytest.mark.parametrize(
    "switches",
    [
        {"weight": 1, "loss_weight": 2},
        {"weight": 3, "train": False},
        {"weight": 0, "train": True},
        {"loss": True, "training": False},
        {"masked": True, "loss": True},
        {"masked": False, "loss": False},
        {"masked": True, "weight": 1},
    ],
)
def test_switches_that_contradict_each_other(switches: dict) -> None:
    for kind in ("messages", "sharegpt", "prompt_completion"):
        assert read(switches, kind) == DIFFER


WEIGHT = "message weight is not a number from 0 to 10"


@pytest.mark.parametrize(
    ("switches", "reason"),
    [
        *(({"weight": bad}, WEIGHT) for bad in (-0.1, 10.5, float("nan"), "1", 10**400)),
        *(({"loss_weight": bad}, WEIGHT) for bad in (True, "x")),
        *(({flag: "yes"}, f"message {flag} is not true or false") for flag in (*FLAGS, "masked")),
        ({"train": 0.5}, "message train is not true or false"),
        ({"mask": 1}, "mask is not read: its meaning differs between trainers"),
        ({"mask": False}, "mask is not read: its meaning differs between trainers"),
    ],
)
def test_rejected_switches(switches: dict, reason: str) -> None:
    assert read(switches) == reason
    rejected = read_row("f:1", {"messages": [USER, BOT | switches]}, "messages")
    assert isinstance(rejected, Rejection) and rejected.detail.startswith("message 2")
    assert "mask" not in switches or "masked: true" in rejected.detail


def test_an_answer_not_trained_on_may_be_empty() -> None:
    assert read({"train": False}, content="").weight == 0.0


def test_switches_that_cannot_apply_are_reported() -> None:
    """Loss asked for a turn that has none; no loss asked for is what it gets."""
    notes = RowNotes()
    turns = [
        {"role": "system", "content": "s", "train": False, "weight": 0},
        USER | {"train": True, "loss_weight": 1.0, "masked": None},
        BOT | {"train": True},
        USER | {"masked": False},
        {"role": "tool", "content": "x", "loss": 0, "masked": True},
        BOT,
    ]
    row = read_row("f:1", {"messages": turns}, "messages", notes=notes)
    assert isinstance(row, Row)
    assert {path: (n.count, n.example) for path, n in notes.unused.items()} == {
        "messages.train on a turn of role user": (1, "True"),
        "messages.loss_weight on a turn of role user": (1, "1.0"),
        "messages.masked on a turn of role user": (1, "False"),
    }
    notes = RowNotes()
    record = {"prompt": [USER, BOT | {"weight": 1}, USER], "completion": [BOT]}
    assert isinstance(read_row("f:1", record, "prompt_completion", notes=notes), Row)
    assert list(notes.unused) == ["prompt.weight on a context turn"]


# Parts of a turn ---------------------------------------------------------------------------------

SAID = "I'm doing very well, thank you!"  # the example of Axolotl's documentation


def part(begin: object, end: object, train: object = True) -> dict[str, Any]:
    return {"begin_offset": begin, "end_offset": end, "train": train}


def kept(message: Any) -> str:
    """The content without the ranges that carry no loss."""
    text, masked = message.content, [n for a, b in message.masked for n in range(a, b)]
    return "".join("_" if n in masked else character for n, character in enumerate(text))


@pytest.mark.parametrize(
    ("detail", "trained"),
    [
        (
            [part(0, 8, False), part(9, 18), part(19, 30, False)],
            "_________ very well____________",
        ),
        ([part(9, 18)], "_________ very well____________"),  # Axolotl trains no other part
        ([part(19, 30), part(0, 3)], "I'm _______________, thank you!"),
        ([part(0, 30)], SAID),
        ([part(0, 30, False)], "_" * 31),
        ([part(30, 30, 1)], "_" * 30 + "!"),
    ],
)
@pytest.mark.parametrize("key", ["train_detail", "training_detail"])
def test_parts_of_a_turn(key: str, detail: list, trained: str) -> None:
    message = read({key: detail}, content=SAID)
    assert kept(message) == trained
    assert message.weight == 1.0
    assert read({key: detail, "weight": 2}, "sharegpt", SAID).masked == message.masked


@pytest.mark.parametrize(
    ("detail", "reason"),
    [
        *(
            (bad, "message train_detail is not a list of parts of its content")
            for bad in (
                *("x", {}, [], ["x"], [{"begin_offset": 0}]),
                *([part(-1, 3)], [part(3, 2)], [part(0, 31)], [part(0.5, 3)], [part("0", 3)]),
                *([part(0, 5), part(5, 6)], [part(True, 3)]),
            )
        ),
        ([part(0, 5, "yes")], "message train_detail.train is not true or false"),
    ],
)
def test_rejected_parts(detail: object, reason: str) -> None:
    assert read({"train_detail": detail}, content=SAID) == reason


def test_parts_beside_other_switches() -> None:
    parts = [part(0, 3)]
    assert read({"train_detail": parts, "train": False}, content=SAID) == DIFFER
    assert read({"train_detail": parts, "training_detail": [part(0, 4)]}, content=SAID) == DIFFER
    assert read({"train_detail": parts, "training_detail": parts}, content=SAID).masked == (
        (4, 31),
    )
    assert read({"train_detail": [], "train": True}, content=SAID).masked == ()
    text = [{"type": "text", "text": SAID}]
    record = {"messages": [USER, BOT | {"content": text, "train_detail": parts}]}
    row = read_row("f:1", record, "messages")
    assert isinstance(row, Rejection) and "not a string" in row.detail
    notes = RowNotes()
    record = {"messages": [USER | {"train_detail": [part(0, 0)]}, BOT]}
    assert isinstance(read_row("f:1", record, "messages", notes=notes), Row)
    assert list(notes.unused) == ["messages.train_detail on a turn of role user"]


# Switches of a row -------------------------------------------------------------------------------


def test_only_the_last_answer() -> None:
    turns = [USER, BOT, USER, BOT | {"weight": 2}]

    def weights(only_last: object) -> Any:
        row = read_row("f:1", {"messages": turns, "only_last": only_last}, "messages")
        return row.reason if isinstance(row, Rejection) else [m.weight for m in row.messages]

    assert weights(True) == [0, 0, 0, 2]
    assert weights(False) == weights(None) == [1, 1, 1, 2]
    assert weights("x") == "only_last is not true or false"


def test_the_masked_role_of_a_row() -> None:
    """NeMo's `mask` names the role whose turns carry no loss: the user's do not anyway."""
    for mask in ("User", "user", "human", None):
        assert isinstance(read_row("f:1", {"messages": [USER, BOT], "mask": mask}, "messages"), Row)
    for mask in ("Assistant", [0, 1], 1):
        row = read_row("f:1", {"messages": [USER, BOT], "mask": mask}, "messages")
        assert isinstance(row, Rejection) and row.reason.startswith("mask is not read")


def test_a_users_case(shared_dir: Path) -> None:
    path = shared_dir / "cases/data/message_flags/loss_false.jsonl"
    for row in load_rows(SourceSpec(file_dataset_path=str(path)), 9):
        assert [m.weight for m in row.messages if m.role == "assistant"] == [0.0, 1.0]
