"""The devices of the native backend: the one that a config gets, and messages without it."""

from __future__ import annotations

import os

import pytest
import torch

from torchprime.config.compose import compose_config
from torchprime.config.schema import TrainConfig
from torchprime.errors import RuntimeSetupError
from torchprime.torch_native import train


def config(device: str) -> TrainConfig:
    return compose_config(["--config-name", "quickstart", f"device={device}"])


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict(os.environ))


@pytest.mark.parametrize("device", ["tpu", "tpu_on_cpu"])
def test_a_device_of_torchtpu_without_it_is_one_message(device: str) -> None:
    with pytest.raises(RuntimeSetupError, match=r"torch-tpu: .*expected 0\.2\.x.*setup-torchtpu"):
        train.prepare_environment(config(device))


def test_a_tpu_without_chips_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "check_environment", lambda: None)
    with pytest.raises(RuntimeSetupError, match="device: given tpu on a host without TPU chips"):
        train.prepare_environment(config("tpu"))


def test_virtual_devices_get_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "check_environment", lambda: None)
    os.environ["XLA_FLAGS"] = "--xla_dump_to=/x"
    train.prepare_environment(config("tpu_on_cpu"))
    flags = os.environ["XLA_FLAGS"].split()
    assert flags == ["--xla_dump_to=/x", "--xla_force_host_platform_device_count=4"]
    assert os.environ["TPU_SKIP_MDS_QUERY"] == "1"


def test_a_gpu_that_is_not_there_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeSetupError, match="device: given cuda, but torch finds no GPU"):
        train.make_backend(config("cuda"))


def test_cpu_hides_the_gpus() -> None:
    train.prepare_environment(config("cpu"))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(("chips", "only", "device"), [(8, True, "tpu"), (8, False, "auto")])
def test_auto_is_a_tpu_where_only_torchtpu_is(monkeypatch, chips, only, device) -> None:
    monkeypatch.setattr(train, "tpu_chips", lambda: ["/dev/accel0"] * chips)
    monkeypatch.setattr(train, "only_torchtpu", lambda: only)
    assert train.device_of(config("auto")) == device
    assert train.device_of(config("cpu")) == "cpu"
