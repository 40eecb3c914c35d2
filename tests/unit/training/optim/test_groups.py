"""Parameter groups against torch's, and what they freeze."""

from __future__ import annotations

import pytest
import torch
from updates import LR, ours, same, small_model

from torchprime.adapters.apply import apply_adapter, saved, trainable
from torchprime.adapters.spec import AdapterSpec
from torchprime.errors import ConfigError
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM
from torchprime.training.optim.adamw import AdamW
from torchprime.training.optim.groups import Group, freeze_groups, group_of, grouped
from torchprime.training.optim.make import make_optimizer
from torchprime.training.optim.optimizer import Parameter

GROUPS = (
    Group("model.layers.*.self_attn.q_proj.weight", lr_factor=0.5, weight_decay=0.3),
    Group("model.layers.*.self_attn", lr_factor=2.0),
    Group("model.norm", weight_decay=0.2),
)


def model() -> CausalLM:
    shape = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 10}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    more = {"model_type": "llama", "max_position_embeddings": 32, "tie_word_embeddings": False}
    with torch.device("meta"):
        return CausalLM(architecture_from_hf({**shape, **heads, **more}))


def test_100_steps_are_those_of_torchs_groups() -> None:
    weights, gradients = small_model()
    params = {n: torch.nn.Parameter(w.clone()) for n, w in weights.items()}
    groups = []
    for name, p in params.items():
        lr, decay = LR, 0.0 if "norm" in name else 0.1
        if "q_proj" in name:
            lr, decay = LR * 0.5, 0.3
        elif "self_attn" in name:
            lr = LR * 2
        elif name == "model.norm.weight":
            decay = 0.2
        groups.append({"params": [p], "lr": lr, "weight_decay": decay})
    reference = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-6)
    for grads in gradients:
        for n, g in grads.items():
            params[n].grad = g
        reference.step()
    found = ours(grouped(AdamW((0.9, 0.95), 1e-6, 0.1), GROUPS), weights, gradients)
    same(found, {n: p.detach() for n, p in params.items()}, weights)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "lion", "sgd", "adamw_8bit"])
@pytest.mark.parametrize("shape", [(64, 64), (7,)], ids=str)
def test_layers_of_a_stack_have_their_own_settings(name: str, shape: tuple[int, ...]) -> None:
    """A rate for each layer, broadcast along the stack, is the layers' updates one by one."""
    groups = (Group("model.layers.0", 0.5), Group("model.layers.2", 3.0, weight_decay=0.3))
    optimizer = grouped(make_optimizer(name, weight_decay=0.1), groups)
    torch.manual_seed(0)
    names = tuple(f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3))
    weights, gradients = torch.randn(3, *shape), torch.randn(3, *shape)
    lr, step = torch.tensor(0.1), torch.tensor(1.0)

    def updated(
        names: tuple[str, ...], weight: torch.Tensor, gradient: torch.Tensor, stacked: bool
    ):
        info = Parameter(names, tuple(weight.shape), torch.float32, stacked)
        slots = optimizer.slots(info).items()
        state = {s: torch.zeros(slot.kept(weight.shape), dtype=slot.dtype) for s, slot in slots}
        return optimizer.update(info, weight, gradient, state, lr, step)["weight"]

    apart = [updated((n,), w, g, False) for n, w, g in zip(names, weights, gradients, strict=True)]
    torch.testing.assert_close(updated(names, weights, gradients, True), torch.stack(apart))


def test_the_first_group_decides_and_a_star_is_one_part() -> None:
    assert group_of(GROUPS, "model.layers.3.self_attn.q_proj.weight") is GROUPS[0]
    assert group_of(GROUPS, "model.layers.3.self_attn.k_proj.weight") is GROUPS[1]
    assert group_of(GROUPS, "model.norm.weight") is GROUPS[2]
    for name in ("model.layers.3.mlp.up_proj.weight", "model.normal.weight", "model"):
        assert group_of(GROUPS, name) is None
    optimizer = AdamW()
    assert grouped(optimizer, [Group("model.norm", frozen=True)]) is optimizer


def test_frozen_parameters_are_saved_but_not_trained() -> None:
    built = model()
    names = set(saved(built))
    assert names == set(trainable(built)) == {n for n, _ in built.named_parameters()}
    freeze_groups(
        built,
        [Group("model.layers.0.mlp.up_proj", lr_factor=2.0), Group("model.layers.0", frozen=True)],
    )
    assert set(saved(built)) == names
    left = {n for n in names if not n.startswith("model.layers.0.")}
    assert set(trainable(built)) == left | {"model.layers.0.mlp.up_proj.weight"}


def test_parts_of_an_adapter_are_frozen() -> None:
    built = model()
    apply_adapter(built, AdapterSpec(rank=2, alpha=2.0, targets=("q_proj",)))
    parts = set(saved(built))
    freeze_groups(built, [Group("model.layers.*.self_attn.q_proj.lora_A", frozen=True)])
    assert set(saved(built)) == parts
    assert {n.split(".")[-2] for n in trainable(built)} == {"lora_B"}


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (
            "model.layer.*.mlp",
            ["groups[0].pattern: given 'model.layer.*.", "The nearest: model.l"],
        ),
        ("model.layers.2", ["which covers no parameter", "model.layers.1"]),
        ("mlp", ["which covers no parameter"]),
    ],
)
def test_a_pattern_without_effect_is_refused(pattern: str, said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        freeze_groups(model(), [Group(pattern)])
    assert all(part in str(caught.value) for part in said), str(caught.value)


def test_groups_of_a_frozen_base_only_are_refused() -> None:
    built = model()
    apply_adapter(built, AdapterSpec(rank=2, alpha=2.0, targets=("q_proj",)))
    with pytest.raises(ConfigError, match="weights of the adapter's base only, expected trained"):
        freeze_groups(built, [Group("model.layers.*.mlp", lr_factor=2.0)])


def test_freezing_everything_is_refused() -> None:
    with pytest.raises(ConfigError, match="freeze all 21 parameters"):
        freeze_groups(model(), [Group("model", frozen=True), Group("lm_head", frozen=True)])
