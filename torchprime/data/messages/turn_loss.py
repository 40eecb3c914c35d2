"""Loss switches of one message: the keys with which trainers set the loss of a turn.

    weight, loss_weight, loss_scale     a number, 0 to 10 (OpenAI, Mistral, LLaMA-Factory, Swift)
    loss, train, training, trainable    true or 1: loss; false or 0: none (Swift, Axolotl, Tinker)
    masked                              true or 1: no loss (torchtune)
    train_detail, training_detail       parts of the content by character offsets (Axolotl)

The switches of one message have to agree. `mask` is rejected: for some trainers 1 means loss, for
others no loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torchprime.data.shared.fields import (
    BAD_TRAIN_DETAIL,
    MASK_UNCLEAR,
    MESSAGE_SWITCH,
    MESSAGE_WEIGHT,
    SWITCHES_DIFFER,
    Unusable,
    show,
    type_name,
    weight_of,
)

WEIGHTS = ("weight", "loss_weight", "loss_scale")
FLAGS = ("loss", "train", "training", "trainable")
MASKED, MASK = "masked", "mask"
DETAILS = ("train_detail", "training_detail")
SWITCHES = frozenset((*WEIGHTS, *FLAGS, MASKED, MASK, *DETAILS))
OFFSETS = ("begin_offset", "end_offset", "train")
Part = tuple[int, int, bool]  # characters [start, end) of the content, and True if they carry loss


class TurnLoss(NamedTuple):
    """The loss switches of one message.

    Attributes:
        weight: of the turn's loss.
        parts: of the content, in order, from `train_detail`; empty without it.
        asking: keys that request loss.
    """

    weight: float
    parts: tuple[Part, ...] = ()
    asking: tuple[str, ...] = ()


NO_SWITCH = TurnLoss(1.0)


def read_turn_loss(turn: Mapping[str, Any], given: tuple[str, ...], where: str) -> TurnLoss:
    """Read the loss switches of a message; `given` are their keys."""
    weights: dict[str, float] = {}
    on: dict[str, bool] = {}
    parts: dict[str, tuple[Part, ...]] = {}
    for key in given:
        value = turn[key]
        if value is None:  # Arrow gives every message the keys that any message has
            continue
        if key == MASK:
            raise Unusable(MASK_UNCLEAR, f"{where}say masked: true or train: false instead")
        if key in DETAILS:
            parts[key] = _parts(value, key, where)
        elif key in WEIGHTS:
            weights[key] = weight_of(value, MESSAGE_WEIGHT, where)
            on[key] = weights[key] > 0
        else:
            on[key] = _flag(value, key, where) != (key == MASKED)
    if not on and not parts:
        return NO_SWITCH
    differing = (len(set(each.values())) > 1 for each in (on, weights, parts))
    detail = next(iter(parts.values()), ())
    if any(differing) or (False in on.values() and any(train for _, _, train in detail)):
        given_values = ", ".join(f"{key}: {show(turn[key])}" for key in (*on, *parts))
        raise Unusable(SWITCHES_DIFFER, where + given_values)
    if parts and not detail and not on:
        # Axolotl trains nothing of such a turn, but a reader would expect loss on all of it.
        raise Unusable(BAD_TRAIN_DETAIL.format(next(iter(parts))), f"{where}an empty list")
    weight = next(iter(weights.values()), 1.0) if all(on.values()) else 0.0
    asking = [key for key, value in on.items() if value]
    asking += [key for key, each in parts.items() if any(train for _, _, train in each)]
    return TurnLoss(weight, detail, tuple(asking))


def _flag(value: Any, key: str, where: str) -> bool:
    if isinstance(value, (bool, int, float)) and value in (0, 1):
        return bool(value)
    raise Unusable(MESSAGE_SWITCH.format(key), where + show(value))


def _parts(value: Any, key: str, where: str) -> tuple[Part, ...]:
    """Return the parts in order; `end_offset` is a part's last character, as in Axolotl."""
    reason = BAD_TRAIN_DETAIL.format(key)
    if not isinstance(value, list):
        raise Unusable(reason, where + type_name(value))
    parts: list[Part] = []
    for part in value:
        if not isinstance(part, Mapping) or any(name not in part for name in OFFSETS):
            raise Unusable(reason, f"{where}a part without {', '.join(OFFSETS)}")
        begin, end, train = (part[name] for name in OFFSETS)
        if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
            raise Unusable(reason, f"{where}offsets {show(begin)} to {show(end)}")
        parts.append((begin, end + 1, _flag(train, f"{key}.train", where)))
    parts.sort()
    for before, after in zip(parts, parts[1:], strict=False):
        if after[0] < before[1]:
            raise Unusable(reason, f"{where}two parts cover character {after[0]}")
    return tuple(parts)


def spans_without_loss(
    parts: tuple[Part, ...], content: str, where: str
) -> tuple[tuple[int, int], ...]:
    """Return the ranges of the content that no part with `train: true` covers.

    As in Axolotl, text outside of all parts carries no loss either.
    """
    if not parts:
        return ()
    if parts[-1][1] > len(content):
        raise Unusable(
            BAD_TRAIN_DETAIL.format(DETAILS[0]),
            f"{where}offset {parts[-1][1] - 1} in a content of {len(content)} characters",
        )
    borders = [place for start, end, train in parts if train for place in (start, end)]
    borders = [0, *borders, len(content)]
    pairs = zip(borders[::2], borders[1::2], strict=True)
    return tuple((start, end) for start, end in pairs if start < end)
