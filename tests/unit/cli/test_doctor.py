"""`torchprime doctor`: what does not fit is said with the command that mends it."""

from __future__ import annotations

import pytest

from torchprime.cli import doctor
from torchprime.cli.main import main
from torchprime.torch_xla_models.compile import library as tpu_library

ASKED = [
    "numpy>=1.26",
    "missing-one>=2",
    'jax==0.7.1; python_version >= "3.0" and extra == "xla"',
    'jax==0.6.2; python_version < "3.0" and extra == "xla"',
    'accelerate>=1.0; extra == "gpu"',
    'ruff>=99; extra == "dev"',
]


def test_versions_that_do_not_fit() -> None:
    there = {"numpy": "1.20", "jax": "0.9.0", "ruff": "0.1"}
    assert doctor.misfits(ASKED, there.get) == [
        "jax is 0.9.0, ==0.7.1 is needed",
        "missing-one is missing, >=2 is needed",
        "numpy is 1.20, >=1.26 is needed",
    ]
    fitting = {"numpy": "2.0", "jax": "0.7.1", "missing-one": "2.1"}
    assert doctor.misfits(ASKED, fitting.get) == []


def test_this_host_quickly(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick"]) == 0
    said = capsys.readouterr().out
    assert "all fit together" in said and "no chips on this host" in said
    assert "virtual devices" not in said


@pytest.mark.slow
def test_virtual_devices_compute(monkeypatch, capsys) -> None:
    (found,) = doctor.virtual_devices()
    assert found.state == doctor.OK, found.detail
    monkeypatch.setattr(doctor, "VIRTUAL", "raise RuntimeError('no XLA today')")
    (found,) = doctor.virtual_devices()
    assert found.state == doctor.PROBLEM and "no XLA today" in found.detail


def test_a_problem_shows_in_the_exit_code(monkeypatch, capsys) -> None:
    monkeypatch.setattr(doctor, "tpu_chips", lambda: ["/dev/accel0"])
    monkeypatch.setattr(doctor, "_installed", {"torch": "1.0"}.get)
    assert main(["doctor", "--quick"]) == 1
    said = capsys.readouterr()
    assert "PROBLEM  TPU" in said.out and "pip install 'torchprime[tpu]'" in said.out
    assert "torch is 1.0" in said.out and "problems found" in said.err


def test_without_libtpu_the_compiler_is_none(monkeypatch) -> None:
    monkeypatch.setattr(tpu_library, "_candidates", list)
    (found,) = doctor.compiler()
    assert found.state == doctor.NONE and "pip install --no-deps libtpu" in found.detail
