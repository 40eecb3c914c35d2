"""New rows for the embedding and the output projection, computed from the existing rows.

    mean    the mean of the other rows plus a little noise, as in Hewitt ("Initializing New Word
            Embeddings for Pretrained Language Models", 2021) and transformers'
            `resize_token_embeddings`: normal with the other rows' mean and 1e-9 times their
            covariance. A new token is then about as likely as the others are on average.
    zeros   zeros

transformers draws from a factor of the covariance matrix, which costs [D, D] and its Cholesky
decomposition. A sum of the centred rows with independent normal factors, divided by the root of
their number, has the same distribution and costs one product of [new rows, rows] and [rows, D].

The factors come from a counter-based generator: they are a function of seed, tensor and row. Sums
are in float64, so that after rounding to the weights' dtype the order of summation has no effect.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from torchprime.models.decoder import hash_name

COVARIANCE_SCALE = 1e-9
PIECE = 1024  # old rows that are widened to float64 at once
MADE_AT_ONCE = 512  # new rows per pass over the old rows


@dataclass(frozen=True)
class NewRows:
    """The rows of a vocabulary's matrices that are initialized, and the method.

    Attributes:
        before: rows of the checkpoint's matrices.
        rows: rows of the model's, at least as many.
        unused: rows below `before` that belong to tokens which the checkpoint was not trained with.
    """

    method: Literal["mean", "zeros"]
    before: int
    rows: int
    unused: tuple[int, ...] = ()
    seed: int = 0

    @property
    def made(self) -> list[int]:
        """Every initialized row, in order."""
        return [*self.unused, *range(self.before, self.rows)]

    def resized(self, name: str, old: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the matrix [rows, D] in host memory, from the checkpoint's [before, D]; its other
        rows are unchanged.

        Args:
            name: the weight's Hugging Face name.
        """
        result = torch.empty((self.rows, old.shape[1]), dtype=dtype)
        result[: self.before] = old
        for start in range(0, len(self.made), MADE_AT_ONCE):
            made = self.made[start : start + MADE_AT_ONCE]
            result[made] = (
                torch.zeros(len(made), old.shape[1], dtype=dtype)
                if self.method == "zeros"
                else self._near_the_mean(name, old, made).to(dtype)
            )
        return result

    def _near_the_mean(self, name: str, old: Tensor, made: list[int]) -> Tensor:
        """Return float64 [made, D], normal with the mean and small covariance of the other rows."""
        key = [self.seed % 2**64, hash_name(name)]
        # A stream of its own for each row: no draw changes the counter's last word.
        draws = [
            np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, row])) for row in made
        ]
        others = torch.ones(self.before, dtype=torch.bool)
        others[list(self.unused)] = False
        count = int(others.sum())
        total = torch.zeros(old.shape[1], dtype=torch.float64)
        mixed = torch.zeros(len(made), old.shape[1], dtype=torch.float64)
        factor_sums = torch.zeros(len(made), 1, dtype=torch.float64)
        for start in range(0, self.before, PIECE):
            rows = old[start : start + PIECE][others[start : start + PIECE]].double()
            drawn = np.stack([draw.standard_normal(len(rows)) for draw in draws])
            factors = torch.from_numpy(drawn)
            total += rows.sum(0)
            mixed += factors @ rows
            factor_sums += factors.sum(1, keepdim=True)
        mean = total / count
        noise = (mixed - factor_sums * mean) * (COVARIANCE_SCALE / count) ** 0.5
        return mean + noise
