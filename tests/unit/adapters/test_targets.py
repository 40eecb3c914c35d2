"""The choice of layers by name patterns, and the messages for wrong ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from torchprime.adapters.spec import AdapterSpec
from torchprime.adapters.targets import target_names, trained_modules
from torchprime.errors import ConfigError
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM

ONE = AdapterSpec(rank=1, alpha=1)


def chosen(model: CausalLM, *targets: str, layers: tuple[int, ...] | None = None) -> list[str]:
    return target_names(model, replace(ONE, targets=targets, layers=layers))


def test_all_linear_is_all_layers_without_the_output_projection(ours: CausalLM) -> None:
    names = chosen(ours, "all-linear")
    assert len(names) == 2 * 7 and all(name.startswith("model.layers.") for name in names)


def test_patterns(ours: CausalLM) -> None:
    attention = "model.layers.1.self_attn."
    assert chosen(ours, "q_proj", layers=(1,)) == [f"{attention}q_proj"]
    assert chosen(ours, "model.layers.*.mlp.up_proj") == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert chosen(ours, "v_proj", "q_proj", layers=(1,)) == [
        f"{attention}q_proj",
        f"{attention}v_proj",
    ]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (replace(ONE, targets=("q_pro",)), "'q_pro', which matches no linear layer.*q_proj"),
        (replace(ONE, targets=("proj",)), "'proj', which matches no linear layer"),
        (replace(ONE, targets=("q_proj", "norm")), "'norm', which matches no linear layer"),
        (replace(ONE, targets=("lm_head",)), "adapter.modules_to_train=.lm_head."),
        (replace(ONE, rank=65), "rank: given 65, expected at most 64.*q_proj.*64, 64"),
        (replace(ONE, rank=33), "rank: given 33, expected at most 32.*k_proj"),
        (replace(ONE, layers=(0, 2)), "layers: given 2, expected numbers from 0 to 1"),
    ],
)
def test_wrong_targets_are_refused(spec: AdapterSpec, message: str, ours: CausalLM) -> None:
    with pytest.raises(ConfigError, match=message):
        target_names(ours, spec)


def test_a_tied_output_projection_is_named_as_such(hf_config: LlamaConfig) -> None:
    tied = {**hf_config.to_dict(), "tie_word_embeddings": True}
    model = CausalLM(architecture_from_hf(tied))
    with pytest.raises(ConfigError, match="lm_head, but this model's output projection is tied"):
        chosen(model, "lm_head")


def test_modules_that_are_trained_whole(ours: CausalLM) -> None:
    assert trained_modules(ours, ["norm", "lm_head"]) == ["model.norm", "lm_head"]
    with pytest.raises(ConfigError, match=r"given 'embed_token', which is no module.*embed_tokens"):
        trained_modules(ours, ["embed_token"])
