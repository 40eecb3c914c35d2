"""The tensors that a layer keeps for its backward, and those that are computed again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torchprime.config.checks import refuse

LAYER_INPUT = "layer_input"
# Tensors of a layer that can be kept, in the order in which a layer makes them: its input, the
# outputs of its products, and attention's result (with the log-sum-exp of a kernel). Norms, rotary
# positions and activation functions are always computed again.
NAMES = (LAYER_INPUT, "q", "k", "v", "core_out", "attn_out", "gate", "up")
POLICIES: dict[str, tuple[str, ...]] = {
    "none": NAMES,
    "minimal": NAMES,
    "attention": NAMES[:6],
    "full": NAMES[:1],
    "offload": (),
}


@dataclass(frozen=True)
class RematConfig:
    """Trades of compile time and memory against recomputation, applied from outside the model."""

    scan_layers: bool = False
    policy: Literal["none", "minimal", "attention", "full", "offload"] = "none"
    # Changes to the policy, by the names of tensors.
    save: list[str] = field(default_factory=list)
    offload: list[str] = field(default_factory=list)
    recompute: list[str] = field(default_factory=list)
    optimization_barrier: bool = False

    def __post_init__(self) -> None:
        lists = {"save": self.save, "offload": self.offload, "recompute": self.recompute}
        for key, names in lists.items():
            _check_names(f"remat.{key}", names)
        everywhere = [name for names in lists.values() for name in names]
        twice = sorted({name for name in everywhere if everywhere.count(name) > 1})
        if twice:
            refuse(
                "remat.save, remat.offload, remat.recompute",
                twice,
                "each name in one list, once",
                "Leave it where you want it.",
            )
        if LAYER_INPUT in self.recompute:
            refuse(
                "remat.recompute",
                LAYER_INPUT,
                f"names other than {LAYER_INPUT}: a layer's input would need all layers before it",
                "Use remat.offload to keep it in host memory.",
            )
        if self.policy == "none" and everywhere and not self.scan_layers:
            refuse(
                "remat.policy",
                "none",
                "a policy that keeps names, since with none unrolled layers keep everything",
                "Set remat.policy=minimal, which keeps all names, and change that.",
            )
        if self.offloaded and not self.scan_layers:
            by_policy = self.policy == "offload"
            refuse(
                "remat.policy" if by_policy else "remat.offload",
                "offload" if by_policy else self.offload,
                "nothing in host memory where layers are not in a loop, as with full or attention",
                "Set remat=scan_offload, or remat.scan_layers=true.",
            )

    @property
    def offloaded(self) -> tuple[str, ...]:
        """Names kept in host memory on a TPU, elsewhere on the device."""
        policy = {LAYER_INPUT} if self.policy == "offload" else set()
        away = (policy - {*self.save}) | {*self.offload}
        return tuple(name for name in NAMES if name in away)

    @property
    def saved(self) -> tuple[str, ...]:
        """Names kept on the device."""
        kept = {*POLICIES[self.policy], *self.save} - {*self.offloaded, *self.recompute}
        return tuple(name for name in NAMES if name in kept)

    @property
    def recomputed(self) -> tuple[str, ...]:
        """Names that the backward computes again."""
        return tuple(name for name in NAMES if name not in (*self.saved, *self.offloaded))

    @property
    def recomputes(self) -> bool:
        """True if a layer's backward computes a product or the attention again."""
        return bool(self.recomputed)

    @property
    def keeps_everything(self) -> bool:
        """True if autograd keeps what it wants, for unrolled layers."""
        return self.policy == "none"

    @property
    def selects(self) -> bool:
        """True if the native backend, which has no loop, keeps less than autograd wants."""
        return not self.keeps_everything or self.recomputes or bool(self.offloaded)

    @property
    def kept_outputs(self) -> tuple[str, ...]:
        """Names besides the layer's input that are kept, on the device or in host memory."""
        return tuple(name for name in NAMES[1:] if name not in self.recomputed)


def _check_names(key: str, names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        refuse(key, unknown[0], f"names of {', '.join(NAMES)}", f"Change {key}.")
