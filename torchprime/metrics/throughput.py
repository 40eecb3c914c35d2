"""Speed of a run: seconds per step, tokens per second, and model FLOPs utilization (MFU).

The loop starts a `Stopwatch`, counts every step in it and takes a lap when it logs; evaluation and
checkpoints happen inside `paused()`. A lap's slot tokens/s times the model's floating-point
operations per token, over the chips' bf16 peak, is the MFU.

Operations per token follow PaLM (Chowdhery et al. 2022, arXiv:2204.02311, appendix B): `6 N` for
the parameters, two in the forward pass and four in the backward, plus `12 H Q T` for the two
products of each layer's attention, with H heads of size Q and blocks of T tokens; a window shorter
than the block takes the place of T. N excludes a table that is only looked up. Rematerialized work
does not count. Attention counts as if every token saw its whole block or window: neither the causal
half nor the isolation of packed segments is subtracted. Published figures count the same way, so
they are comparable. MFU is over slot tokens, since the device computes padding like any other
token.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

# Dense bf16 operations per second of one device, as its runtime counts devices. The pattern is
# searched for in the device kind in lower case without blanks, dashes and underscores. It covers
# jax's and libtpu's names ("TPU v5 lite", "v5litepod-16", "TPU v6e", "TPU7x") and CUDA's ("NVIDIA
# H100 80GB HBM3"). PCIe and NVL boards are slower than SXM ones and are left unknown.
#
# Sources: Google's page of each TPU (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x) and
# NVIDIA's data sheets, halved where they count 2:4 sparsity. A v7x (Ironwood) chip has 2,307e12 and
# is two devices, one for each TensorCore. A B200 is that of an HGX board (36 PFLOPS sparse for
# eight); a GB200 is one of a superchip's two GPUs (10 PFLOPS sparse for both).
_PEAK_BF16_FLOPS: tuple[tuple[str, float], ...] = (
    (r"^(tpu)?v4(?!i|lite)", 275e12),
    (r"^(tpu)?v5(e|lite)", 197e12),
    (r"^(tpu)?v5(p|$)", 459e12),
    (r"^(tpu)?v6(e|lite)", 918e12),
    (r"^(tpu)?v?7(x|$)", 2307e12 / 2),
    (r"h100(?!pcie|nvl)", 989e12),
    (r"h200(?!nvl)", 989e12),
    (r"a100", 312e12),
    (r"gb200", 2500e12),
    (r"b200", 2250e12),
)


def peak_bf16_flops(device_kind: str) -> float | None:
    """Return the peak of one device; None if it is unknown (a CPU, a board without a figure
    here)."""
    kind = re.sub(r"[\s_-]", "", device_kind.lower())
    return next((peak for pattern, peak in _PEAK_BF16_FLOPS if re.search(pattern, kind)), None)


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """The sizes of a decoder on which its operations per token depend.

    `num_parameters` counts tied ones once; `trained_parameters` are those of them with a gradient.
    """

    num_parameters: int
    trained_parameters: int
    vocab_size: int
    hidden_size: int
    tied_embeddings: bool
    windows: tuple[int | None, ...]  # of each layer's attention; None: none
    num_heads: int
    head_size: int


def model_flops_per_token(model: ModelSizes, block_size: int) -> int:
    """Return the forward and backward operations per token of a block.

    Every parameter of a product takes 2 forward and 2 for the gradient of the product's input; a
    trained one takes 2 more for its own gradient. A tied embedding is also the output head's matrix
    and so is part of N; an untied one is only looked up and is subtracted.
    """
    looked_up_only = 0 if model.tied_embeddings else model.vocab_size * model.hidden_size
    seen = sum(min(window or block_size, block_size) for window in model.windows)
    attention = 12 * model.num_heads * model.head_size * seen
    multiplied = model.num_parameters - looked_up_only
    return 4 * multiplied + 2 * min(multiplied, model.trained_parameters) + attention


def mfu(
    *, slot_tokens_per_s: float, flops_per_token: float, device_kind: str, num_chips: int
) -> float | None:
    """Return the MFU in 0..1 of `num_chips` chips together; None for an unknown chip."""
    peak = peak_bf16_flops(device_kind)
    if peak is None:
        return None
    return slot_tokens_per_s * flops_per_token / (peak * num_chips)


def host_memory_bytes() -> int:
    """Return the peak resident memory of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


@dataclass(frozen=True)
class Lap:
    """Means over the steps since the last lap."""

    steps: int
    step_seconds: float
    supervised_tokens_per_s: float
    slot_tokens_per_s: float


class Stopwatch:
    """Time and tokens of the steps since the last lap; it starts when it is created.

    Take a lap only after the device has finished the counted steps (reading the loss waits for
    that): steps are dispatched ahead, and a clock read earlier measures only the dispatching.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.restart()

    def count(self, *, supervised_tokens: int, slot_tokens: int) -> None:
        """Count one more step, with its batch's tokens."""
        self._steps += 1
        self._supervised_tokens += supervised_tokens
        self._slot_tokens += slot_tokens

    def lap(self) -> Lap:
        """Return the means since the last lap, or since the start, and begin the next lap."""
        if self._steps == 0:
            raise ValueError("no step was counted since the last lap")
        seconds = self._clock() - self._started
        lap = Lap(
            steps=self._steps,
            step_seconds=seconds / self._steps,
            supervised_tokens_per_s=self._supervised_tokens / seconds,
            slot_tokens_per_s=self._slot_tokens / seconds,
        )
        self.restart()
        return lap

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time spent inside: evaluation, checkpoints, samples."""
        began = self._clock()
        try:
            yield
        finally:
            self._started += self._clock() - began

    def restart(self) -> None:
        """Reset the counts and begin the next lap."""
        self._steps = 0
        self._supervised_tokens = 0
        self._slot_tokens = 0
        self._started = self._clock()
