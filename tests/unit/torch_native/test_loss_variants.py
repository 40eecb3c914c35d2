"""The native backend's step with each variant of the loss, against a loop over examples."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forks import ForkServer

WORKER = Path(__file__).parent / "loss_worker.py"


@pytest.mark.parametrize(
    ("processes", "way"),
    [
        pytest.param(1, {"mesh": {}, "fused": True}, id="alone-fused"),
        pytest.param(2, {"mesh": {"fsdp": 2}, "accumulation": 2}, id="fsdp2-accumulate2"),
        pytest.param(2, {"mesh": {"tensor": 2}}, id="tensor2", marks=[pytest.mark.slow]),
        pytest.param(1, {"mesh": {}, "noise": True, "accumulation": 2}, id="alone-noise"),
        pytest.param(
            2, {"mesh": {"fsdp": 2}, "noise": True}, id="fsdp2-noise", marks=[pytest.mark.slow]
        ),
    ],
)
def test_steps_are_those_of_a_loop_over_examples(
    processes: int, way: dict, fork_server: ForkServer
) -> None:
    ranks = fork_server.group(processes, WORKER, json.dumps(way))
    for ended in [rank.end() for rank in ranks]:
        assert ended.code == 0, ended.printed[-3000:]
