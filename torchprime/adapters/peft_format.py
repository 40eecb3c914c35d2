"""PEFT's folder format: adapter_config.json and the tensors of adapter_model.safetensors.

Written for `peft` and for vLLM's `--enable-lora`; read from any tool that writes the same. What a
config asks for and this project doesn't have is refused by name, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from torchprime.adapters.spec import ALL_LINEAR, AdapterSpec
from torchprime.adapters.targets import LAYER_NUMBER
from torchprime.errors import CheckpointError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Set: a tied output projection follows a trained embedding. Not set: it stays the base's.
TYING = "ensure_weight_tying"
EMBEDDING = "embed_tokens"
LORA = ".lora_"

# Settings that are read.
_READ = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules"),
    *("layers_to_transform", "modules_to_save", "init_lora_weights", TYING),
}
# Settings that change what an adapter computes, with the value at which they change nothing.
_PLAIN: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "bias": "none",
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "kasa_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "monteclora_config": None,
    "rank_pattern": {},
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
# Settings that say nothing about what a finished adapter computes.
_IDLE = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),
    *("task_type", "layers_pattern", "megatron_config", "megatron_core", "qalora_group_size"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
}
KNOWN = frozenset({*_READ, *_PLAIN, *_IDLE})
# Kinds of initialization that leave the base's weights as they are.
_INITS = (True, False, "gaussian", "kaiming")


def config_of(
    spec: AdapterSpec,
    *,
    base: str,
    targets: Sequence[str],
    whole: Sequence[str],
    tied: bool = False,
    full_names: bool = False,
) -> dict[str, Any]:
    """Return the contents of adapter_config.json.

    Args:
        base: name or folder of the base model.
        targets: the full names of the adapted layers.
        whole: the full names of the modules that are trained whole: PEFT also takes the end of a
            name, and `norm` would be `input_layernorm` too.
        tied: the output projection is the embedding.
        full_names: target_modules has full names, since other parts of the base have layers with
            the same last names.
    """
    names, layers = (list(targets), None) if full_names else _selection(spec, targets)
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": spec.rank,
        "lora_alpha": int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        "lora_dropout": spec.dropout,
        "use_rslora": spec.scaling == "rslora",
        "use_dora": spec.dora,
        "init_lora_weights": "gaussian" if spec.init == "gaussian" else True,
        "target_modules": names,
        "layers_to_transform": layers,
        "modules_to_save": list(whole) or None,
        "bias": "none",
        "fan_in_fan_out": False,
    }
    if ties_head(whole, tied):
        config[TYING] = True
    return config


def ties_head(whole: Sequence[str], tied: bool) -> bool:
    """Return True if the output projection has to follow a trained embedding.

    Args:
        whole: the names of the modules that are trained whole.
        tied: the output projection is the embedding.
    """
    return tied and any(name.rpartition(".")[2] == EMBEDDING for name in whole)


def _selection(spec: AdapterSpec, targets: Sequence[str]) -> tuple[list[str], list[int] | None]:
    """Return target_modules and layers_to_transform, which select these layers and no other.

    Last parts of names say it where they can, as most tools write it; else full names.
    """
    last = sorted({name.rpartition(".")[2] for name in targets})
    if all(pattern == ALL_LINEAR or pattern in last for pattern in spec.targets):
        return last, None if spec.layers is None else list(spec.layers)
    return _product(targets)


def _product(targets: Sequence[str]) -> tuple[list[str], list[int] | None]:
    """Return the last parts of names and the layers' numbers if these name the same layers; else
    the full names."""
    last = sorted({name.rpartition(".")[2] for name in targets})
    numbers = sorted({int(m[1]) for name in targets if (m := LAYER_NUMBER.search(name))})
    if len(targets) == len(last) * len(numbers):
        return last, numbers
    return list(targets), None


def by_tensors(config: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, Any]:
    """Return a config that names the layers that the tensors are of.

    PEFT takes a regular expression, too, and the ends of names in the whole base. The file holds
    exactly the tensors of the layers that were chosen.

    Args:
        names: of the tensors in the adapted model.
    """
    adapted = dict.fromkeys(name.partition(LORA)[0] for name in names if LORA in name)
    whole = dict.fromkeys(name.rpartition(".")[0] for name in names if LORA not in name)
    if not adapted:
        return config
    targets, layers = _product([*adapted])
    return {
        **config,
        "target_modules": targets,
        "layers_to_transform": layers,
        "modules_to_save": [*whole] or None,
        "exclude_modules": None,
    }


def spec_of(config: Mapping[str, Any], where: str) -> AdapterSpec:
    """Return the description of an adapter from its config.

    Args:
        where: the folder, for messages.

    Raises:
        CheckpointError: another method than LoRA or DoRA, a wrong value, or a setting that this
            project doesn't have.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{where}: {CONFIG_NAME}: peft_type: given {kind!r}, expected 'LORA' (LoRA or DoRA); "
            "other methods of PEFT are not supported. Merge it into its base with PEFT "
            "(merge_and_unload) and name that folder as model.pretrained_model."
        )
    for key, given in config.items():
        plain = _PLAIN.get(key)
        if key in _READ or key in _IDLE or given == plain or not given:
            continue
        raise CheckpointError(
            f"{where}: {CONFIG_NAME}: {key}: given {given!r}, expected {plain!r}: this setting is "
            "not supported. Merge the adapter into its base with PEFT (merge_and_unload) and name "
            "that folder as model.pretrained_model."
        )
    init = config.get("init_lora_weights", True)
    if init not in _INITS:
        raise CheckpointError(
            f"{where}: {CONFIG_NAME}: init_lora_weights: given {init!r}, which changes the base's "
            "weights when the adapter is made. Expected true, false or 'gaussian': convert it with "
            "PEFT (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    return AdapterSpec(
        rank=_rank(config, where),
        alpha=_number(config, "lora_alpha", where, math.inf, "a number from 0"),
        scaling="rslora" if _flag(config, "use_rslora", where) else "lora",
        dropout=_number(config, "lora_dropout", where, 1.0, "a number from 0 to below 1"),
        targets=_names(config, "target_modules", where),
        layers=_layers(config, where),
        # PEFT takes every module whose name ends so.
        modules_to_train=tuple(f"*{n}" for n in _names(config, "modules_to_save", where, ())),
        init="gaussian" if init == "gaussian" else "kaiming",
        dora=_flag(config, "use_dora", where),
    )


def _wrong(where: str, key: str, given: Any, expected: str) -> CheckpointError:
    return CheckpointError(f"{where}: {CONFIG_NAME}: {key}: given {given!r}, expected {expected}.")


def _rank(config: Mapping[str, Any], where: str) -> int:
    given = config.get("r")
    if type(given) is not int or given < 1:
        raise _wrong(where, "r", given, "a whole number above 0")
    return given


def _number(config: Mapping[str, Any], key: str, where: str, most: float, expected: str) -> float:
    given = config.get(key, 0.0)
    if type(given) not in (int, float) or not 0 <= given < most:
        raise _wrong(where, key, given, expected)
    return float(given)


def _flag(config: Mapping[str, Any], key: str, where: str) -> bool:
    given = config.get(key) or False
    if not isinstance(given, bool):
        raise _wrong(where, key, given, "true or false")
    return given


def _names(
    config: Mapping[str, Any], key: str, where: str, default: tuple[str, ...] | None = None
) -> tuple[str, ...]:
    given = config.get(key)
    if given is None and default is not None:
        return default
    if given == "all-linear":
        return (given,)
    if not isinstance(given, list) or not all(isinstance(name, str) and name for name in given):
        raise _wrong(where, key, given, "a list of names")
    return tuple(given)


def _layers(config: Mapping[str, Any], where: str) -> tuple[int, ...] | None:
    given = config.get("layers_to_transform")
    if given is None:
        return None
    numbers = [given] if isinstance(given, int) else given
    if not isinstance(numbers, list) or not all(type(n) is int and n >= 0 for n in numbers):
        raise _wrong(where, "layers_to_transform", given, "a list of layer numbers")
    return tuple(numbers)


def file_name(name: str) -> str:
    """Return a tensor's name in PEFT's file, from its name in the adapted model."""
    return f"{PREFIX}{name}"


def model_tensors(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Return the tensors of a PEFT file by their names in the adapted model.

    Raises:
        CheckpointError: a name without PEFT's prefix.
    """
    wrong = [name for name in tensors if not name.startswith(PREFIX)]
    if wrong:
        raise CheckpointError(
            f"{where}: {WEIGHTS_NAME}: tensor {wrong[0]!r}: expected names that begin with "
            f"{PREFIX!r}, as PEFT writes them."
        )
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
