"""New rows of a vocabulary's matrices, held to transformers' `resize_token_embeddings`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from torchprime.models.new_rows import NewRows

ROWS, NEW, D = 3000, 4000, 12
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """Rows with a mean and a covariance that are not round."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=ROWS,
        hidden_size=D,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    for weight in (model.model.embed_tokens.weight, model.lm_head.weight):
        weight.data = torch.randn(ROWS, D) @ torch.randn(D, D) + torch.randn(D)
    return model


@pytest.fixture(scope="module")
def old(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if len(p) == ROWS}


@pytest.fixture(scope="module")
def theirs(model: LlamaForCausalLM, old: dict[str, Tensor]) -> dict[str, Tensor]:
    model.resize_token_embeddings(ROWS + NEW, mean_resizing=True)
    return {name: p.detach() for name, p in model.named_parameters() if name in old}


def covariance(rows: Tensor) -> Tensor:
    return torch.cov(rows.double().T, correction=0)


@pytest.mark.parametrize("name", [EMBEDDING, HEAD])
def test_mean_and_covariance_are_those_of_transformers(
    name: str, old: dict[str, Tensor], theirs: dict[str, Tensor]
) -> None:
    ours = NewRows("mean", ROWS, ROWS + NEW, seed=5).resized(name, old[name], torch.float64)
    assert ours.shape == theirs[name].shape
    assert torch.equal(ours[:ROWS].float(), old[name])
    mean, spread = old[name].double().mean(0), covariance(old[name]) * 1e-9
    # Theirs is rounded to float32, whose spacing is a part of the noise: it has a wider margin.
    for rows, close in ((ours[ROWS:], 0.1), (theirs[name][ROWS:], 0.2)):
        standard_error = spread.diagonal().sqrt() / NEW**0.5
        assert ((rows.mean(0) - mean).abs() < 5 * standard_error + 1e-7).all()
        assert (covariance(rows) - spread).norm() < close * spread.norm()
    assert len(ours[ROWS:].unique(dim=0)) == NEW


def test_zeros(old: dict[str, Tensor]) -> None:
    ours = NewRows("zeros", ROWS, ROWS + 9).resized(HEAD, old[HEAD], torch.float32)
    assert torch.equal(ours, torch.cat([old[HEAD], torch.zeros(9, D)]))


@pytest.mark.parametrize("method", ["mean", "zeros"])
def test_rows_of_no_trained_token_are_made_and_not_counted(
    method: str, old: dict[str, Tensor]
) -> None:
    unused = (7, 2048, ROWS - 1)
    spoiled = old[EMBEDDING].clone()
    spoiled[list(unused)] = 1e6
    rows = NewRows(method, ROWS, ROWS + 2, unused)  # type: ignore[arg-type]
    ours = rows.resized(EMBEDDING, spoiled, torch.float32)
    kept = torch.ones(ROWS + 2, dtype=torch.bool)
    kept[rows.made] = False
    assert rows.made == [*unused, ROWS, ROWS + 1] and kept.sum() == ROWS - 3
    assert torch.equal(ours[kept], spoiled[kept[:ROWS]])
    expected = spoiled[kept[:ROWS]].mean(0) if method == "mean" else torch.zeros(D)
    torch.testing.assert_close(ours[rows.made], expected.expand(5, D), rtol=0, atol=2e-3)
    assert not (unused and method == "mean") or (ours[7] != ours[2048]).any()


def test_a_row_is_a_function_of_seed_tensor_and_row(old: dict[str, Tensor]) -> None:
    def made(rows: int = ROWS + 700, seed: int = 1, name: str = HEAD) -> Tensor:
        return NewRows("mean", ROWS, rows, seed=seed).resized(name, old[HEAD], torch.float32)[ROWS:]

    first = made()
    assert torch.equal(first, made())
    assert torch.equal(first[:5], made(ROWS + 5))  # however many others there are
    assert not torch.equal(first, made(seed=2))
    assert not torch.equal(first, made(name=EMBEDDING))


def test_a_checkpoint_in_bf16_is_widened_exactly(old: dict[str, Tensor]) -> None:
    coarse = old[HEAD].bfloat16()
    rows = NewRows("mean", ROWS, ROWS + 3)
    wide, narrow = (rows.resized(HEAD, coarse, t) for t in (torch.float32, torch.bfloat16))
    assert torch.equal(wide[:ROWS], coarse.float()) and torch.equal(narrow[:ROWS], coarse)
    assert torch.equal(wide[ROWS:].bfloat16(), narrow[ROWS:])
    torch.testing.assert_close(wide[ROWS], coarse.float().mean(0), rtol=0, atol=2e-3)
