"""The process environment before torch_xla starts."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from torchprime.torch_xla_models import runtime

TUNED = ("MALLOC_", "GLIBC_TUNABLES")
ENVIRON = {name: value for name, value in os.environ.items() if not name.startswith(TUNED)}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without a TPU and without settings; what the test sets is undone."""
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(runtime, "host_has_tpu", lambda: False)
    monkeypatch.setattr(runtime, "MALLOC_OPTIONS", {})  # this process is not the run's


def test_without_a_tpu_the_cpu_is_chosen_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    runtime.prepare_environment(4)
    assert os.environ["PJRT_DEVICE"] == "CPU"
    assert os.environ["CPU_NUM_DEVICES"] == "4"
    assert os.environ["XLA_FLAGS"] == runtime.CPU_CODE_OPTIONS
    assert int(os.environ["PJRT_NPROC"]) > 4
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "CPU with 4 virtual devices" in said


def test_what_the_user_set_stays(capsys: pytest.CaptureFixture[str]) -> None:
    own = "--xla_backend_extra_options=-unroll-threshold=7"
    os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES="2", XLA_FLAGS=own)
    runtime.prepare_environment(4)
    assert os.environ["CPU_NUM_DEVICES"] == "2" and os.environ["XLA_FLAGS"] == own
    assert capsys.readouterr().err == ""


def test_other_flags_are_kept() -> None:
    os.environ.update(PJRT_DEVICE="CPU", XLA_FLAGS="--xla_dump_to=there")
    runtime.prepare_environment(1)
    assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=there {runtime.CPU_CODE_OPTIONS}"


def test_a_tpu_host_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "host_has_tpu", lambda: True)
    runtime.prepare_environment(4)
    assert not {"PJRT_DEVICE", "CPU_NUM_DEVICES", "XLA_FLAGS"} & set(os.environ)


def test_a_tpu_gets_the_compilers_flags_and_keeps_the_users(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runtime, "host_has_tpu", lambda: True)
    runtime.prepare_environment(4)
    assert os.environ["LIBTPU_INIT_ARGS"].split() == [
        f"--{name}={value}" for name, value in runtime.TPU_FLAGS.items()
    ]
    own = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=0 --other=1"
    os.environ["LIBTPU_INIT_ARGS"] = own
    runtime.prepare_environment(4)
    assert os.environ["LIBTPU_INIT_ARGS"].startswith(own)
    assert os.environ["LIBTPU_INIT_ARGS"].count("windowed_einsum") == 1


def test_the_cpu_gets_no_flags_of_the_tpu() -> None:
    runtime.prepare_environment(4)
    assert "LIBTPU_INIT_ARGS" not in os.environ


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such policy")
def test_threads_do_not_push_one_another_off_a_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """But a policy that the user chose stays."""
    asked: list[int] = []
    monkeypatch.setattr(os, "sched_setscheduler", lambda _, policy, __: asked.append(policy))
    monkeypatch.setattr(os, "sched_getscheduler", lambda _: os.SCHED_FIFO)
    runtime.prepare_environment(4)
    assert asked == []
    monkeypatch.setattr(os, "sched_getscheduler", lambda _: os.SCHED_OTHER)
    runtime.prepare_environment(4)
    assert asked == [os.SCHED_BATCH]


# 41 is PR_SET_THP_DISABLE: no huge pages, one fault for each of the 16,384 pages of a block.
FAULTS = """
import ctypes, resource
from torchprime.torch_xla_models.runtime import prepare_environment

ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)
prepare_environment(1)
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = b"x" * 2**26
    del block
    after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(after - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these options")
@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, True),
        ({"MALLOC_MMAP_MAX_": "9"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_max=9"}, False),
        ({"CPU_NUM_DEVICES": "4"}, False),
    ],
    ids=["default", "variable", "tunable", "four devices"],
)
def test_freed_memory_is_used_again(given: dict[str, str], kept: bool) -> None:
    """By one device; and what the user set stays."""
    env = {**ENVIRON, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "1", **given}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, check=True)
    assert (int(done.stdout) < 100) is kept


def test_where_compiled_programs_are_kept(tmp_path) -> None:
    os.environ.update(XDG_CACHE_HOME=str(tmp_path), TPU_WORKER_ID="3")
    assert runtime.cache_folder("auto") == tmp_path / "torchprime" / "compiled"
    # A folder that hosts may share: each has its own place in it.
    assert runtime.cache_folder("/mnt/bucket") == runtime.Path("/mnt/bucket/host-3")
    assert runtime.cache_folder(None) is None
