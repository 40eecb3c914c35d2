"""100 steps of ours on the gradients of a small model, to compare with a published optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from torchprime.training.optim.optimizer import Optimizer, Parameter

STEPS, LR = 100, 3e-3
Tensors = dict[str, Tensor]

# A row of 256 values is one block of 8-bit state.
CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=256,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=1,
)


@cache
def small_model() -> tuple[Tensors, list[Tensors]]:
    """The first weights of a Llama, and its gradients at 100 steps of plain descent."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients = []
    for _ in range(STEPS):
        ids = torch.randint(0, CONFIG.vocab_size, (2, 8))
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p -= 0.1 * p.grad
        model.zero_grad(set_to_none=True)
    return weights, gradients


def matrices(tensors: Tensors) -> list[str]:
    """The names of the layers' matrices."""
    return [n for n, t in tensors.items() if t.dim() == 2 and n.startswith("model.layers.")]


def ours(
    optimizer: Optimizer,
    weights: Tensors,
    gradients: Sequence[Tensors],
    lr: float = LR,
    *,
    stacked: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Tensors:
    """Apply the update rule as the step does, in plain Python, and return the weights."""
    infos = {n: Parameter((n,), tuple(w.shape), dtype, stacked) for n, w in weights.items()}
    state = {
        n: {s: torch.zeros(slot.kept(i.shape), dtype=slot.dtype) for s, slot in found.items()}
        for n, i in infos.items()
        if (found := optimizer.slots(i)) is not None
    }
    weights = {n: w.clone() for n, w in weights.items()}
    for step, grads in enumerate(gradients, start=1):
        number = torch.tensor(float(step))
        for n, g in grads.items():
            new = optimizer.update(infos[n], weights[n], g, state[n], torch.tensor(lr), number)
            weights[n] = new.pop("weight")
            assert new.keys() == state[n].keys()
            assert all(new[s].dtype == state[n][s].dtype for s in new)
            state[n] = new
    return weights


def theirs(
    make: Callable[[list[dict]], torch.optim.Optimizer],
    weights: Tensors,
    gradients: Sequence[Tensors],
    decay: float = 0.1,
) -> Tensors:
    """The weights after a torch optimizer's steps, which is made from two groups: those with
    weight decay and those without."""
    params = {n: torch.nn.Parameter(w.clone()) for n, w in weights.items()}
    groups = [
        {"params": [p for n, p in params.items() if ("norm" in n) != d], "weight_decay": decay * d}
        for d in (True, False)
    ]
    optimizer = make([group for group in groups if group["params"]])
    for grads in gradients:
        for n, g in grads.items():
            params[n].grad = g.clone()
        optimizer.step()
    return {n: p.detach() for n, p in params.items()}


def same(found: Tensors, expected: Tensors, start: Tensors, relative: float = 1e-5) -> None:
    """Weights are equal within a part of the way that they moved, and one unit in the last place:
    a processor with other vector instructions rounds the last bit of a sum otherwise."""
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        moved = (weight - start[name]).abs().max()
        assert moved > 0, name
        error = (found[name] - weight).abs().max()
        last = torch.finfo(weight.dtype).eps * weight.abs().max().clamp(min=1)
        assert error <= relative * moved + last, f"{name}: {error:.1e} of {moved:.1e}"
