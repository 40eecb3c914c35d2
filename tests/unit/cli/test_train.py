"""`torchprime train`: which backend a host gets, why, and what the command says of it."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch

import torchprime.torch_native.train
import torchprime.torch_xla_models.train
from torchprime.cli import train
from torchprime.cli.main import main
from torchprime.cli.shared import backends
from torchprime.errors import ConfigError
from torchprime.training.run.folder import command

VARIABLES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK", "PJRT_DEVICE")
ONE_PER_HOST = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
TORCHRUN = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"}


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch):
    """A host that has what is asked for, and nothing else."""

    def fake(env: dict[str, str], tpus: int = 0, gpus: int = 0, torch_xla: bool = True) -> None:
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(backends, "host_has_tpu", lambda: tpus > 0)
        monkeypatch.setattr(backends, "tpu_chips", lambda: ["/dev/accel0"] * tpus)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        find = importlib.util.find_spec
        monkeypatch.setattr(
            backends.importlib.util,
            "find_spec",
            lambda name: (object() if torch_xla else None) if name == "torch_xla" else find(name),
        )

    return fake


@pytest.mark.parametrize(
    ("env", "devices", "asked", "compile_only", "backend", "reason"),
    [
        ({}, {}, None, None, "xla", "neither TPU nor CUDA GPU"),
        ({}, {"tpus": 8}, None, None, "xla", "8 TPU chips"),
        ({}, {"tpus": 8, "gpus": 1}, None, None, "xla", "8 TPU chips"),
        ({}, {"tpus": 8, "torch_xla": False}, None, None, "xla", "8 TPU chips"),
        ({}, {"gpus": 1}, None, None, "native", "a CUDA GPU and no TPU"),
        ({}, {"gpus": 8}, None, None, "native", "8 CUDA GPUs and no TPU; this process uses one"),
        ({}, {"torch_xla": False}, None, None, "native", "torch_xla is not installed"),
        (TORCHRUN, {}, None, None, "native", "torchrun started this process, one of 4"),
        (TORCHRUN, {"tpus": 8}, None, None, "native", "torchrun"),
        (TORCHRUN, {"gpus": 4}, None, "v6e-8", "native", "torchrun"),
        ({}, {"gpus": 1}, None, "v6e-8", "xla", "compile_only"),
        ({"PJRT_DEVICE": "CPU"}, {"gpus": 1}, None, None, "xla", "PJRT_DEVICE is CPU"),
        ({}, {"tpus": 8}, "native", None, "native", "--backend"),
        ({}, {"gpus": 1}, "xla", None, "xla", "--backend"),
        (ONE_PER_HOST, {"tpus": 8}, "xla", None, "xla", "--backend"),
    ],
)  # fmt: skip
def test_each_host_gets_its_backend(
    host, env, devices, asked, compile_only, backend, reason
) -> None:
    host(env, **devices)
    chosen = backends.choose_backend(asked, compile_only)
    assert chosen.backend == backend and reason in chosen.reason
    # Whoever did not choose is told how to.
    assert bool(chosen.instead) == (asked is None and reason != "compile_only")


def test_torchtpus_environment_compiles_its_own_step(host, monkeypatch) -> None:
    host({})
    monkeypatch.setattr(backends, "installed_version", {"torch-tpu": "0.2.0"}.get)
    assert backends.choose_backend(None, "v6e-8").backend == "native"


@pytest.mark.parametrize(("env", "devices"), [({}, {}), ({}, {"tpus": 8}), (TORCHRUN, {})])
def test_a_device_is_the_native_backends(host, env, devices) -> None:
    host(env, **devices)
    chosen = backends.choose_backend(None, None, device="tpu_on_cpu")
    assert chosen.backend == "native" and "device=tpu_on_cpu" in chosen.reason
    with pytest.raises(ConfigError, match="device: given 'tpu' with --backend xla, expected auto"):
        backends.choose_backend("xla", None, device="tpu")


def test_chips_with_torchtpu_alone_are_the_native_backends(host, monkeypatch) -> None:
    host({}, tpus=8, torch_xla=False)
    monkeypatch.setattr(backends, "only_torchtpu", lambda: True)
    chosen = backends.choose_backend(None, None)
    assert (chosen.backend, chosen.instead) == ("native", "") and "torch-tpu" in chosen.reason


def test_several_gpus_are_told_of_torchrun(host) -> None:
    host({}, gpus=8)
    assert "torchrun --standalone --nproc_per_node=8" in backends.choose_backend(None, None).instead


def test_xla_in_several_processes_of_a_host_is_refused(host) -> None:
    host(TORCHRUN)
    with pytest.raises(ConfigError, match="under torchrun with 4 processes.*--backend native"):
        backends.choose_backend("xla", None)


@pytest.mark.parametrize(
    ("argv", "backend"),
    [
        (["-cn", "quickstart", "seed=7"], "xla"),
        (["--backend", "native", "-cn", "quickstart", "seed=7"], "native"),
        (["-cn", "quickstart", "--backend=native", "seed=7"], "native"),
        (["-cn", "quickstart", "seed=7", "--backend", "xla"], "xla"),
    ],
)
def test_the_command_says_what_it_chose_and_trains(host, monkeypatch, capsys, argv, backend):
    host({})
    ran = []

    def entry(name: str):
        def run(config) -> int:
            ran.append((name, config.seed))
            return 75

        return run

    monkeypatch.setattr(train, "MAINS", {name: entry(name) for name in backends.NAMES})
    assert main(["train", *argv]) == 75
    said = capsys.readouterr()
    assert ran == [(backend, 7)]
    assert said.err.startswith(f"backend {backend} (") and not said.out


def test_only_the_first_process_speaks(host, monkeypatch, capsys) -> None:
    host({**TORCHRUN, "RANK": "1"})
    monkeypatch.setattr(train, "MAINS", {"native": lambda config: 0})
    assert main(["train", "-cn", "quickstart"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("argv", "given"),
    [
        (["--backend", "cuda"], "given 'cuda'"),
        (["--backend"], "given ''"),
        (["--backend=xla", "--backend", "native"], "given 'xla' and 'native'"),
    ],
)
def test_a_wrong_backend_is_one_message(capsys, argv: list[str], given: str) -> None:
    assert main(["train", *argv]) == 2
    assert f"error: --backend: {given}, expected one of xla, native" in capsys.readouterr().err


def test_the_backends_are_their_entry_points() -> None:
    assert train.MAINS["xla"] is torchprime.torch_xla_models.train.main
    assert train.MAINS["native"] is torchprime.torch_native.train.main


@pytest.mark.parametrize(
    ("given", "one_run"),
    [
        ("train -cn quickstart -m seed=1,2", "train"),
        ("train -cn quickstart --backend native -m seed=1,2", "train --backend native"),
    ],
)
def test_the_runs_of_a_sweep_get_the_same_backend(monkeypatch, given: str, one_run: str) -> None:
    argv = given.split()
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["bin/torchprime", *argv])
    monkeypatch.setattr(sys, "orig_argv", ["python", "bin/torchprime", *argv])
    started = []
    monkeypatch.setattr(
        "torchprime.cli.train.run_sweep",
        lambda command, program: started.append((command.overrides, program[1:])) or 0,
    )
    assert main(argv) == 0
    assert started == [(["seed=1,2"], ["bin/torchprime", *one_run.split()])]


def test_choosing_does_not_import_torch_xla() -> None:
    code = (
        "import sys; from torchprime.cli.shared import backends as b; b.choose_backend(None, None);"
        "print([name for name in ('torch_xla', 'transformers', 'jax') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_run_records_the_command_as_it_is_typed(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/opt/venv/bin/torchprime", "train", "run_name=a b"])
    assert command() == "torchprime train 'run_name=a b'"
