"""A step with each variant of the loss, against a loop over examples in float64.

The loop runs transformers' model on one example at a time, without padding or packing, and has the
loss written out from its definition. Both backends are compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import reference
import torch
from torch import Tensor

from torchprime.config.sections.loss import Average
from torchprime.counter_bits import threefry, uniform
from torchprime.data.blocks.batch import Batch
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.data.tokens.completions import Example, averaged
from torchprime.losses.token_loss import TokenLoss

LR = 0.1
KINDS = {
    "cross-entropy": TokenLoss(),
    "smoothing": TokenLoss(label_smoothing=0.1),
    "z_loss": TokenLoss(z_loss=1e-2),
    "dft": TokenLoss(dft=True),
    "smoothing, z_loss": TokenLoss(label_smoothing=0.2, z_loss=1e-2),
    "dft, z_loss": TokenLoss(dft=True, z_loss=1e-2),
}
AVERAGES: tuple[Average, ...] = ("tokens", "examples")
# length, supervised from, and the row's weight; the last one is cut over two blocks.
SHAPES = [
    (4, 2, 1),
    (9, 5, 2),
    (7, 1, 0.5),
    (12, 9, 1),
    (5, 3, 1),
    (16, 4, 3),
    (11, 8, 1),
    (27, 6, 2),
]


class Plain:
    """An optimizer that takes the gradient times the learning rate away, so that it can be read."""

    weight_decay = 0.0

    def slots(self, parameter: Any) -> dict[str, Any]:
        return {}

    def update(
        self, parameter: Any, weight: Tensor, gradient: Tensor, state: Any, lr: Tensor, step: Any
    ) -> dict[str, Tensor]:
        return {"weight": weight - lr * gradient}


def examples() -> list[Example]:
    """Examples with rows of several weights; every third token has half of its row's weight."""
    rng = np.random.default_rng(0)
    found = []
    for number, (length, first, row_weight) in enumerate(SHAPES):
        ids = rng.integers(0, reference.V, length).astype(np.int32)
        weights = np.where(np.arange(length) % 3 == 0, 0.5, 1.0) * row_weight
        weights[:first] = 0
        rules = np.zeros(length, dtype=np.uint8)
        found.append(
            Example(str(number), ids, weights.astype(np.float32), rules, "", row_weight=row_weight)
        )
    return found


def batch_of(average: Average) -> Batch:
    """Pack them as a run does."""
    given = [averaged(e) if average == "examples" else e for e in examples()]
    data = PackedDataset.from_examples(given, block_size=reference.S, pad_id=0, packing="bfd_split")
    assert 4 < data.num_blocks <= reference.B and len(data.plan.examples) == len(SHAPES) + 1
    blocks = np.full(reference.B, -1, dtype=np.int64)
    blocks[: data.num_blocks] = np.arange(data.num_blocks)
    return data.batch(blocks)


def token_losses(logits: Tensor, targets: Tensor, kind: TokenLoss) -> tuple[Tensor, Tensor, Tensor]:
    """Return each token's loss, its cross-entropy and its z-loss."""
    log_z = logits.logsumexp(-1)
    of_vocabulary = log_z[:, None] - logits
    nll = of_vocabulary.gather(1, targets[:, None])[:, 0]
    main = nll * torch.exp(-nll).detach() if kind.dft else nll
    if kind.label_smoothing:
        spread = of_vocabulary.mean(-1)
        main = (1 - kind.label_smoothing) * nll + kind.label_smoothing * spread
    z_loss = kind.z_loss * log_z**2
    return main + z_loss, nll, z_loss


def loop_over_examples(model: Any, kind: TokenLoss, average: Average) -> Tensor:
    """Return [loss, cross-entropy, z-loss], each a mean over tokens or examples."""
    sums, divisor = torch.zeros(3, dtype=torch.float64), 0.0
    for example in examples():
        ids = torch.from_numpy(example.ids).long()
        pieces = ids.split(reference.S)  # a block is all that the model sees
        logits = torch.cat([model(input_ids=piece[None]).logits[0] for piece in pieces])
        weights = torch.from_numpy(example.weights[1:]).double()
        each = torch.stack(token_losses(logits[:-1], ids[1:], kind))
        total = (each * weights).sum(-1)
        if average == "examples":
            sums = sums + example.row_weight * total / weights.sum()
            divisor += example.row_weight
        else:
            sums, divisor = sums + total, divisor + weights.sum().item()
    return sums / divisor


def check_step(backend: Any, kind: TokenLoss, average: Average, accumulation: int) -> None:
    """Compare a step's numbers and gradients with the loop."""
    before = {name: weight.clone() for name, weight in backend.weights()}
    handle = backend.train_step(backend.put(batch_of(average), accumulation), LR)
    numbers = backend.read(handle)
    after = {name: weight.clone() for name, weight in backend.weights()}
    expected, gradients = expectation(before, kind, average)
    # In fp32, where the loss sums up to hundreds of values.
    torch.testing.assert_close(numbers.loss, expected[0], rtol=2e-6, atol=0)
    assert numbers.terms.keys() == set(kind.terms)
    for name, value in zip(("cross_entropy", "z_loss"), expected[1:], strict=True):
        if name in kind.terms:
            torch.testing.assert_close(numbers.terms[name], value, rtol=2e-6, atol=0)
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    torch.testing.assert_close(numbers.grad_norm, norm.item(), rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        found = (before[name].double() - after[name].double()) / LR
        largest = gradient.abs().max().item()
        assert largest > 1e-4, name
        torch.testing.assert_close(found, gradient, rtol=1e-4, atol=2e-4 * largest + 1e-6, msg=name)


def expectation(
    weights: Mapping[str, Tensor], kind: TokenLoss, average: Average
) -> tuple[list[float], dict[str, Tensor]]:
    """Return the loop's numbers, and its gradients by name."""
    _, model = reference.make_model(tied=False)
    model.load_state_dict(dict(weights))
    model.double()
    numbers = loop_over_examples(model, kind, average)
    numbers[0].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return numbers.tolist(), gradients


def check_held_out(backend: Any) -> None:
    """Held-out loss is the cross-entropy per token, whatever the variant of training."""
    weights = {name: weight.clone() for name, weight in backend.weights()}
    loss, weight = backend.read_eval([backend.eval_step(backend.put(batch_of("tokens"), 1))])
    expected, _ = expectation(weights, TokenLoss(), "tokens")
    torch.testing.assert_close(loss / weight, expected[0], rtol=2e-6, atol=0)


# Noise on embeddings ------------------------------------------------------------------------------

SEED, ALPHA, NOISY_STEPS = -123_456_789, 9.0, 2


def noise_of(batch: Batch, step: int, width: int) -> Tensor:
    """Return NEFTune's noise [B, S, width] from its definition, one segment after another."""
    found = torch.zeros(*batch.input_ids.shape, width)
    seed, done, stream = (torch.tensor(x, dtype=torch.int32) for x in (SEED, step, -1))
    key = threefry((seed, stream), (done, torch.zeros_like(done)))
    for b, segments in enumerate(batch.segment_ids):
        for segment in set(segments.tolist()) - {0}:
            (places,) = np.nonzero(segments == segment)
            numbers = torch.from_numpy(b * len(segments) + places).int()
            amount = ALPHA / math.sqrt(len(places) * width)
            found[b, places] = uniform(key, numbers, width) * amount
    return found


def check_noise(backend: Any, accumulation: int) -> None:
    """Compare two steps with noise, and the held-out loss without it, with plain PyTorch."""
    for step in range(NOISY_STEPS):
        before = {name: weight.clone() for name, weight in backend.weights()}
        batch = reference.make_batch(step)
        numbers = backend.read(backend.train_step(backend.put(batch, accumulation), LR))
        _, model = reference.make_model(tied=False)
        model.load_state_dict(before)
        clean = reference.loss_of(model, batch).item()
        noise = noise_of(batch, step, model.config.hidden_size)
        embedding = model.get_input_embeddings()
        embedding.register_forward_hook(lambda _, __, out, noise=noise: out + noise)
        loss = reference.loss_of(model, batch)
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert abs(loss.item() - clean) > 1e-3 * clean
        torch.testing.assert_close(numbers.loss, loss.item(), rtol=1e-5, atol=0)
        torch.testing.assert_close(numbers.grad_norm, norm.item(), rtol=1e-5, atol=0)
    check_held_out(backend)
