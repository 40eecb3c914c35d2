"""Tiny bases, and adapters of them that PEFT itself made, with its logits and merged weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from in_peft import lora_config
from tiny_llama import SHAPE
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Glm4Config,
    LlamaConfig,
    Phi3Config,
    PretrainedConfig,
)

from torchprime.adapters.spec import AdapterSpec

SPECS = {
    "lora": AdapterSpec(rank=4, alpha=8),
    "rslora": AdapterSpec(rank=4, alpha=8, scaling="rslora", targets=("q_proj", "down_proj")),
    "dora": AdapterSpec(rank=4, alpha=8, dora=True),
    "one layer": AdapterSpec(rank=4, alpha=16, layers=(1,)),
    "whole modules": AdapterSpec(
        rank=2, alpha=3, targets=("v_proj",), modules_to_train=("embed_tokens", "lm_head", "*.norm")
    ),
    "tied embedding": AdapterSpec(
        rank=2, alpha=4, targets=("v_proj",), modules_to_train=("embed_tokens",)
    ),
    "fused": AdapterSpec(rank=4, alpha=8, targets=("qkv_proj", "o_proj", "gate_up_proj")),
    "fused dora": AdapterSpec(rank=4, alpha=8, targets=("q_proj", "gate_up_proj"), dora=True),
}
TIED = {"tied embedding"}
# Bases with fused projections.
FUSED: dict[str, Callable[..., PretrainedConfig]] = {"fused": Phi3Config, "fused dora": Glm4Config}


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter that PEFT made and saved."""

    spec: AdapterSpec
    base: Path
    folder: Path
    tensors: dict[str, Tensor]  # by PEFT's names
    logits: Tensor  # of `ids`
    merged: dict[str, Tensor]  # by the plain model's names


@pytest.fixture(scope="session")
def ids() -> Tensor:
    return torch.randint(0, 320, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def make_base(
    tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Makes a random base with a tokenizer, once for each choice; sizes that NF4 can store."""

    @cache
    def make(
        tied: bool = False,
        seed: int = 0,
        hidden: int = 64,
        family: Callable[..., PretrainedConfig] = LlamaConfig,
    ) -> Path:
        config = family(
            vocab_size=320,
            **{**SHAPE, "hidden_size": hidden, "intermediate_size": 128},
            head_dim=hidden // SHAPE["num_attention_heads"],
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=None,
        )
        torch.manual_seed(seed)
        model: Any = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        folder = tmp_path_factory.mktemp("base")
        model.save_pretrained(folder)
        for file in tokenizer_folder.iterdir():
            shutil.copy(file, folder)
        return folder

    return make


@pytest.fixture(scope="session")
def by_peft(
    make_base: Callable[..., Path], ids: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], PeftAdapter]:
    """Makes the adapter of a name in SPECS, as if it had been trained."""

    @cache
    def make(name: str) -> PeftAdapter:
        spec, tied = SPECS[name], name in TIED
        base = make_base(tied, family=FUSED.get(name, LlamaConfig))
        plain = AutoModelForCausalLM.from_pretrained(base)
        config = lora_config(spec, task_type="CAUSAL_LM", ensure_weight_tying=tied)
        model = peft.get_peft_model(plain, config).eval()
        generator = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.1 * noise
        folder = tmp_path_factory.mktemp("peft")
        model.save_pretrained(str(folder))
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        tensors = {n: t.clone() for n, t in peft.get_peft_model_state_dict(model).items()}
        merged = dict(model.merge_and_unload().state_dict())
        return PeftAdapter(spec, base, folder, tensors, logits, merged)

    return make


@pytest.fixture
def changed_folder(by_peft: Callable[[str], PeftAdapter], tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of an adapter's folder with changes to its config."""

    def make(name: str = "lora", **changes: Any) -> Path:
        folder = Path(shutil.copytree(by_peft(name).folder, tmp_path / "adapter"))
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
        return folder

    return make


@pytest.fixture(params=SPECS)
def each(request: pytest.FixtureRequest, by_peft: Callable[[str], PeftAdapter]) -> PeftAdapter:
    return by_peft(request.param)
