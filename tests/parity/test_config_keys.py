"""One key of a config.json changed: our logits are transformers', or the key is refused by name.

For every family, every field of transformers' own config class and the keys that older files have
are set to values that a file may hold: plausible ones, and null, text, lists, zeros and huge
numbers. Where transformers refuses what we accept, the config that we would export must be one
that it accepts, and give the same logits.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from torchprime.checkpoint.hf.portable_config import portable_config
from torchprime.errors import CheckpointError
from torchprime.models.architecture import Architecture, architecture_from_hf
from torchprime.models.decoder import CausalLM

S = 40
LARGEST = 100_000  # parameters; a config that asks for more is only read
BASE: dict[str, Any] = dict(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
    eos_token_id=1,
)
LLAMA3: dict[str, Any] = dict(
    rope_type="llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=3.0,
    original_max_position_embeddings=16,
)
LINEAR = {"rope_type": "linear", "factor": 2.0}
YARN: dict[str, Any] = dict(
    rope_type="yarn",
    factor=4.0,
    original_max_position_embeddings=16,
    beta_fast=3.0,
    beta_slow=0.5,
    attention_factor=None,
    mscale=1.3,
    mscale_all_dim=0.7,
    truncate=False,
)
LONGROPE: dict[str, Any] = dict(
    rope_type="longrope",
    short_factor=[1.0, 1.1, 1.2, 1.3],
    long_factor=[1.0, 1.5, 2.0, 3.0],
    original_max_position_embeddings=16,
    factor=None,
    attention_factor=None,
)
# A name with a dash: a family with another rope, for which only the rope's keys are changed.
FAMILIES = {
    "llama": {"rope_theta": 100.0, "rope_scaling": LLAMA3, "head_dim": 8},
    "mistral": {"rope_theta": 100.0, "sliding_window": 6},
    "qwen2": {"rope_parameters": {"rope_theta": 100.0, **LINEAR}},
    "qwen3": {
        **{"head_dim": 8, "rope_parameters": {"rope_theta": 100.0, **LLAMA3}},
        **{"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    },
    "ministral": {
        **{"rope_theta": 100.0, "head_dim": 8, "sliding_window": 5},
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "ministral3": {
        **{"head_dim": 8, "sliding_window": 6},
        "rope_parameters": {"rope_theta": 100.0, **YARN, "llama_4_scaling_beta": 0.5},
    },
    "glm4": {
        **{"rope_theta": 100.0, "head_dim": 8, "pad_token_id": None, "eos_token_id": 1},
        **{"partial_rotary_factor": 0.5},
    },
    "granite": {
        **{"rope_theta": 100.0, "head_dim": 8, "attention_multiplier": 0.3},
        **{"embedding_multiplier": 6.0, "residual_multiplier": 0.4, "logits_scaling": 3.0},
    },
    "smollm3": {
        **{"rope_theta": 100.0, "head_dim": 8, "pad_token_id": None, "sliding_window": 5},
        **{"use_sliding_window": True, "no_rope_layer_interval": 2},
    },
    "phi3": {
        **{"rope_theta": 100.0, "head_dim": 8, "num_attention_heads": 2, "pad_token_id": None},
        **{"sliding_window": 6, "partial_rotary_factor": 0.5},
        "original_max_position_embeddings": 16,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [1.0, 2.0]},
    },
    "gemma2": {
        **{"rope_theta": 100.0, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 12},
        **{"attn_logit_softcapping": 0.8, "final_logit_softcapping": 3.0},
    },
    "gemma3_text": {
        **{"rope_theta": 100.0, "rope_local_base_freq": 10.0, "rope_scaling": LINEAR},
        **{"head_dim": 8, "sliding_window": 6, "sliding_window_pattern": 2},
        **{"query_pre_attn_scalar": 12},
    },
    "olmo2": {"rope_theta": 100.0},
    "olmo3": {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": YARN | {"truncate": True},
    },
    "llama-dynamic": {
        **{"rope_theta": 100.0, "head_dim": 8},
        "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
    },
    "llama-yarn": {"rope_theta": 100.0, "rope_scaling": YARN, "head_dim": 8},
    "qwen3-yarn": {"head_dim": 8, "rope_parameters": {"rope_theta": 100.0, **YARN}},
    "llama-longrope": {"rope_theta": 100.0, "rope_scaling": LONGROPE, "head_dim": 8},
    "mistral-longrope": {
        **{"sliding_window": None, "head_dim": 8},
        "rope_parameters": {"rope_theta": 100.0, **LONGROPE},
    },
}
VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 6, 8, 10**6, 0.0, 0.5, 1.0, 1.5, -0.5, 1e30, float("nan")),
    *("", "2", "silu", "true", [], [2], {}, {"a": 1}),
]
MORE_KEYS = (
    *("rope_theta", "rope_scaling", "original_max_position_embeddings", "partial_rotary_factor"),
    *("torch_dtype", "head_dim", "attention_bias", "mlp_bias", "layer_types", "sliding_window"),
    *(
        "use_sliding_window",
        "max_window_layers",
        "is_causal",
        "per_layer_config",
        "tokenizer_class",
    ),
    *("rope_local_base_freq", "sliding_window_pattern", "hidden_activation"),
    *("quantization_config", "text_config", "auto_map", "unheard_of"),
)
ROPE_KEYS = ("partial_rotary_factor", "llama_4_scaling_beta", "unheard_of")
KINDS = ["full_attention", "sliding_attention"]
SPECIAL: dict[str, list[Any]] = {
    "no_rope_layers": [[0, 1], [1, 0, 0], [0, 0], [1, 1], [True, False], [1.0, 0.0], [2, 1], [1]],
    "layer_types": [[a, b] for a in KINDS for b in KINDS] + [["full_attention"], ["x", "y"]],
    "hidden_act": ["swish", "gelu", "relu"],
    "hidden_activation": ["silu", "gelu", "relu"],
    "dtype": ["float16", "bfloat16", "garbage"],
    "torch_dtype": ["float16"],
    "problem_type": ["regression"],
    "rope_theta": [100, 100.0, 10_000],
    "original_max_position_embeddings": [16, 32, 16.0],
    "rope_scaling": [
        {"type": "linear", "factor": 2.0},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
        {"type": "linear", "rope_type": "default", "factor": 2.0},
        {"rope_type": "default"},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "dynamic"},
        YARN,
        {"rope_type": "yarn", "factor": 2.0},
        {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
        LONGROPE,
        {**LONGROPE, "factor": 2.0},
        {**LONGROPE, "short_factor": [1.0]},
        {**LONGROPE, "long_factor": [1.0, 2.0, None, 3.0]},
        {"rope_type": "proportional", "factor": 2.0},
        {"rope_type": "axial"},
        {"rope_type": ["linear"], "factor": 2.0},
        LLAMA3,
        {**LLAMA3, "rope_theta": 100.0},
        {"full_attention": LINEAR},
    ],
}
LISTS = ([1.0, 1.5, 2.0, 2.5], [1, 2, 3, 4], [1.0, 0.0, 1.0, 1.0], [1.0] * 3, [1.0, "x", 2.0, 3.0])
SPECIAL["short_factor"] = SPECIAL["long_factor"] = list(LISTS)
SPECIAL["rope_parameters"] = [*SPECIAL["rope_scaling"], {"rope_theta": 100.0}]


def _cases() -> list[tuple[str, str, Any]]:
    """(family, key, value): rope.X is the key X of the rope's object."""
    cases = []
    for family, switches in FAMILIES.items():
        if "-" not in family:
            config_class = type(AutoConfig.for_model(family))
            fields = [field.name for field in dataclasses.fields(config_class)]
            for key in dict.fromkeys([*BASE, *fields, *MORE_KEYS]):
                cases += [(family, key, value) for value in [*VALUES, *SPECIAL.get(key, [])]]
        else:
            for key in ("rope_theta", "original_max_position_embeddings", "head_dim"):
                cases += [(family, key, value) for value in [*VALUES, *SPECIAL.get(key, [])]]
        rope = switches.get("rope_parameters") or switches.get("rope_scaling")
        if isinstance(rope, dict):
            for key in dict.fromkeys([*LLAMA3, *rope, "type", "rope_theta", *ROPE_KEYS]):
                values = [*VALUES, *SPECIAL.get(key, [])]
                cases += [(family, f"rope.{key}", value) for value in values]
    return cases


def _changed(family: str, key: str, value: Any) -> dict[str, Any]:
    kind = family.partition("-")[0]
    config = copy.deepcopy({"model_type": kind, **BASE, **FAMILIES[family]})
    if key.startswith("rope."):
        name = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
        config[name][key.removeprefix("rope.")] = value
    else:
        config[key] = value
    return config


def _size(a: Architecture) -> int:
    width = a.head_dim * (a.num_attention_heads + a.num_key_value_heads) + a.intermediate_size
    return a.hidden_size * (2 * a.vocab_size + 3 * a.num_hidden_layers * width)


def _reference(config: dict[str, Any]) -> tuple[torch.nn.Module, torch.Tensor] | None:
    """transformers' model of a config with random weights, and its logits; None if it refuses."""
    torch.manual_seed(0)
    try:
        read = _read(config)
        model = AutoModelForCausalLM.from_config(
            read, dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                else:
                    parameter.normal_(0.0, 0.3)
            ids = torch.arange(S)[None] % min(BASE["vocab_size"], read.vocab_size)
            return model, model.eval()(input_ids=ids, use_cache=False, return_dict=True).logits
    except Exception:  # whatever a library makes of nonsense
        return None


def _read(config: dict[str, Any]) -> Any:
    """transformers 5 refuses heads that do not divide the hidden size, which 4.57 did not; it
    computes with them all the same."""
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if (
        isinstance(hidden, int)
        and isinstance(heads, int)
        and min(hidden, heads) > 0
        and config.get("head_dim")
        and hidden % heads
    ):
        read = AutoConfig.for_model(**{**copy.deepcopy(config), "num_attention_heads": 1})
        read.num_attention_heads = heads
        return read
    return AutoConfig.for_model(**copy.deepcopy(config))


def _rounding(config: dict[str, Any], logits: torch.Tensor) -> float:
    """The largest relative change of transformers' own logits when every weight moves by its last
    bit. No fp32 model is closer than that: measured 1.8e-4 at hidden_size=2, whose norms are over
    two numbers; all other cases are compared within 1e-5."""
    changes = []
    for seed in range(4):
        reference = _reference(config)
        assert reference is not None
        model, _ = reference
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                parameter.mul_(1 + signs * 2.0**-23)
            ids = torch.arange(S)[None] % min(BASE["vocab_size"], logits.shape[-1])
            moved = model.eval()(input_ids=ids, use_cache=False, return_dict=True).logits
        changes.append(((moved - logits).abs().max() / logits.abs().max()).item())
    return max(changes)


def _ours(architecture: Architecture, reference: torch.nn.Module) -> torch.Tensor:
    model = CausalLM(architecture)
    model.load_state_dict(dict(reference.named_parameters()))
    ids = torch.arange(S)[None] % min(BASE["vocab_size"], architecture.vocab_size)
    with torch.no_grad():
        return model.logits(ids, torch.arange(S)[None], torch.ones_like(ids))


def _fault(family: str, key: str, value: Any) -> str | None:
    """Return the fault in the treatment of this case, None if there is none."""
    config = _changed(family, key, value)
    try:
        architecture = architecture_from_hf(config)
    except CheckpointError as error:
        return None if key.removeprefix("rope.") in str(error) else f"not named: {error}"
    if _size(architecture) > LARGEST:
        return None
    shapes = {"model.embed_tokens.weight": (architecture.vocab_size, architecture.hidden_size)}
    if not architecture.tie_word_embeddings:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    try:
        exported = portable_config(config, shapes, torch.float32, 1).content
    except CheckpointError as error:
        return None if key in str(error) else f"not named at the export: {error}"
    for what, read in (("the source", config), ("the export", exported)):
        reference = _reference(read)
        if reference is None:
            if what == "the export":
                return "transformers refuses the export"
            continue
        model, logits = reference
        error = (_ours(architecture, model) - logits).abs().max() / logits.abs().max()
        if not error < 1e-5 and not error < _rounding(read, logits):
            return f"logits differ by {error:.1e} from those of {what}"
    return None


@pytest.fixture(autouse=True)
def quiet():
    """Without warnings on each case; on one thread, since the products are tiny."""
    before, threads = hf_logging.get_verbosity(), torch.get_num_threads()
    hf_logging.set_verbosity(logging.CRITICAL)
    torch.set_num_threads(1)
    yield
    hf_logging.set_verbosity(before)
    torch.set_num_threads(threads)


def _faults(cases: list[tuple[str, str, Any]]) -> list[str]:
    found = ((case, _fault(*case)) for case in cases)
    return [f"{family} {key}={value!r:.80}: {told}" for (family, key, value), told in found if told]


def test_the_bases_show_every_switch() -> None:
    """A change of a rope, a window or a bias must be seen in the logits at all."""
    for family, key, value in (
        ("llama", "rope_theta", 200.0),
        ("llama", "rope.factor", 8.0),
        ("llama", "rope.original_max_position_embeddings", 20),
        ("mistral", "sliding_window", 7),
        ("qwen2", "rope_parameters", {"rope_type": "linear", "factor": 3.0, "rope_theta": 100.0}),
        ("qwen3", "max_window_layers", 0),
        ("ministral3", "rope.llama_4_scaling_beta", 0.2),
        ("gemma2", "attn_logit_softcapping", 1.2),
        ("gemma2", "final_logit_softcapping", 2.0),
        ("llama-dynamic", "rope.factor", 8.0),
        *(("llama-yarn", f"rope.{key}", 2.0) for key in ("factor", "beta_fast", "beta_slow")),
        *(("llama-yarn", f"rope.{key}", 2.0) for key in ("mscale", "attention_factor")),
        ("llama-longrope", "rope.long_factor", [1.0, 2.0, 3.0, 4.0]),
        ("llama-longrope", "rope.attention_factor", 2.0),
    ):
        base = _reference(_changed(family, "unheard_of", 1))
        changed = _reference(_changed(family, key, value))
        assert base is not None and changed is not None
        assert (base[1] - changed[1]).abs().max() > 1e-3, (family, key)


def test_a_changed_key_gives_transformers_logits_or_is_named() -> None:
    """A few of each family; the slow test has all."""
    cases = _cases()
    assert not _faults(random.Random(16).sample(cases, 60))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_and_value(family: str) -> None:
    assert not _faults([case for case in _cases() if case[0] == family])
