"""The time that a process waits for its partners, and its exit when they do not come."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from torchprime.errors import ConfigError, RuntimeSetupError
from torchprime.torch_native.runtime import (
    TIMEOUT_SECONDS,
    TIMEOUT_VARIABLE,
    group,
    lost_partner,
    start_processes,
    stop_processes,
    timeout_seconds,
    transport_timeout,
    waiting,
    watched,
)

HANGING = """
import time
from datetime import timedelta
from torchprime.torch_native import runtime
runtime.GRACE = timedelta(0)

class Backend:
    @runtime.watched
    def train_step(self):
        time.sleep(SECONDS)

Backend().train_step()
print("went on")
"""


@pytest.mark.parametrize(("seconds", "code"), [("60", 2), ("0.1", 0)])
def test_a_call_that_hangs_ends_the_process_with_a_message(seconds: str, code: int) -> None:
    environment = {"RANK": "3", "WORLD_SIZE": "8", TIMEOUT_VARIABLE: "2"}
    done = subprocess.run(
        [sys.executable, "-c", HANGING.replace("SECONDS", seconds)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stderr
    if code:
        assert "error: rank 3 of 8" in done.stderr and "NCCL_P2P_DISABLE=1" in done.stderr
        assert "train_step took more than 2 s" in done.stderr and not done.stdout
    else:
        assert done.stdout == "went on\n" and not done.stderr


def test_waiting_leaves_no_timer_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.active_count()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with waiting("a test"):
        assert threading.active_count() == before + 1
    with pytest.raises(KeyError), waiting("a test that fails"):
        raise KeyError
    for timer in [t for t in threading.enumerate() if isinstance(t, threading.Timer)]:
        timer.join(5)
    assert threading.active_count() == before


def test_alone_nothing_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = threading.active_count()
    assert watched(lambda: threading.active_count())() == before


def test_the_timeout_is_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TIMEOUT_VARIABLE, raising=False)
    assert timeout_seconds() == TIMEOUT_SECONDS
    monkeypatch.setenv(TIMEOUT_VARIABLE, "90")
    assert timeout_seconds() == 90 and transport_timeout().total_seconds() >= 90
    for wrong in ("0", "-1", "nan", "inf", "ten"):
        monkeypatch.setenv(TIMEOUT_VARIABLE, wrong)
        with pytest.raises(ConfigError, match=f"{TIMEOUT_VARIABLE}: given '{wrong}', expected"):
            timeout_seconds()


def test_more_processes_than_gpus_is_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RuntimeSetupError, match="LOCAL_RANK=2.*2 GPUs.*--nproc_per_node=2"):
        start_processes()


def test_the_message_is_one_line_and_names_the_interface_between_hosts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for on_this_host, told in (("4", False), ("2", True)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", on_this_host)
        message = str(lost_partner(RuntimeError("gloo failed\n  at pair.cc\n")))
        assert ("GLOO_SOCKET_IFNAME=eth0 NCCL_SOCKET_IFNAME=eth0" in message) == told
        assert message.endswith("(RuntimeError: gloo failed at pair.cc)")


def test_only_transport_errors_become_the_message() -> None:
    with pytest.raises(type(lost_partner("")), match="rank 0 of 1.*RuntimeError: .*gloo"), group():
        raise RuntimeError("[third_party/gloo/pair.cc:538] Read error: Connection reset by peer")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), group():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_a_second_group_of_a_process_has_its_own_meshes() -> None:
    """DTensor keeps results of operations by meshes that are equal, whatever their group."""

    def double(groups_before: int) -> torch.Tensor:
        start_processes()
        try:
            for _ in range(groups_before):
                dist.new_group()
            mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("fsdp", "tensor"))
            sharded = distribute_tensor(torch.arange(4.0), mesh, [Shard(0), Shard(0)])
            twice = sharded + sharded
            assert isinstance(twice, DTensor)
            return twice.full_tensor()
        finally:
            stop_processes()

    for groups_before in (3, 0):
        assert double(groups_before).tolist() == [0.0, 2.0, 4.0, 6.0]
