"""Shares of a mixture by rows and tokens, replay, and that no example is used twice."""

from __future__ import annotations

import numpy as np
import pytest

from torchprime.data.blocks.mixture import Share, choose, shares_of
from torchprime.errors import DataError


def test_no_weights_use_everything() -> None:
    assert shares_of([Share("a")], None) is None
    assert shares_of([Share("a"), Share("b")], None) is None


def test_weights_become_shares() -> None:
    assert shares_of([Share("a", 1.0), Share("b", 3.0)], None) == {"a": 0.25, "b": 0.75}


def test_replay_takes_its_share_of_the_whole() -> None:
    parts = [Share("own"), Share("web", 2.0, True), Share("code", 1.0, True)]
    shares = shares_of(parts, 0.3)
    assert shares == pytest.approx({"own": 0.7, "web": 0.2, "code": 0.1})


@pytest.mark.parametrize(
    ("parts", "replay_share", "said"),
    [
        ([Share("a", 1.0), Share("b")], None, "no weight is given for b"),
        ([Share("a", replay=True)], 0.5, "only parts with replay=true"),
        ([Share("a"), Share("b", replay=True)], None, "replay_share=None: 1 parts"),
        ([Share("a")], 0.5, "replay_share=0.5: 0 parts"),
    ],
)
def test_what_cannot_be(parts: list[Share], replay_share: float | None, said: str) -> None:
    with pytest.raises(DataError, match=said):
        shares_of(parts, replay_share)


NAMES = ["a", "b", "c"]


def make(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.integers(1, 100, 6000), rng.choice(3, 6000, p=[0.6, 0.3, 0.1]).astype(np.int32)


@pytest.mark.parametrize("by_tokens", [False, True])
def test_shares_hold_and_the_scarcest_is_used_up(by_tokens: bool) -> None:
    lengths, sources = make()
    sizes = lengths if by_tokens else np.ones_like(lengths)
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    chosen = choose(sizes, sources, NAMES, shares, seed=7)
    assert len(set(chosen.tolist())) == len(chosen), "an example was used twice"
    assert (np.diff(chosen) > 0).all()
    amounts = np.array([sizes[chosen[sources[chosen] == place]].sum() for place in range(3)])
    assert amounts / amounts.sum() == pytest.approx([0.5, 0.3, 0.2], abs=0.002)
    everything = np.array([sizes[sources == place].sum() for place in range(3)])
    assert (amounts / everything).max() == pytest.approx(1.0, abs=0.002)


def test_the_choice_is_a_function_of_the_seed() -> None:
    lengths, sources = make()
    shares = {"a": 0.4, "b": 0.4, "c": 0.2}
    one, same, other = (choose(lengths, sources, NAMES, shares, s).tolist() for s in (1, 1, 2))
    assert one == same != other


def test_a_part_without_examples() -> None:
    lengths, sources = make()
    with pytest.raises(DataError, match="the part d has no usable example"):
        choose(lengths, sources, NAMES, {"a": 0.5, "d": 0.5}, 0)
