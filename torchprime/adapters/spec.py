"""The description of an adapter, and the scale of its output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Scaling = Literal["lora", "rslora"]
Init = Literal["kaiming", "gaussian"]
BaseType = Literal["run", "int8", "nf4"]

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter of low rank: W x + scale B A x.

    Attributes:
        rank: r, the rows of A and the columns of B.
        alpha: the numerator of the scale.
        scaling: `lora` is alpha / r (arXiv:2106.09685), `rslora` alpha / sqrt(r)
            (arXiv:2312.03732).
        dropout: probability that an entry of the input of A is zeroed.
        targets: names of linear layers, with `*` for any characters; `all-linear` is all of the
            decoder's layers, without the output projection.
        layers: numbers of the decoder's layers that are adapted; None is all.
        modules_to_train: names of modules that are trained whole, such as `embed_tokens`.
        init: of A; B starts at 0, so the adapted model starts as its base.
        dora: also train the norm of each output's weights (arXiv:2402.09353).
        base_type: the storage of the frozen weights: as the run's, int8 or nf4.
    """

    rank: int
    alpha: float
    scaling: Scaling = "lora"
    dropout: float = 0.0
    targets: tuple[str, ...] = (ALL_LINEAR,)
    layers: tuple[int, ...] | None = None
    modules_to_train: tuple[str, ...] = ()
    init: Init = "kaiming"
    dora: bool = False
    base_type: BaseType = "run"

    @property
    def scale(self) -> float:
        """The factor of B A x."""
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)
