"""A ten-line fine-tuning in transformers and torch.optim, to compare the XLA backend with.

Nothing of ours takes part but the batches: transformers' Llama under an explicit mask, plain
cross-entropy, torch's clipping and AdamW, on the CPU in eager mode.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from bitsandbytes.functional import create_dynamic_map
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Glm4Config,
    GraniteConfig,
    LlamaConfig,
    Ministral3Config,
    Olmo2Config,
    Phi3Config,
    Qwen3Config,
)
from transformers.optimization import Adafactor

from torchprime.data.blocks.batch import Batch
from torchprime.training.backend import StepOptions
from torchprime.training.regularization.near_base import Kl
from torchprime.training.regularization.penalty import AnchorSource, Penalty

# Adam divides by a root that is near 0 where gradients are tiny, and so amplifies their rounding:
# an epsilon above that noise lets final weights be compared closely.
V, B, S, LR, CLIP, DECAY, EPS, STEPS = 64, 8, 16, 3e-2, 0.5, 0.1, 1e-3, 4
STRENGTH = 0.05  # of a penalty
COEFFICIENT = 0.3  # of a divergence
FACTOR_EPS = 1e-6  # the same for Adafactor, which adds it to squares

CONFIG = LlamaConfig(
    vocab_size=V,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    rms_norm_eps=1e-5,
    attn_implementation="eager",  # pyright: ignore[reportCallIssue]
)


FAMILIES = {
    "llama": LlamaConfig,
    "qwen3": Qwen3Config,
    "phi3": Phi3Config,
    "granite": GraniteConfig,
    "glm4": Glm4Config,
    "gemma2": Gemma2Config,
    "olmo2": Olmo2Config,
    "ministral3": Ministral3Config,
}
SHAPE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "rms_norm_eps",
)  # fmt: skip


def make_batch(seed: int) -> Batch:
    """Two segments and padding in every block, the last block empty; weights other than 1."""
    rng = np.random.default_rng(seed)
    shape = (B, S)
    ids = rng.integers(0, V, shape).astype(np.int32)
    segments = np.zeros(shape, np.int32)
    positions = np.zeros(shape, np.int32)
    targets = np.full(shape, -100, np.int32)
    for b in range(B - 1):
        cut = int(rng.integers(3, 9))
        end = int(rng.integers(11, S + 1))
        for number, (start, stop) in enumerate([(0, cut), (cut, end)], start=1):
            segments[b, start:stop] = number
            positions[b, start:stop] = np.arange(stop - start)
            first = start + (stop - start) // 3
            targets[b, first : stop - 1] = ids[b, first + 1 : stop]
    ids[segments == 0] = 0
    weights = (rng.integers(1, 4, shape) * (targets >= 0)).astype(np.float32)
    # Two sources, as in a mixture: a token's source follows from its segment and block.
    sources = ((segments + np.arange(B)[:, None]) % 2).astype(np.int32)
    return Batch(ids, targets, weights, positions, segments, sources)


def make_model(tied: bool, family: str = "llama", heads: tuple[int, int] = (4, 2)):
    """transformers' model with weights large enough for every gradient to matter.

    Args:
        heads: of queries, and of keys and values; each of 4 numbers.
    """
    shape = {key: value for key, value in CONFIG.to_dict().items() if key in SHAPE}
    shape |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    shape |= {"hidden_size": 4 * heads[0], "head_dim": 4}
    shape |= {"pad_token_id": None, "eos_token_id": 2}  # Phi-3's own are beyond the vocabulary
    if family == "glm4":
        shape |= {"attention_bias": False}  # whose weight decay differs here
    if family == "granite":
        shape |= {"embedding_multiplier": 3.0, "attention_multiplier": 0.3}
        shape |= {"residual_multiplier": 0.4, "logits_scaling": 0.5}
    if family == "gemma2":
        shape |= {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.5}
        shape |= {"query_pre_attn_scalar": 6, "sliding_window": 5}
    if family == "ministral3":  # segments longer than the original context, so queries grow
        rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 3}
        shape |= {"rope_parameters": {**rope, "rope_theta": 1e4, "llama_4_scaling_beta": 0.4}}
    config = FAMILIES[family](**shape, tie_word_embeddings=tied)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0.0, 0.2)
    return config, model


def logits_of(model, batch: Batch) -> torch.Tensor:
    segments = torch.from_numpy(batch.segment_ids)
    same = segments[:, :, None] == segments[:, None, :]
    place = torch.arange(S)
    distance = place[:, None] - place

    def mask_of(allowed: torch.Tensor) -> torch.Tensor:
        return torch.where(same & allowed, 0.0, torch.finfo(torch.float32).min)[:, None]

    mask: Any = mask_of(distance >= 0)
    if "sliding_attention" in (getattr(model.config, "layer_types", None) or ()):
        near = (distance >= 0) & (distance < model.config.sliding_window)
        mask = {"full_attention": mask, "sliding_attention": mask_of(near)}
    return model(
        input_ids=torch.from_numpy(batch.input_ids).long(),
        position_ids=torch.from_numpy(batch.position_ids).long(),
        attention_mask=mask,
    ).logits


def loss_of(model, batch: Batch, source: int | None = None) -> torch.Tensor:
    """The mean loss per weight, of all tokens or of one source's."""
    logits = logits_of(model, batch)
    targets = torch.from_numpy(batch.targets).long().flatten()
    nll = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
    weights = torch.from_numpy(batch.loss_weights).flatten()
    if source is not None:
        weights = weights * torch.from_numpy(batch.source_ids == source).flatten()
    return (nll * weights).sum() / weights.sum()


def anchors(start: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """Weights of a base other than the start, so that the penalty is above 0 from the first step
    on, and a Fisher information that differs between elements."""
    generator = torch.Generator().manual_seed(1)
    base = {n: w + 0.1 * torch.randn(w.shape, generator=generator) for n, w in start.items()}
    return base, {n: torch.rand(w.shape, generator=generator) for n, w in start.items()}


def penalty_of(model, penalty: str, base: dict, fisher: dict) -> torch.Tensor:
    """strength x sum F (w - w0)^2, for autograd."""
    squares = {n: (p - base[n]).square() for n, p in model.named_parameters()}
    if penalty == "ewc":
        squares = {n: fisher[n] * each for n, each in squares.items()}
    return STRENGTH * torch.stack([each.sum() for each in squares.values()]).sum()


def divergence_of(logits: torch.Tensor, of_base: torch.Tensor, batch: Batch, on: str):
    """The mean of KL(base || model), by torch's own function, over full logits."""
    log_p, log_q = logits.log_softmax(-1), of_base.log_softmax(-1)
    each = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    weights = torch.from_numpy(batch.loss_weights)
    if on == "all":
        weights = torch.from_numpy(batch.segment_ids > 0).float()
    return (each * weights).sum() / weights.sum()


def term_of(model, base_model, batch: Batch, term: str, base: dict, fisher: dict) -> torch.Tensor:
    """The term that a step adds to its loss: ewc, l2_sp, kl-supervised or kl-all."""
    if not term.startswith("kl"):
        return penalty_of(model, term, base, fisher)
    with torch.no_grad():
        of_base = logits_of(base_model, batch)
    return COEFFICIENT * divergence_of(logits_of(model, batch), of_base, batch, term[3:])


class Lion(torch.optim.Optimizer):
    """The paper's ten lines."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                update = torch.sign(0.9 * m + 0.1 * p.grad)
                p.data -= group.get("lr", LR) * (update + group["weight_decay"] * p.data)
                m.copy_(0.99 * m + 0.01 * p.grad)


class RoundedAdamW(torch.optim.AdamW):
    """torch's AdamW whose moments of matrices are rounded to bitsandbytes' levels after each step,
    one scale for each row."""

    def step(self, closure: Any = None) -> Any:
        super().step()
        for p, state in self.state.items():
            for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                if p.dim() == 2:
                    state[name].copy_(rounded(state[name], create_dynamic_map(signed)))


def rounded(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Rows as they come back from 8 bits; a second moment above 0 stays above 0."""
    largest = values.abs().amax(1, keepdim=True)
    index = torch.bucketize(values / largest, (levels[1:] + levels[:-1]) / 2)
    if levels[0] == 0:
        index = torch.where(values > 0, index.clamp(min=1), index)
    return torch.where(largest > 0, levels[index] * largest, 0.0)


class Both(torch.optim.Optimizer):
    """torch's Muon for the matrices of layers, iterating in fp32, and torch's AdamW for the
    rest."""

    def __init__(self, groups: list[dict], matrices: Container[torch.Tensor]) -> None:
        def part(wanted: bool) -> list[dict]:
            chosen = [[p for p in g["params"] if (p in matrices) == wanted] for g in groups]
            return [{**g, "params": ps} for g, ps in zip(groups, chosen, strict=True) if ps]

        super().__init__(groups, {})
        self.muon = torch.optim.Muon(part(True), lr=LR, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(part(False), lr=LR, eps=EPS)

    def step(self, closure: Any = None) -> Any:
        bfloat16, torch.Tensor.bfloat16 = torch.Tensor.bfloat16, torch.Tensor.clone
        try:
            self.muon.step()
        finally:
            torch.Tensor.bfloat16 = bfloat16
        self.adamw.step()


def make_optimizer(name: str, groups: list[dict], model: nn.Module) -> torch.optim.Optimizer:
    """torch's optimizers, transformers' Adafactor with a given learning rate, or those above."""
    layers = {p for n, p in model.named_parameters() if "layers" in n and p.dim() == 2}
    given = {"relative_step": False, "scale_parameter": False, "warmup_init": False}
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw": lambda: torch.optim.AdamW(groups, lr=LR, eps=EPS),
        "adafactor": lambda: Adafactor(groups, lr=LR, eps=(FACTOR_EPS, 1e-3), **given),
        "sgd": lambda: torch.optim.SGD(groups, lr=LR, momentum=0.9, nesterov=True),
        "lion": lambda: Lion(groups, {}),
        "muon": lambda: Both(groups, layers),
        "adamw_8bit": lambda: RoundedAdamW(groups, lr=LR, eps=EPS),
    }
    return makers[name]()


def train(
    tied: bool = False,
    family: str = "llama",
    optimizer_name: str = "adamw",
    heads: tuple[int, int] = (4, 2),
    term: str | None = None,
) -> dict:
    """Losses, gradient norms and final weights of a few updates; `term` is one of `term_of`. In
    float64: in fp32 a norm of the fourth step is off by 6e-6 itself."""
    _, model = make_model(tied, family, heads)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.double()
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    plain = [p for n, p in model.named_parameters() if "norm" in n]
    groups = [{"params": decayed, "weight_decay": DECAY}, {"params": plain, "weight_decay": 0.0}]
    optimizer = make_optimizer(optimizer_name, groups, model)
    losses, norms, by_source, terms = [], [], [], []
    base, fisher = anchors(start)
    base_model = make_model(tied, family, heads)[1]
    base_model.load_state_dict(base, strict=False)
    base_model.double()
    for step in range(STEPS):
        with torch.no_grad():
            by_source.append([loss_of(model, make_batch(step), source).item() for source in (0, 1)])
        loss = loss_of(model, make_batch(step))
        if term is not None:
            held = term_of(model, base_model, make_batch(step), term, base, fisher)
            terms.append(held.item())
            loss = loss + held
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        losses.append(loss.item())
        optimizer.step()
    with torch.no_grad():
        held_out = loss_of(model, make_batch(99)).item()
    model.float()
    weights = {n: p.detach() for n, p in model.named_parameters()}
    return {
        "start": start,
        "losses": losses,
        "norms": norms,
        "by_source": by_source,
        "terms": terms,
        "weights": weights,
        "held_out": held_out,
        "model": model,
    }


def with_term(options: StepOptions, term: str | None) -> StepOptions:
    """The options of a step with one of the terms of `term_of`."""
    if term is None:
        return options
    if term.startswith("kl"):
        kl = Kl(COEFFICIENT, "all" if term == "kl-all" else "supervised")
        return replace(options, loss_terms=("kl",), kl=kl)
    return replace(options, step_terms=(term,), penalty=Penalty(term, STRENGTH))


def anchor_source(start: dict[str, torch.Tensor], term: str | None) -> AnchorSource | None:
    base, fisher = anchors(start)
    if term not in ("ewc", "l2_sp"):
        return None
    return AnchorSource(base.__getitem__, fisher.__getitem__ if term == "ewc" else None)


def in_groups(model: nn.Module) -> list[dict]:
    """A group for each trained weight, some with rates of their own. Others are frozen."""
    groups = []
    for name, p in model.named_parameters():
        lr, decay = LR, 0.0 if "norm" in name else DECAY
        if "embed_tokens" in name or "down_proj" in name:
            p.requires_grad_(False)
        elif "layers.0." in name:
            lr = 0.5 * LR
        elif "layers.1.self_attn" in name:
            decay = 0.4
        if p.requires_grad:
            groups.append({"params": [p], "lr": lr, "weight_decay": decay})
    return groups


def train_in_groups() -> dict:
    """Groups with rates of their own and frozen weights, in torch.optim.AdamW."""
    _, model = make_model(tied=False)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(in_groups(model), eps=EPS)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, make_batch(step)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return {"start": start, "weights": {n: p.detach() for n, p in model.named_parameters()}}
