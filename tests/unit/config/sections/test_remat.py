"""The tensors that a remat config keeps, moves and computes again."""

from __future__ import annotations

import pytest

from torchprime.config.sections.remat import NAMES, RematConfig
from torchprime.errors import ConfigError
from torchprime.models.decoder import NAMED_OUTPUTS

ATTENTION = ("layer_input", "q", "k", "v", "core_out", "attn_out")


@pytest.mark.parametrize(
    ("given", "saved", "offloaded"),
    [
        (dict(policy="none"), NAMES, ()),
        (dict(policy="minimal"), NAMES, ()),
        (dict(policy="attention"), ATTENTION, ()),
        (dict(policy="full"), ("layer_input",), ()),
        (dict(policy="offload"), (), ("layer_input",)),
        (dict(policy="full", save=["core_out"]), ("layer_input", "core_out"), ()),
        (dict(policy="minimal", recompute=["up"]), NAMES[:-1], ()),
        (dict(policy="attention", offload=["layer_input", "q"]), ATTENTION[2:], ATTENTION[:2]),
        (dict(policy="offload", save=["layer_input"]), ("layer_input",), ()),
    ],
)
def test_names_of_a_policy_and_changes_to_it(given: dict, saved: tuple, offloaded: tuple) -> None:
    remat = RematConfig(scan_layers=True, **given)
    assert (remat.saved, remat.offloaded) == (saved, offloaded)
    assert sorted([*saved, *offloaded, *remat.recomputed]) == sorted(NAMES)
    assert remat.recomputes == bool(remat.recomputed)


def test_every_name_is_an_output_of_the_decoders_layer() -> None:
    assert ("layer_input", *NAMED_OUTPUTS) == NAMES


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(policy="full", save=["qq"]), "remat.save: given 'qq', expected names of layer_input"),
        (dict(policy="full", save=["q"], offload=["q"]), "expected each name in one list"),
        (dict(policy="full", recompute=["layer_input"]), "remat.recompute: given 'layer_input'"),
        (dict(policy="none", save=["q"], scan_layers=False), "Set remat.policy=minimal"),
        (dict(policy="full", offload=["q"], scan_layers=False), "remat.offload: given"),
    ],
)
def test_what_makes_no_sense_is_refused(given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        RematConfig(**{"scan_layers": True, **given})
