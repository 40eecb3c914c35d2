"""The processes of device=tpu: messages, variables and the command that starts them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from torchprime.errors import ConfigError, RuntimeSetupError
from torchprime.torch_native.chips.launch import (
    ADDRESSES,
    TOPOLOGY,
    check_alone,
    check_process,
    start_all,
    starts_others,
)

HOSTS = ",".join(f"host:{8070 + chip}" for chip in range(8))
EIGHT = {"WORLD_SIZE": "8", TOPOLOGY: "2,4,1", ADDRESSES: HOSTS}
PRINTED = """TORCH_TPU_TOPOLOGY="2,4,1"
TORCH_TPU_SLICEBUILDER_ADDRESSES="localhost:1,localhost:2"
TORCH_TPU_XPROF_SESSION_ID="7"
WORLD_SIZE=8
NODE_RANK="0"
"""


@pytest.mark.parametrize(
    ("count", "chips", "environment", "kind", "told"),
    [
        (1, 0, {}, RuntimeSetupError, "device: given tpu on a host without TPU chips.*tpu_on_cpu"),
        (4, 8, EIGHT, ConfigError, "given 4 chips, but there are 8 processes.*fsdp=8"),
        (8, 4, {"WORLD_SIZE": "8"}, RuntimeSetupError, f"{TOPOLOGY}: it is not set.*-m torch.tpu"),
        (8, 4, {**EIGHT, ADDRESSES: ""}, RuntimeSetupError, f"{ADDRESSES}: it is not set"),
        (8, 4, {**EIGHT, ADDRESSES: "a,b"}, RuntimeSetupError, "given 2 addresses, expected 8"),
    ],
)
def test_what_does_not_fit_is_one_message(count, chips, environment, kind, told) -> None:
    with pytest.raises(kind, match=told):
        check_process(count, chips, environment)


@pytest.mark.parametrize(
    ("count", "chips", "environment"), [(1, 1, {}), (8, 8, EIGHT), (8, 8, {}), (8, 4, EIGHT)]
)
def test_what_fits_passes(count, chips, environment) -> None:
    check_process(count, chips, environment)


def test_virtual_devices_are_of_one_process() -> None:
    check_alone({})
    check_alone({"WORLD_SIZE": "1"})
    with pytest.raises(ConfigError, match="given tpu_on_cpu in one of 8 processes.*torchrun"):
        check_alone(EIGHT)


class Shell:
    """Answers the launcher, and keeps the other commands and their variables."""

    def __init__(self, code: int = 0) -> None:
        self.code, self.commands = code, []

    def __call__(self, command, **more) -> subprocess.CompletedProcess[str]:
        if command[1:] == ["-m", "torch.tpu.distributed"]:
            return subprocess.CompletedProcess(command, self.code, PRINTED, "no\nno TPU devices")
        self.commands.append((command, more["env"]))
        return subprocess.CompletedProcess(command, 3)


@pytest.mark.parametrize(
    ("words", "module"),
    [
        (["/bin/torchprime", "train", "seed=7"], "torchprime.cli.main"),
        (["/x/torchprime/torch_native/train.py", "seed=7"], "torchprime.torch_native.train"),
    ],
)
def test_the_command_starts_itself_once_per_chip(words: list[str], module: str) -> None:
    assert starts_others(8, {}) and not starts_others(1, {}) and not starts_others(8, EIGHT)
    shell = Shell()
    assert start_all(8, words, shell) == 3
    ((command, variables),) = shell.commands
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert "--nproc_per_node=8" in command
    assert command[-len(words) - 1 :] == ["-m", module, *words[1:]]
    assert variables[TOPOLOGY] == "2,4,1" and variables[ADDRESSES] == "localhost:1,localhost:2"
    assert "WORLD_SIZE" not in variables


def test_another_number_of_chips_and_a_failing_launcher_are_messages() -> None:
    with pytest.raises(ConfigError, match="given 4 chips on a host with 8.*fsdp=8"):
        start_all(4, ["torchprime", "train"], Shell())
    with pytest.raises(RuntimeSetupError, match="launcher failed.*no TPU devices"):
        start_all(8, ["torchprime", "train"], Shell(1))
