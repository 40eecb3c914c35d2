"""The text model inside a larger one computes what transformers' larger one does without images.

transformers gives a token of Qwen2.5-VL three positions; for text they are equal.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_families import TinyCheckpoint, make_wrapper

from torchprime.checkpoint.hf.read import check_names
from torchprime.losses.chunks import Projection
from torchprime.losses.cross_entropy import chunked_cross_entropy
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM

S = 12


def compare(made: TinyCheckpoint, name: str, config: dict[str, Any]) -> None:
    """Compare logits and gradients of one row, for a config.json of the same model."""
    theirs = getattr(transformers, f"{name}ForConditionalGeneration").from_pretrained(made.folder)
    ids = torch.randint(3, 60, (1, S), generator=torch.Generator().manual_seed(0))
    logits = theirs(input_ids=ids).logits
    F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").backward()

    ours = CausalLM(architecture_from_hf(config))
    spec = {name: tuple(weight.shape) for name, weight in ours.named_parameters()}
    check_names(spec, made.reader, tied=ours.architecture.tie_word_embeddings)
    ours.load_state_dict({name: made.reader.get(name).clone() for name in spec})
    place, ones = torch.arange(S)[None], torch.ones_like(ids)
    _close(ours.logits(ids, place, ones), logits, "logits")
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    hidden = ours(ids, place, ones)
    chunked_cross_entropy(
        hidden, Projection(*ours.output), targets, torch.ones(1, S), 3
    ).loss_sum.backward()
    inner = {f"model.{n}": p for n, p in theirs.model.language_model.named_parameters()}
    if not ours.architecture.tie_word_embeddings:
        inner["lm_head.weight"] = theirs.lm_head.weight
    assert inner.keys() == spec.keys()
    for weight, parameter in ours.named_parameters():
        _close(parameter.grad, inner[weight].grad, weight)


def _close(ours: Any, theirs: Any, what: str) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error < 1e-5, f"{what}: {error:.1e}"


@pytest.mark.parametrize("name", ["Gemma3", "Mistral3", "Qwen2_5_VL"])
def test_logits_and_gradients(name: str, tmp_path: Path) -> None:
    made = make_wrapper(tmp_path, name)
    compare(made, name, made.config)


def test_ministral_3_with_images(tmp_path: Path) -> None:
    """Its text model has a model_type of its own."""
    scaling = {"type": "yarn", "rope_theta": 1e4, "factor": 4.0, "llama_4_scaling_beta": 0.4}
    scaling |= {"original_max_position_embeddings": 5}
    made = make_wrapper(tmp_path, "Mistral3", model_type="ministral3", rope_parameters=scaling)
    assert architecture_from_hf(made.config).family == "ministral3"
    compare(made, "Mistral3", made.config)


YARN = {"factor": 4.0, "original_max_position_embeddings": 8, "mrope_section": [1, 1, 2]}


@pytest.mark.parametrize("kind", ["mrope", "yarn"])
def test_a_flat_config_of_qwen_2_5_vl(kind: str, tmp_path: Path) -> None:
    """As the hub has it: the text model's keys beside the wrapper's, the rope of version 4."""
    scaling = {"type": kind, **(YARN if kind == "yarn" else {"mrope_section": [1, 1, 2]})}
    made = make_wrapper(tmp_path, "Qwen2_5_VL", rope_scaling=dict(scaling), rope_theta=100.0)
    outer = {k: v for k, v in made.config.items() if k != "text_config"}
    inner = {k: v for k, v in made.config["text_config"].items() if k != "model_type"}
    for key in ("rope_parameters", "layer_types", "rms_norm_eps"):
        del inner[key]
    flat = {**inner, **outer, "rope_theta": 100.0, "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    compare(made, "Qwen2_5_VL", flat)
    nested = architecture_from_hf(made.config)
    assert architecture_from_hf(flat) == nested
    assert nested.family == "qwen2" and nested.rms_norm_eps == 1e-5
    # transformers 4.57 writes both.
    assert architecture_from_hf({**flat, "text_config": made.config["text_config"]}) == nested
    del flat["rope_theta"]
    assert architecture_from_hf(flat).rope.theta == 1e6


@pytest.mark.parametrize("inside", [None, False, True])
@pytest.mark.parametrize("outside", [False, True])
def test_the_wrappers_own_key_ties(outside: bool, inside: bool | None, tmp_path: Path) -> None:
    """A new Mistral 3 of transformers 5 is tied, whatever its text model's config says."""
    made = make_wrapper(tmp_path, "Mistral3")
    config = transformers.Mistral3Config.from_pretrained(tmp_path)
    config.tie_word_embeddings = outside
    text: Any = config.text_config
    text.tie_word_embeddings = bool(inside)
    transformers.Mistral3ForConditionalGeneration(config).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    if inside is None:
        saved["text_config"].pop("tie_word_embeddings", None)
    fresh = TinyCheckpoint(tmp_path, saved, type(made.reader)(tmp_path), {})
    assert architecture_from_hf(saved).tie_word_embeddings == outside
    compare(fresh, "Mistral3", saved)
