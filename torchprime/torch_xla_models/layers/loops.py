"""Loops on the device, whose body is traced once.

torch_xla's scan makes a loop's computation and calls it. Its first input counts the rounds; here it
is also given as data, so that a loop can start later, and a call is repeated with other tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch_xla import _XLAC as XLAC  # pyright: ignore[reportPrivateImportUsage]
from torch_xla.experimental.scan import _scan_impl_flat

# (carry, x_i) -> (carry, y_i)
Body = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[list[Tensor], list[Tensor]]]


def device_loop(
    body: Body, carry: Sequence[Tensor], xs: Sequence[Tensor], *, reverse: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    """Loop on the device over dim 0 of `xs`: (carry, x_i) -> (carry, y_i); y is stacked.

    Device tensors that the body reads and that are no arguments (weights, say) become loop inputs.
    """
    return _scan_impl_flat(body, list(carry), list(xs), reverse=reverse)


def late_loop(
    body: Body, carry: Sequence[Tensor], xs: Sequence[Tensor], first: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Loop as `device_loop` does, from the index `first` on, an int64 scalar of data. The y_i
    before it are 0."""
    (carried, ys), call = _recorded(body, carry, xs)
    _, *outputs = call.run([first, *call.tensors[1:]])
    skipped = len(carry) + len(xs)
    return outputs[: len(carried)], outputs[skipped : skipped + len(ys)]


class _Call(NamedTuple):
    """A loop's call: its counter, carry, xs, the places of ys, then what its body reads besides."""

    name: str
    tensors: list[Tensor]
    computation: Any

    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """Call it with other tensors of the same shapes."""
        return XLAC._xla_user_computation(self.name, tensors, self.computation)


def _recorded(
    body: Body, carry: Sequence[Tensor], xs: Sequence[Tensor]
) -> tuple[tuple[list[Tensor], list[Tensor]], _Call]:
    """Return what `device_loop` returns, and its call."""
    run, calls = XLAC._xla_user_computation, []

    def record(*call: Any) -> Any:
        calls.append(call)
        return run(*call)

    XLAC._xla_user_computation = record
    try:
        found = device_loop(body, carry, xs)
    finally:
        XLAC._xla_user_computation = run
    name, tensors, computation = calls[-1]  # loops inside the body are recorded before it
    return found, _Call(name, list(tensors), computation)


class RecordedLoop:
    """A `device_loop` that is traced once and run again with other tensors of the same shapes.

    Tracing a deep model takes as long as running it for some tokens. Values that differ between
    runs must be in carry and xs; all others that the body reads are treated as constant.
    """

    def __init__(self, body: Body) -> None:
        self.body = body
        self.call: _Call | None = None
        self.ys: list[tuple[torch.Size, torch.dtype]] = []

    def run(
        self, carry: Sequence[Tensor], xs: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run the loop as `device_loop` does."""
        if self.call is None:
            found, call = _recorded(self.body, carry, xs)
            self.ys = [(y.shape, y.dtype) for y in found[1]]
            constants = call.tensors[1 + len(carry) + len(xs) + len(self.ys) :]
            self.call = call._replace(tensors=constants)
            return found
        # Made again, as the first time: stored ones would become data when something syncs all
        # tensors, and the next program would be another one.
        device = carry[0].device
        first = torch.tensor(0, device=device)
        ys = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype in self.ys]
        _, *outputs = self.call.run([first, *carry, *xs, *ys, *self.call.tensors])
        skipped = len(carry) + len(xs)
        return outputs[: len(carry)], outputs[skipped : skipped + len(ys)]
