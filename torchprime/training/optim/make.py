"""`name -> optimizer`, with the config's settings and each method's own defaults."""

from __future__ import annotations

from torchprime.training.optim.adafactor import Adafactor
from torchprime.training.optim.adamw import AdamW
from torchprime.training.optim.adamw_8bit import AdamW8bit
from torchprime.training.optim.lion import Lion
from torchprime.training.optim.muon import DEFAULTS, Muon, MuonSettings
from torchprime.training.optim.optimizer import Optimizer
from torchprime.training.optim.sgd import Sgd


def own_betas(name: str) -> tuple[float, float]:
    """Return a method's own betas."""
    return (0.9, 0.99) if name == "lion" else (0.9, 0.999)


def make_optimizer(
    name: str,
    *,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    weight_decay: float = 0.0,
    momentum: float | None = None,
    nesterov: bool | None = None,
    muon: MuonSettings = DEFAULTS,
) -> Optimizer:
    """Make an optimizer from the config's values; None takes the method's own default. Values that
    a method does not have are ignored."""
    betas = own_betas(name) if betas is None else betas
    if name == "adafactor":
        return Adafactor(1e-30 if eps is None else eps, weight_decay)
    if name == "lion":
        return Lion(betas, weight_decay)
    if name == "sgd":
        return Sgd(0.9 if momentum is None else momentum, bool(nesterov), weight_decay)
    kind = AdamW8bit if name == "adamw_8bit" else AdamW
    adamw = kind(betas, 1e-8 if eps is None else eps, weight_decay)
    if name != "muon":
        return adamw
    return Muon(
        adamw,
        muon,
        momentum=0.95 if momentum is None else momentum,
        nesterov=nesterov is not False,
        weight_decay=weight_decay,
    )
