"""A record as a run makes it; tests replace what they are about."""

from __future__ import annotations

import pytest

from torchprime.metrics.record import StepRecord


@pytest.fixture(scope="session")
def step_record() -> StepRecord:
    return StepRecord(
        step=10,
        epoch=0.25,
        loss=1.2345,
        grad_norm=0.98,
        lr=1e-4,
        supervised_tokens=600,
        real_tokens=900,
        slot_tokens=1024,
        batch_hash="0123456789abcdef",
        step_seconds=1.0,
        supervised_tokens_per_s=512.4,
        slot_tokens_per_s=1024.0,
        mfu=None,
        device_memory_bytes=None,
        host_memory_bytes=1 << 30,
        compiles=None,
    )
